"""The documented commands, pasted one after the other, and the quickstart; both scaled down."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from browser import look_at
from helpers import ROOT, call, load_script, one_thread, recipe, run

from arithmetic_llm.distributed import cores
from arithmetic_llm.runtime import UserError

# The manual's quick start, steps 1 to 4.1, word for word.
MANUAL = r"""
python generate_foundational_plaintext.py \
  --num-samples 100000 \
  --max-depth 4 \
  --num-range 1 20 \
  --invalid-rate 0.05 \
  --output-txt data/foundational_corpus.txt

python generate_instruction_corpus_mixed.py \
  --num-samples 20000 \
  --max-depth 4 \
  --num-range 1 20 \
  --invalid-rate 0 \
  --output-mixed data/instruction_corpus.txt

python generate_corpus.py \
  --instruction-only \
  --num-samples 1000 \
  --max-depth 4 \
  --output-instruction data/instruction_corpus_test.txt \
  --num-range 1 20 \
  --invalid-rate 0

#check line counts
python -c "import sys; [print(f'{sum(1 for _ in open(f))} {f}') for f in ['data/foundational_corpus.txt', 'data/instruction_corpus.txt', 'data/instruction_corpus_test.txt']]"

# 2. Train tokenizer
python train_tokenizer.py \
  --corpus-path data/foundational_corpus.txt \
  --output-dir data/tokenizer \
  --vocab-size 1000

# show tokenizer table
python print_token_table.py --tokenizer_path data/tokenizer/tokenizer.pkl  > tokens.csv

# Analyze your instruction corpus
python check_sequence_lengths.py \
  --corpus-path data/instruction_corpus.txt \
  --tokenizer-path data/tokenizer

# 3. Train foundational model
python run_foundational_training.py \
  --corpus-path data/foundational_corpus.txt \
  --output-dir models/ \
  --tokenizer-path data/tokenizer \
  --num-epochs 10 \
  --max-seq-length 512 \
  --batch-size 16

#3.1 Evaluate the foundational model, performance would be bad
python run_evaluation.py \
  --model-path models/foundational_YYYYMMDD_HHMMSS/best_model.pt \
  --tokenizer-path data/tokenizer \
  --max-gen-length 512 \
  --num-samples 100 \
  --batch-size 1


# 4. Fine-tune instruction model
python run_instruction_training.py \
  --instruction-corpus-path data/instruction_corpus.txt \
  --output-dir models/ \
  --tokenizer-path data/tokenizer \
  --foundational-checkpoint models/foundational_YYYYMMDD_HHMMSS/best_model.pt \
  --num-epochs 10

# 4.1 Evaluate the model
python run_evaluation.py \
  --model-path models/instruction_YYYYMMDD_HHMMSS/best_model.pt \
  --tokenizer-path data/tokenizer \
  --max-gen-length 512 \
  --batch-size 1 \
  --num-samples 1000
