"""Whatever a user gets wrong: one line, exit code 2, and every file as it was. For every script."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from helpers import (
    ROOT,
    Hostile,
    call,
    command,
    damages,
    edit,
    evaluation,
    full_when_flushing,
    full_when_writing,
    make_tokenizer,
    one_thread,
    removals,
    run,
    write_run,
)

TRAINING = ["--threads", 1, "--device", "cpu", "--max-steps", 1, "--eval-samples", 5]
CORPUS, TOKENIZER, MODEL = "corpus.txt", "tokenizer", "model.pt"
RUN, METRICS, OWN_METRICS = "finished_run", "metrics.json", "own_metrics.json"
STUDY = "study.json"
PLACES = ("RUN", "METRICS", "STUDY")  # words that --help shows for values without a flag


@dataclass(frozen=True)
class Script:
    """A script with arguments that are right, as far as each is not made wrong."""

    name: str
    inputs: dict[str, str] = field(default_factory=dict)  # flag or, by its place, WORD -> file
    output: tuple[str, str] | None = None  # flag, file or folder
    other: tuple[object, ...] = ()

    def argv(self, world: Path, **changed: object) -> list[object]:
        """The arguments, with another value for a flag (``corpus_path=...``)."""
        flags = {**self.inputs, **dict([self.output] if self.output else [])}
        flags = {flag: world / name for flag, name in flags.items()}
        for name, value in changed.items():
            flags[name if name in flags else "--" + name.replace("_", "-")] = value
        words = [word for item in flags.items() for word in item]
        return [*self.other, *(word for word in words if word not in PLACES)]


GENERATE = ("--num-samples", 20, "--max-depth", 2)
SCRIPTS = [
    Script(
        "generate_corpus.py",
        output=("--output-foundational", "old.txt"),
        other=(*GENERATE, "--foundational-only"),
    ),
    Script(
        "generate_foundational_plaintext.py", output=("--output-txt", "old.txt"), other=GENERATE
    ),
    Script(
        "generate_instruction_corpus_mixed.py",
        output=("--output-mixed", "old.txt"),
        other=GENERATE,
    ),
    Script("train_tokenizer.py", {"--corpus-path": CORPUS}, ("--output-dir", "old_tokenizer")),
    Script("print_token_table.py", {"--tokenizer-path": TOKENIZER, "--corpus-path": CORPUS}),
    Script("check_sequence_lengths.py", {"--corpus-path": CORPUS, "--tokenizer-path": TOKENIZER}),
    Script(
        "run_foundational_training.py",
        {"--corpus-path": CORPUS, "--tokenizer-path": TOKENIZER, "--init-from": MODEL},
        ("--output-dir", "runs"),
        tuple(TRAINING),
    ),
    Script(
        "run_instruction_training.py",
        {
            "--instruction-corpus-path": CORPUS,
            "--tokenizer-path": TOKENIZER,
            "--foundational-checkpoint": MODEL,
        },
        ("--output-dir", "runs"),
        tuple(TRAINING),
    ),
    Script(
        "run_instruction_training_lora.py",
        {
            "--instruction-corpus-path": CORPUS,
            "--tokenizer-path": TOKENIZER,
            "--foundational-checkpoint": MODEL,
        },
        ("--output-dir", "runs"),
        tuple(TRAINING),
    ),
    Script(
        "run_grpo_training.py",
        {"--instruction-corpus": CORPUS, "--tokenizer": TOKENIZER, "--sft-checkpoint": MODEL},
        ("--output-dir", "runs"),
        (*TRAINING, "--max-gen-length", 4),
    ),
    Script(
        "merge_lora_adapter.py",
        {"--base-checkpoint": MODEL, "--adapter-path": "adapter.pt"},
        ("--output-path", "old.txt"),
    ),
    Script(
        "export_model.py",
        {"--model-path": MODEL, "--metrics": OWN_METRICS},
        ("--output-dir", "old_export"),
    ),
    Script(
        "run_evaluation.py",
        {"--model-path": MODEL, "--tokenizer-path": TOKENIZER, "--test-file": CORPUS},
        ("--output-dir", "results"),
        ("--max-gen-length", 2),
    ),
    Script("run_interactive.py", {"--model-path": MODEL, "--tokenizer-path": TOKENIZER}),
    Script(
        "show_trace.py",
        {"--model-path": MODEL, "--tokenizer-path": TOKENIZER},
        ("--output", "old.txt"),
        ("1 + 2", "--max-gen-length", 3),
    ),
    Script("plot_runs.py", {"RUN": RUN}, ("--output", "old.svg")),
    Script("plot_evaluation.py", {"METRICS": METRICS}, ("--output", "old.svg")),
    Script("run_study.py", {"STUDY": STUDY}, other=("--dry-run",)),
    Script("quickstart.py"),
]

# What may stand where a good file should; each is a file of the world.
BAD = {
    CORPUS: ["missing", "empty", "folder", "malformed.txt", "half.txt", "bytes"],
    TOKENIZER: ["missing", "empty", "folder", "malformed.json", "other_tokenizer"],
    MODEL: ["missing", "empty", "folder", "truncated.pt", "hostile.pt", "nan.pt", "corpus.txt"],
    "adapter.pt": ["missing", "empty", "folder", "truncated.pt", "hostile.pt", "nan.pt"],
    RUN: ["missing", "empty", "folder", "corpus.txt", "empty_run"],
    STUDY: ["missing", "empty", "folder", "corpus.txt", "malformed.json", "other.json", "bytes"],
    METRICS: ["missing", "empty", "folder", "corpus.txt", "malformed.json", "other.json"],
    OWN_METRICS: ["missing", "empty", "folder", "malformed.json", "other_metrics.json", "bytes"],
}


def _bad_inputs():
    for script in SCRIPTS:
        for flag, good in script.inputs.items():
            for bad in BAD[good]:
                # Without a model there is no tokenizer that would be the wrong one.
                if bad != "other_tokenizer" or MODEL in script.inputs.values():
                    yield pytest.param(script, flag, bad, id=f"{script.name} {flag} {bad}")


WITH_OUTPUT = [
    pytest.param(script, id=script.name) for script in SCRIPTS if script.output is not None
]
EVERY = [pytest.param(script, id=script.name) for script in SCRIPTS]


@pytest.fixture(scope="module")
def world(workshop, tiny_checkpoint, tokenizer, tmp_path_factory):
    """A folder with everything that is right and everything that is wrong."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copy(workshop / "corpus.txt", folder / CORPUS)
    shutil.copy(tiny_checkpoint, folder / MODEL)
    tokenizer.save(folder / TOKENIZER)
    _make_adapter(folder)
    _make_export(folder)
    (folder / "old.txt").write_text("old\n")
    tokenizer.save(folder / "old_tokenizer")

    (folder / "empty").write_bytes(b"")
    (folder / "folder").mkdir()
    (folder / "results").mkdir()
    lines = (folder / CORPUS).read_text().splitlines(keepends=True)
    (folder / "malformed.txt").write_text("".join([*lines[:4], "Evaluate 1 + 2\n", *lines[4:]]))
    (folder / "half.txt").write_text("".join(lines[:5]))
    (folder / "bytes").write_bytes(b"Evaluate: 1 + \xff\n")
    (folder / "malformed.json").write_text('{"model": ')
    (folder / "other.json").write_text('{"stage": "foundational", "steps": 9}')
    write_run(folder / RUN)
    write_run(folder / "empty_run", lines=[])
    (folder / METRICS).write_text(json.dumps(evaluation(rates=[50])))
    (folder / STUDY).write_text('{"question": "Is it right?"}')
    (folder / "old.svg").write_text("<svg/>")
    make_tokenizer(150).save(folder / "other_tokenizer")
    content = (folder / MODEL).read_bytes()
    (folder / "truncated.pt").write_bytes(content[: len(content) // 2])
    for name, change in (
        ("hostile.pt", lambda content: content.update(stage=Hostile(folder / "executed"))),
        ("nan.pt", lambda content: content["weights"]["lm_head.weight"].fill_(float("nan"))),
    ):
        shutil.copy(folder / MODEL, folder / name)
        edit(folder / name, change)
    return folder


def _make_adapter(folder):
    lora = next(script for script in SCRIPTS if script.name == "run_instruction_training_lora.py")
    ended = call(lora.name, *lora.argv(folder, output_dir=folder / "lora"))
    assert ended.code == 0, ended.err
    (adapter,) = folder.glob("lora/*/lora_adapter.pt")
    shutil.copy(adapter, folder / "adapter.pt")


def _make_export(folder):
    argv = ["--model-path", folder / MODEL, "--output-dir", folder / "evaluated"]
    assert call("run_evaluation.py", *argv, *BRIEFLY.split()[2:]).code == 0
    (metrics,) = folder.glob("evaluated/evaluation_metrics_*.json")
    shutil.move(metrics, folder / OWN_METRICS)
    other = (folder / OWN_METRICS).read_text().replace('"weights_hash": "', '"weights_hash": "0')
    (folder / "other_metrics.json").write_text(other)
    argv = ["--model-path", folder / MODEL, "--output-dir", folder / "old_export"]
    assert call("export_model.py", *argv).code == 0


def state_of(folder):
    """Every file with a digest of its bytes, and every folder."""
    return {
        path.relative_to(folder): hashlib.md5(path.read_bytes()).digest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def assert_refused(ended, named=""):
    """One error line, the last; warnings may stand before it."""
    assert ended.code == 2, ended
    *before, last = ended.err.splitlines()
    assert last.startswith("error: "), ended.err
    assert all(line.startswith("warning: ") for line in before), ended.err
    assert str(named) in last


def test_every_script_is_in_the_list():
    assert sorted(s.name for s in SCRIPTS) == sorted(path.name for path in ROOT.glob("*.py"))


# --------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize(("script", "flag", "bad"), [*_bad_inputs()])
def test_a_bad_input_is_one_line_that_names_it(world, script, flag, bad):
    before = state_of(world)
    name = flag.removeprefix("--").replace("-", "_")
    ended = call(script.name, *script.argv(world, **{name: world / bad}))
    assert_refused(ended, named=world / bad)
    assert state_of(world) == before


# Should one of them be accepted after all, the test is to fail and not to evaluate for minutes.
BRIEFLY = "--output-dir results --num-samples=2 --max-depth=1 --max-gen-length=2"
READERS = {  # of a checkpoint: the command whose last flag names it
    MODEL: [
        f"run_evaluation.py {BRIEFLY} --model-path",
        "run_interactive.py --model-path",
        "merge_lora_adapter.py --output-path x.pt --adapter-path adapter.pt --base-checkpoint",
    ],
    "adapter.pt": [
        f"run_evaluation.py {BRIEFLY} --base-checkpoint model.pt --model-path",
        "run_interactive.py --base-checkpoint model.pt --model-path",
        "show_trace.py --output x.html --base-checkpoint model.pt 1+2 --model-path",
        "merge_lora_adapter.py --output-path x.pt --base-checkpoint model.pt --adapter-path",
    ],
}


@pytest.mark.parametrize("good", READERS)
def test_a_checkpoint_damaged_anywhere_is_one_line_that_names_it(world, tmp_path, good):
    """Each key taken away or of another type, the scripts taking turns."""
    content = torch.load(world / good, weights_only=True)
    damaged, readers = tmp_path / "damaged.pt", itertools.cycle(READERS[good])
    changes = [*damages(content), *removals(content)]
    assert len(changes) > 100
    for place, change in changes:
        shutil.copy(world / good, damaged)
        edit(damaged, change)
        script, *words = next(readers).split()
        argv = [word if word.startswith("--") else world / word for word in words]
        try:
            ended = call(script, *argv, damaged)
        except Exception as error:
            raise AssertionError(f"{script}: {place}") from error
        assert ended.code == 2, (script, place)
        assert_refused(ended, damaged)
    assert not (world / "x.pt").exists()


def test_a_malformed_line_is_named_by_its_number(world):
    for script in SCRIPTS:
        for flag, good in script.inputs.items():
            if good == CORPUS:
                name = flag.removeprefix("--").replace("-", "_")
                ended = call(script.name, *script.argv(world, **{name: world / "malformed.txt"}))
                assert "malformed.txt:5: " in ended.err, script.name


def test_the_hostile_file_was_never_executed(world):
    """After all of the above; and it is hostile indeed."""
    assert not (world / "executed").exists()
    torch.load(world / "hostile.pt", weights_only=False)
    assert (world / "executed").exists()
    (world / "executed").unlink()


def test_a_sidecar_that_is_damaged_is_no_reason_to_crash(world, tmp_path):
    shutil.copy(world / CORPUS, tmp_path / "c.txt")
    script = next(s for s in SCRIPTS if s.name == "run_foundational_training.py")
    for damage in ("", "{", "[]", "{}", '{"sha256": 5}'):
        (tmp_path / "c.txt.meta.json").write_text(damage)
        argv = script.argv(world, corpus_path=tmp_path / "c.txt", output_dir=tmp_path / "out")
        ended = call(script.name, *argv)
        assert ended.code == 0, (damage, ended.err)
        assert "c.txt.meta.json" in ended.out


# -------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("script", EVERY)
@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "no such"),
        (b"", "empty"),
        (b"{", "not valid JSON"),
        (b'{"outptu_dir": 1}', "'outptu_dir'"),
    ],
    ids=["missing", "empty", "malformed", "unknown key"],
)
def test_a_bad_config_is_one_line(world, tmp_path, script, content, named):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    before = state_of(world)
    ended = call(script.name, *script.argv(world, config=tmp_path / "config.json"))
    assert_refused(ended, named)
    assert state_of(world) == before


