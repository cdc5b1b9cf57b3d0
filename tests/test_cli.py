"""Flags, JSON and defaults are one thing; every refusal is one line."""

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
from helpers import ROOT, call, command, load_script

from arithmetic_llm.cli import build, opt, parse, parse_many, parse_run, run_main, to_json
from arithmetic_llm.config import FoundationalConfig, InstructionConfig, ModelConfig
from arithmetic_llm.runtime import UserError

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))


@dataclass(frozen=True)
class Recipe:
    """A recipe."""

    max_len: int = opt(5, "a length", at_least=1, at_most=100)
    rate: float = opt(0.5, "100 % of a rate", above=0.0)
    num_range: tuple[int, int] = opt((1, 20), "two numbers")
    limit: int | None = opt(None, "a limit")
    kind: str = opt("a", "a kind", choices=("a", "b"))
    shuffle: bool = opt(False, "whether")


@dataclass(frozen=True)
class Needy:
    """A needy one."""

    path: str = opt("", "a path", required=True)


def read(*argv, config=Recipe):
    return parse(config, [str(word) for word in argv], "")


def refusal(*argv, config=Recipe):
    with pytest.raises(UserError) as caught:
        read(*argv, config=config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def json_file(tmp_path, **values):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    return path


# -------------------------------------------------------------------------------- precedence


def test_command_line_before_json_before_default(tmp_path):
    path = json_file(tmp_path, max_len=7, rate=0.25)
    assert read() == Recipe()
    assert read("--config", path) == Recipe(max_len=7, rate=0.25)
    assert read("--max-len", 9, "--config", path) == Recipe(max_len=9, rate=0.25)


def test_a_flag_with_the_default_value_still_beats_the_json(tmp_path):
    path = json_file(tmp_path, max_len=7, shuffle=True)
    assert read("--config", path, "--max-len", 5, "--no-shuffle") == Recipe()


def test_each_section_has_its_own_json(tmp_path):
    path = json_file(tmp_path, d_model=64, nhead=4)
    sections = {"config": Recipe, "model_config": ModelConfig}
    recipe, shape = parse_many(sections, ["--model-config", str(path), "--nhead", "2"], "")
    assert recipe == Recipe()
    assert (shape.d_model, shape.nhead) == (64, 2)


def test_a_required_value_may_come_from_either_side(tmp_path):
    assert read("--path", "x", config=Needy).path == "x"
    assert read("--config", json_file(tmp_path, path="y"), config=Needy).path == "y"
    assert "--path is required" in refusal(config=Needy)


# ------------------------------------------------------------------------------------ spelling


def test_dashes_and_underscores_are_alike():
    assert read("--max_len=3", "--num_range", -5, 7) == read("--max-len", 3, "--num-range", -5, 7)


def test_the_values_of_flags_keep_their_underscores():
    assert read("--path=a_b", config=Needy).path == "a_b"
    assert read("--path", "a_b", config=Needy).path == "a_b"


def test_an_unknown_flag_suggests_the_nearest():
    assert "did you mean --max-len" in refusal("--max-lne", 3)
    assert "--max" in refusal("--max", 3)  # no silent abbreviations


def test_an_unknown_key_suggests_the_nearest(tmp_path):
    text = refusal("--config", json_file(tmp_path, num_rnage=[1, 2]))
    assert "unknown config key 'num_rnage'; did you mean num_range?" in text


# --------------------------------------------------------------------------------------- types


def test_json_values_get_the_type_of_the_field(tmp_path):
    path = json_file(tmp_path, max_len=7.0, rate=1, num_range=[3, 4], limit=None)
    recipe = read("--config", path)
    assert recipe == Recipe(max_len=7, rate=1.0, num_range=(3, 4))
    assert [type(v) for v in (recipe.max_len, recipe.rate, recipe.num_range)] == [int, float, tuple]


@pytest.mark.parametrize(
    "values",
    [
        {"max_len": "7"},
        {"max_len": 7.5},
        {"max_len": True},
        {"max_len": None},
        {"max_len": 0},
        {"max_len": 101},
        {"rate": 0.0},
        {"rate": float("nan")},
        {"rate": [0.1]},
        {"num_range": [1]},
        {"num_range": [1, 2, 3]},
        {"num_range": [1, "2"]},
        {"num_range": 5},
        {"kind": "c"},
        {"shuffle": 1},
    ],
)
def test_a_json_value_that_does_not_fit_is_refused_by_name(tmp_path, values):
    (key,) = values
    assert key.replace("_", "-") in refusal("--config", json_file(tmp_path, **values)).replace(
        "_", "-"
    )


@pytest.mark.parametrize(
    "argv",
    [
        ["--max-len", "seven"],
        ["--max-len", "0"],
        ["--max-len"],
        ["--rate", "nan"],
        ["--rate", "inf"],
        ["--num-range", "1"],
        ["--kind", "c"],
        ["surplus"],
    ],
)
def test_a_flag_value_that_does_not_fit_is_refused(argv):
    refusal(*argv)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"5", b"\xff\xfe", b'{"max_len": 1, }', b"[" * 100_000, b'{"a": 1}}'],
)
def test_a_malformed_json_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    assert str(path) in refusal("--config", path)