"""  # noqa: E501

# The scripts stand in the repository and not where the test runs; python -c is left alone.
SHELL = """
set -euo pipefail
python() { local first=$1; shift; [ -f "$ROOT/$first" ] && first="$ROOT/$first"; \
"$PYTHON" "$first" "$@"; }
"""


def scaled_down(commands):
    """The same commands with small numbers in place of the documented ones."""
    sizes = {"100000": 200, "20000": 100, "1000": 20, "100": 8}
    commands = re.sub(
        r"--num-samples (\d+)", lambda match: f"--num-samples {sizes[match[1]]}", commands
    )
    for documented, small in (
        ("--num-epochs 10", "--num-epochs 1 --eval-samples 20 --threads 1"),
        ("--max-gen-length 512", "--max-gen-length 30"),
        (
            "--max-seq-length 512",
            "--max-seq-length 512 --d-model 32 --nhead 2 --num-layers 2 --dim-feedforward 48",
        ),
    ):
        assert documented in commands
        commands = commands.replace(documented, small)
    return commands


@pytest.fixture(scope="module")
def pasted(tmp_path_factory):
    """The folder that the manual's commands leave behind, and what they printed."""
    folder = tmp_path_factory.mktemp("pasted")
    done = subprocess.run(
        ["bash", "-c", SHELL + scaled_down(MANUAL)],
        cwd=folder,
        env={**one_thread(), "ROOT": str(ROOT), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="the manual speaks bash")


@needs_bash
def test_the_manuals_commands_run_as_they_stand(pasted):
    folder, out = pasted
    assert "400 data/foundational_corpus.txt\n100 data/instruction_corpus.txt\n20 data" in out
    assert {path.name for path in folder.iterdir()} == {
        "data",
        "evaluation_results",
        "models",
        "tokens.csv",
    }
    assert {path.name for path in (folder / "data").iterdir()} == {
        *("foundational_corpus.txt", "foundational_corpus.txt.meta.json"),
        *("instruction_corpus.txt", "instruction_corpus.txt.meta.json"),
        *("instruction_corpus_test.txt", "instruction_corpus_test.txt.meta.json"),
        "tokenizer",
    }
    assert (folder / "tokens.csv").read_text().startswith("id,token,kind\n0,<pad>,special\n")
    assert "recommended: --max-seq-length" in out


@needs_bash
def test_literal_time_stamps_become_the_newest_runs(pasted):
    folder, out = pasted
    assert re.findall(
        r"^models/(\w+)_YYYYMMDD_HHMMSS/best_model.pt -> (.*)$", out, re.MULTILINE
    ) == [
        (stage, str(run_folder.relative_to(folder) / "best_model.pt"))
        for stage in ("foundational", "foundational", "instruction")
        for run_folder in folder.glob(f"models/{stage}_2*")
    ]


@needs_bash
def test_each_evaluation_leaves_its_three_files(pasted):
    folder, _ = pasted
    results = folder / "evaluation_results"
    stamps = [path.stem.removeprefix("evaluation_metrics_") for path in results.glob("*metrics*")]
    assert len(stamps) == 2
    assert {path.name for path in results.iterdir()} == {
        name.format(stamp)
        for stamp in stamps
        for name in (
            "evaluation_metrics_{}.json",
            "sample_outputs_{}.json",
            "evaluation_summary_{}.txt",
        )
    }
    for stamp in stamps:
        metrics = json.loads((results / f"evaluation_metrics_{stamp}.json").read_text())
        samples = json.loads((results / f"sample_outputs_{stamp}.json").read_text())
        assert metrics["total_samples"] == len(samples) > 0
        assert metrics["exact_match_accuracy"] == 100 * metrics["correct_samples"] / len(samples)


@needs_bash
def test_the_solver_answers_what_is_typed(pasted):
    folder, _ = pasted
    ended = run(
        "run_interactive.py",
        "--model-path",
        "models/instruction_YYYYMMDD_HHMMSS/best_model.pt",
        "--tokenizer-path",
        "data/tokenizer",
        cwd=folder,
        stdin="5 + (10 - 3)\n5 + + 3\nexit\n",
    )
    assert ended.code == 0, ended.err
    assert ended.out.count("SOLUTION:") == 1
    assert re.search(r"^ *\^", ended.out, re.MULTILINE)  # under what is wrong


def test_the_quickstart_ends_with_a_table_of_results_and_a_report(tmp_path):
    folder = tmp_path / ("a {new} recipe" if os.name == "nt" else "a {new} re\\cipe")
    folder.mkdir()
    ended = run("quickstart.py", "--recipe", recipe(folder), cwd=tmp_path)
    assert ended.code == 0, ended.err
    printed = re.findall(r"^\$ python (.*)$", ended.out, re.MULTILINE)
    tried = r"== processes\ntrying .*\n1: ([\d,]+) tokens/s, .*; --processes (\d+) from"
    speed, chosen = re.search(tried, ended.out).groups() if cores() > 1 else ("1", "1")
    assert int(speed.replace(",", "")) > 0
    assert all((f"--processes {chosen}" in line) == (chosen != "1") for line in printed[4:])
    assert os.name == "nt" or f"{folder}/lora.json" in shlex.split(printed[8])
    *_, table, hint = ended.out.split("\n\n")
    for stage in ("1 foundational corpus", "2 tokenizer", "5 LoRA adapter", "6 GRPO model"):
        assert stage in table
    for stage in ("3.1", "4.1", "5.1", "6.1"):
        assert re.search(rf"^{stage} its evaluation +depth 1 ", table, re.MULTILINE)
    assert "run_interactive.py" in hint
    assert "in a browser: evaluation_results/report.html\n" in hint
    assert [*tmp_path.glob("evaluation_results/quickstart_instruction/evaluation_summary_*.txt")]
    read_in_a_browser(tmp_path / "evaluation_results" / "report.html", table, printed)


SLOW_TO_SAVE = """
import signal, sys, time
def save(*_):
    time.sleep(1)
    print("saved", flush=True)
    sys.exit(130)
signal.signal(signal.SIGINT, save)
print("ready", flush=True)
time.sleep(60)
"""
WAITING = f"""
import subprocess, sys
from quickstart import exit_code
sys.exit(exit_code(subprocess.Popen([sys.executable, "-c", {SLOW_TO_SAVE!r}])))
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGINT")
def test_ctrl_c_in_the_quickstart_leaves_the_stage_time_to_save():
    """As a terminal does it: quickstart and stage are told, both at once."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "saved\n"
    assert process.returncode == 130


def test_a_quickstart_that_was_interrupted_goes_on_with_the_run_it_had_begun(tmp_path, monkeypatch):
    quickstart, ran, ended = load_script("quickstart.py"), [], []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "finish", lambda done, config: ended.append((done, config)))
    monkeypatch.setattr(quickstart, "newest_metrics", lambda folder: f"{folder}/metrics")

    def run(name, arguments):
        ran.append(arguments)
        if len(ran) == 7:  # the instruction model's training, in its midst
            begun_run(tmp_path / "models" / "instruction_20260101_000000", arguments)
            raise KeyboardInterrupt
        return float(len(ran))

    monkeypatch.setattr(quickstart, "run", run)
    with pytest.raises(KeyboardInterrupt):
        quickstart.main(["--recipe", "r", "--processes", "2"])
    quickstart.main(["--resume"])
    assert ran[7] == [
        "run_instruction_training.py",
        "--resume",
        str(Path("models", "instruction_20260101_000000")),
    ]
    assert len(ran) == len(quickstart.STAGES) + 1
    ((done, config),) = ended
    assert (config.recipe, config.processes) == ("r", 2)
    assert [name for name, *_ in done] == [name for name, *_ in quickstart.STAGES]
    assert [seconds for _, _, seconds, _ in done] == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13]
    assert done[6][1].startswith("python run_instruction_training.py --config r/instruction.json")
    quickstart.main(["--resume"])  # once more, when all is done
    assert len(ran) == len(quickstart.STAGES) + 1