# -------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("script", WITH_OUTPUT)
@pytest.mark.parametrize("full", [full_when_writing, full_when_flushing])
def test_a_full_disk_is_one_line_and_the_old_file_stays(world, tmp_path, monkeypatch, script, full):
    flag, old = script.output
    target = tmp_path / old
    if (world / old).is_file():
        shutil.copy(world / old, target)
    elif (world / old).is_dir():
        shutil.copytree(world / old, target)
    before = state_of(tmp_path)
    full(monkeypatch)
    name = flag.removeprefix("--").replace("-", "_")
    ended = call(script.name, *script.argv(world, **{name: target}))
    assert ended.code == 2
    assert len(ended.error_lines) == 1
    assert "cannot be written: No space left on device" in ended.err
    after = state_of(tmp_path)
    assert {path: after.get(path) for path in before} == before  # what there was is as it was
    assert not [path for path in after if path.suffix == ".tmp"]


@pytest.mark.parametrize("script", WITH_OUTPUT)
def test_an_output_under_a_file_is_one_line(world, script):
    flag, _ = script.output
    before = state_of(world)
    name = flag.removeprefix("--").replace("-", "_")
    ended = call(script.name, *script.argv(world, **{name: world / "old.txt" / "new"}))
    assert_refused(ended, named=world / "old.txt")
    assert state_of(world) == before