# ---------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize(
    "config",
    [
        Recipe(num_range=(-3, 4), limit=9, shuffle=True),
        FoundationalConfig(tokenizer_path="t", corpus_path="c", learning_rate=3e-3, seed=7),
        InstructionConfig(
            tokenizer_path="t", instruction_corpus_path="c", foundational_checkpoint="f"
        ),
        ModelConfig(d_model=96, nhead=4, tie_embeddings=True),
    ],
    ids=lambda config: type(config).__name__,
)
def test_a_written_config_reads_back_equal(tmp_path, config):
    path = tmp_path / "training_config.json"
    path.write_text(to_json(config))
    assert read("--config", path, config=type(config)) == config


def test_every_field_can_be_set_by_its_flag():
    """Each documented default is what the flag gives, typed as the field says."""
    for field in dataclasses.fields(ModelConfig):
        if field.type != "bool":
            flag = "--" + field.name.replace("_", "-")
            assert read(flag, field.default, config=ModelConfig) == ModelConfig()
    assert build(ModelConfig, {}, {}) == ModelConfig()


# ------------------------------------------------------------------------------------- resuming


@pytest.fixture
def run_folder(tmp_path):
    (tmp_path / "training_config.json").write_text(to_json(Recipe2(max_len=7)))
    (tmp_path / "model_config.json").write_text(to_json(ModelConfig(d_model=64)))
    return tmp_path


@dataclass(frozen=True)
class Recipe2(Recipe):
    """A recipe that can be resumed."""

    resume: str = opt("", "a run folder")


SECTIONS = {"config": Recipe2, "model_config": ModelConfig}


def test_resume_brings_the_settings_of_the_run(run_folder):
    recipe, shape = parse_run(SECTIONS, ["--resume", str(run_folder), "--max-len", "7"], "")
    assert recipe == Recipe2(max_len=7, resume=str(run_folder))
    assert shape == ModelConfig(d_model=64)


@pytest.mark.parametrize(
    "argv", [["--max-len", "8"], ["--d-model", "32"], ["--config", "other.json"]]
)
def test_a_resumed_run_takes_no_other_settings(run_folder, argv):
    with pytest.raises(UserError, match=argv[0]):
        parse_run(SECTIONS, ["--resume", str(run_folder), *argv], "")


def test_without_resume_a_run_is_parsed_as_ever():
    assert parse_run(SECTIONS, ["--max-len", "8"], "")[0] == Recipe2(max_len=8)


# ------------------------------------------------------------------------------- ends of scripts


def ending(raised, capsys):
    def main(argv):
        raise raised

    with pytest.raises(SystemExit) as end:
        run_main(main)
    return end.value.code, capsys.readouterr().err


def test_user_errors_are_one_line_and_code_2(capsys):
    assert ending(UserError("a\nb"), capsys) == (2, "error: a b\n")
    assert ending(FileNotFoundError(2, "No such file", "x"), capsys) == (
        2,
        "error: x: No such file\n",
    )
    assert ending(MemoryError(), capsys)[0] == 2
    code, text = ending(RuntimeError("CUDA out of memory. Tried to\nallocate"), capsys)
    assert (code, text.count("\n")) == (2, 1)


def test_an_interrupt_is_code_130(capsys):
    assert ending(KeyboardInterrupt(), capsys) == (130, "interrupted\n")


def test_a_defect_of_ours_keeps_its_traceback():
    def main(argv):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_main(main)


# As a user's shell has it: short output waits in a buffer until the end.
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
PRINTS = """
from arithmetic_llm.cli import run_main
def main(argv):
    print("x" * {size})
run_main(main)
"""


@pytest.mark.parametrize("size", [10, 100_000], ids=["less than a buffer", "more than a buffer"])
def test_a_reader_that_leaves_early_is_no_error(size):
    """As in ``print_token_table.py ... | head -1``."""
    script = PRINTS.format(size=size)
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=BUFFERED,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 0)
    process.stderr.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full is Linux's")
@pytest.mark.parametrize("size", [10, 100_000])
def test_a_full_disk_behind_standard_output_is_one_line(size):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PRINTS.format(size=size)],
            cwd=ROOT,
            env=BUFFERED,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")


# ----------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_at_once_and_without_torch(script):
    """Measured in the process's own CPU seconds, which a busy machine does not stretch."""
    watched = f"""
import runpy, sys, time
sys.argv = [{script!r}, "--help"]
try:
    runpy.run_path({str(ROOT / script)!r}, run_name="__main__")
finally:
    heavy = {{"torch", "numpy", "tokenizers", "transformers"}} & sys.modules.keys()
    assert not heavy, heavy
    assert time.process_time() < 0.5
"""
    done = subprocess.run([sys.executable, "-c", watched], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage:" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_main_takes_a_list_and_refuses_unknown_flags(script):
    ended = call(script, "--no-such-flag")
    assert ended.code == 2
    assert ended.err.startswith("error: unknown argument --no-such-flag")
    assert ended.err.count("\n") == 1


def test_a_script_run_by_its_path_finds_the_package_from_anywhere(tmp_path):
    done = subprocess.run(command("train_tokenizer.py"), cwd=tmp_path, capture_output=True)
    assert done.stderr == b"error: --corpus-path is required; see --help\n"


def test_importing_a_script_runs_nothing(capsys):
    for script in SCRIPTS:
        assert callable(load_script(script).main)
    assert capsys.readouterr().out == ""