def begun_run(folder, arguments, *more):
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"command": ["/x/script.py", *arguments[1:]]}))
    for name in ("checkpoint_step_5.pt", *more):
        (folder / name).touch()


def test_what_did_not_begin_or_is_finished_begins_anew(tmp_path, monkeypatch):
    quickstart = load_script("quickstart.py")
    monkeypatch.chdir(tmp_path)
    line = ["run_grpo_training.py", "--config", "a b/grpo.json"]
    assert quickstart.going_on(line) == line
    begun_run(tmp_path / "models" / "grpo" / "grpo_20260101_000000", [*line, "--seed", "2"])
    assert quickstart.going_on(line) == line  # another command's
    begun_run(tmp_path / "models" / "grpo" / "grpo_20260101_000001", line)
    assert quickstart.going_on(line)[1:] == ["--resume", "models/grpo/grpo_20260101_000001"]
    begun_run(tmp_path / "models" / "grpo" / "grpo_20260101_000002", line, "training_summary.json")
    assert quickstart.going_on(line) == line


@pytest.mark.parametrize("content", [None, "{", '{"recipe": "r"}', '{"seconds": 3}'])
def test_nothing_to_go_on_with_is_a_line(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    if content:
        (tmp_path / "models").mkdir()
        (tmp_path / "models" / "quickstart.json").write_text(content)
    with pytest.raises(UserError, match=r"quickstart\.json"):
        load_script("quickstart.py").main(["--resume"])


@pytest.mark.parametrize(
    ("speeds", "chosen", "most"),
    [({1: 100.0, 4: 106.0}, 4, 4), ({1: 100.0, 4: 104.0}, 1, 4), ({1: 100.0, 4: 0.0}, 1, 1)],
    ids=str,
)
def test_several_processes_are_taken_if_they_pay(monkeypatch, capsys, speeds, chosen, most):
    quickstart, commands = load_script("quickstart.py"), []
    monkeypatch.setattr(quickstart, "cores", lambda: 4)
    monkeypatch.setattr(quickstart, "quietly", lambda command, **_: commands.append(command))
    monkeypatch.setattr(quickstart, "rate", lambda recipe, folder, count: speeds[count])
    assert quickstart.fastest("r") == (chosen, most)
    assert f"; --processes {chosen} from here on, or one for each" in capsys.readouterr().out
    assert commands == [quickstart.SAMPLE]


@pytest.mark.parametrize(
    ("workers", "local_steps", "tried"),
    [(1, 50, 4), (2, 50, 2), (3, 0, 3), (5, 50, 4), (5, 0, None)],
)
def test_a_process_without_a_worker_is_not_tried(
    monkeypatch, tmp_path, workers, local_steps, tried
):
    """And those who take turns do so in one process or in one each."""
    quickstart, counts = load_script("quickstart.py"), []
    monkeypatch.setattr(quickstart, "cores", lambda: 4)
    monkeypatch.setattr(quickstart, "quietly", lambda *_, **__: 0)
    monkeypatch.setattr(quickstart, "rate", lambda count, **_: counts.append(count) or count)
    first = {"workers": workers, "local_steps": local_steps}
    (tmp_path / "foundational.json").write_text(json.dumps(first))
    assert quickstart.fastest(str(tmp_path)) == ((tried, tried) if tried else (1, 1))
    assert counts == ([1, tried] if tried else [])


def test_workers_have_a_process_each_where_several_can_be_started(tmp_path):
    """Whatever the trial has chosen for the other stages; what a user asks for all stages have."""
    quickstart = load_script("quickstart.py")
    (tmp_path / "foundational.json").write_text("{}")
    (tmp_path / "instruction.json").write_text('{"workers": 2, "local_steps": 0}')
    (tmp_path / "lora.json").write_text('{"workers": 8}')

    def counts(processes, for_workers):
        config = quickstart.Settings(str(tmp_path), processes, for_workers=for_workers)
        found = []
        for _, line, _ in quickstart.STAGES:
            words = quickstart.words(line, config)
            if words[0].startswith("run_"):
                found.append(int(words[-1]) if "--processes" in words else 1)
        return found

    #  foundational, its evaluation, instruction, ..., LoRA, ..., GRPO, ...
    assert counts(1, 4) == [1, 1, 2, 1, 4, 1, 1, 1]
    assert counts(4, 4) == [4, 4, 2, 4, 4, 4, 4, 4]
    assert counts(1, 1) == [1] * 8
    assert counts(2, 0) == [2] * 8


def test_more_processes_than_workers_are_refused_before_the_first_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora.json").write_text('{"workers": 2}')
    ended = call("quickstart.py", "--recipe", tmp_path, "--processes", 3)
    assert ended.code == 2
    assert ended.err.startswith(
        f"error: {tmp_path / 'lora.json'}: --workers 2: is fewer than the 3"
    )
    assert not (tmp_path / "models").exists()


def test_a_trial_that_fails_is_no_speed(tmp_path):
    quickstart = load_script("quickstart.py")
    assert quickstart.rate(recipe="nowhere", folder=str(tmp_path), count=1) == 0.0


def test_one_core_is_not_tried(monkeypatch):
    quickstart = load_script("quickstart.py")
    monkeypatch.setattr(quickstart, "cores", lambda: 1)
    monkeypatch.setattr(quickstart, "quietly", None)
    assert quickstart.fastest("r") == (1, 1)


def test_the_quickstart_hands_its_processes_to_training_and_evaluation_alone():
    quickstart = load_script("quickstart.py")
    lines = [line for _, line, _ in quickstart.STAGES]
    for count, added in ((1, []), (3, ["--processes", "3"])):
        config = quickstart.Settings(recipe="r", processes=count)
        for line in lines:
            trains = line.startswith("run_")
            expected = [*line.format(recipe="r").split(), *(added if trains else [])]
            assert quickstart.words(line, config) == expected
    assert sum(line.startswith("run_") for line in lines) == 8


def test_evaluations_run_on_a_gpu_if_there_is_one(monkeypatch):
    """By themselves they stay on the CPU."""
    quickstart = load_script("quickstart.py")
    config = quickstart.Settings(recipe="r", processes=1)
    for kind, gib, added in (
        ("cpu", 0, []),
        ("cuda", 8, ["--device", "cuda", "--batch-size", "64"]),
        ("cuda", 24, ["--device", "cuda", "--batch-size", "1024"]),
    ):
        card = SimpleNamespace(total_memory=gib * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, card=card: card)
        monkeypatch.setattr(quickstart, "resolve_device", lambda _, kind=kind: torch.device(kind))
        for _, line, results in quickstart.STAGES:
            plain = line.format(recipe="r").split()
            assert quickstart.words(line, config) == [*plain, *(added if results else [])]


def read_in_a_browser(report, table, printed):
    """The report shows the table of the terminal, four models, three pictures, the commands."""
    seen = look_at(report, then="document.title = [...document.images].map(i => i.naturalWidth);")
    assert seen.complaints == []
    assert [int(width) > 500 for width in seen.one("title").text.split(",")] == [True] * 3
    rows = [row.text.split() for row in seen.all("tr")]
    for line in table.splitlines():
        assert "".join(line.split()) in ["".join(row) for row in rows], line
    for name in ("3 foundational model", "4 instruction model", "5 LoRA adapter", "6 GRPO model"):
        assert [e.text for e in seen.all("h3") if e.text.startswith(f"{name}: ")]
        assert [e.text for e in seen.all("li") if e.text.startswith(f"{name}: not there yet, ")]
    commands = "".join(e.text for e in seen.all("pre"))
    for line in printed:
        assert f"python {line}" in commands
    assert len(seen.all("li", "first")) == 12