def test_a_disk_that_fills_up_in_the_middle_of_a_run(world, tmp_path):
    """For real: the system refuses to let a file grow beyond 30 kB; the model has 130."""
    resource = pytest.importorskip("resource", reason="only Unix limits the size of files")
    script = next(s for s in SCRIPTS if s.name == "run_foundational_training.py")
    done = subprocess.run(
        command(script.name, *script.argv(world, output_dir=tmp_path)),
        env=one_thread(),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)),
    )
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "best_model.pt: cannot be written: File too large" in line
    assert "Traceback" not in done.stderr
    (folder,) = tmp_path.iterdir()
    assert {path.name for path in folder.iterdir()} == {
        "metrics.jsonl",
        "model_config.json",
        "run.json",
        "training_config.json",
    }


# ------------------------------------------------------------------------------- as processes


@pytest.mark.parametrize(
    ("name", "argv", "named"),
    [
        ("train_tokenizer.py", ["--corpus-path", "nowhere.txt"], "nowhere.txt"),
        ("run_evaluation.py", ["--model-path", "hostile.pt"], "hostile.pt"),
        ("run_interactive.py", ["--model-path", "nan.pt"], "nan.pt"),
        ("quickstart.py", ["--recipe", "no\\where near"], "stage '1 foundational corpus'"),
    ],
)
def test_a_process_ends_with_one_line_and_code_2(world, tmp_path, name, argv, named):
    for file in world.glob("*.pt"):
        shutil.copy(file, tmp_path)
    ended = run(name, *argv, cwd=tmp_path)
    assert ended.code == 2
    assert named in ended.error_lines[-1]
    assert "Traceback" not in ended.err
    if name == "quickstart.py":  # which hands on the line of its stage, too
        config = Path(argv[-1]) / "foundational_corpus.json"
        assert ended.error_lines[0] == f"error: {config}: no such JSON config file; check the path"
    else:
        assert ended.err.count("\n") == 1


# ------------------------------------------------------------------------------ other mistakes


@pytest.mark.parametrize(
    "script",
    [param for param in EVERY if param.id.startswith("run_") and param.id != "run_study.py"],
)
def test_a_device_that_is_not_there_is_one_line(world, script):
    argv = [word for word in script.argv(world) if word not in ("--device", "cpu")]
    ended = call(script.name, *argv, "--device", "cuda:99")
    assert_refused(ended, "--device cuda:99")
    assert_refused(call(script.name, *argv, "--device", "toaster"), "--device toaster")


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--seed", 10**30), ("--d-model", 10**12), ("--num-layers", 10**9), ("--nhead", 3)],
)
def test_absurd_numbers_are_one_line(world, flag, value):
    argv = ["--corpus-path", world / CORPUS, "--tokenizer-path", world / TOKENIZER, *TRAINING]
    assert_refused(call("run_foundational_training.py", *argv, flag, value), flag)


@pytest.mark.parametrize(
    "name",
    [path.name for path in ROOT.glob("run_*_training*.py")],
)
def test_a_run_that_is_not_there_cannot_be_resumed(tmp_path, name):
    assert_refused(call(name, "--resume", tmp_path / "nowhere"), tmp_path / "nowhere")


# --------------------------------------------------------------------- as bad as a model can be


def test_a_random_model_is_evaluated_and_solves_without_a_crash(world, tmp_path):
    ended = call(
        "run_evaluation.py",
        *("--model-path", world / MODEL, "--output-dir", tmp_path, "--max-depth", 2),
        *("--num-samples", 30, "--invalid-rate", 0.2, "--max-gen-length", 60),
    )
    assert ended.code == 0, ended.err
    (metrics,) = tmp_path.glob("evaluation_metrics_*.json")
    assert json.loads(metrics.read_text())["correct_samples"] == 0
    ended = run(
        "run_interactive.py",
        *("--model-path", world / MODEL, "--max-gen-length", 60),
        stdin="5 + (10 - 3)\n5 +\n1\nq\n",
    )
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
