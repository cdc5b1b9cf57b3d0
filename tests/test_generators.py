"""The three corpus scripts: documented flags and files, exact counts, and one-line refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import generate_corpus
import generate_foundational_plaintext
import generate_instruction_corpus_mixed
from arithmetic_llm.corpus.files import read_corpus
from arithmetic_llm.runtime import UserError
from arithmetic_llm.task.expression import parse
from arithmetic_llm.task.problem import split_of

ROOT = Path(generate_corpus.__file__).parent


def run(script, *arguments, cwd=None):
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=60, check=False)


# ------------------------------------------------------------------- the documented commands


def test_the_documented_commands_as_they_stand(tmp_path):
    """Numbers scaled down, nothing else."""
    common = "--max-depth 4 --num-range 1 20"
    commands = {
        "data/foundational_corpus.txt": "generate_foundational_plaintext.py --num-samples 1000 "
        f"--invalid-rate 0.05 {common} --output-txt data/foundational_corpus.txt",
        "data/instruction_corpus.txt": "generate_instruction_corpus_mixed.py --num-samples 200 "
        f"--invalid-rate 0 {common} --output-mixed data/instruction_corpus.txt",
        "data/instruction_corpus_test.txt": "generate_corpus.py --instruction-only "
        f"--num-samples 100 --invalid-rate 0 {common} --split test "
        "--output-instruction data/instruction_corpus_test.txt",
    }
    lines = {}
    for path, command in commands.items():
        done = run(*command.split(), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "seed 42" in done.stdout
        lines[path] = len((tmp_path / path).read_text().splitlines())
    assert [*lines.values()] == [2000, 200, 100]
    splits = {
        path: {split_of(r.expression) for r in read_corpus(tmp_path / path)} for path in lines
    }
    assert [*splits.values()] == [{"train"}, {"train"}, {"test"}]


def test_help_is_quick_and_complete():
    for script in ("corpus", "foundational_plaintext", "instruction_corpus_mixed"):
        done = run(f"generate_{script}.py", "--help")
        assert done.returncode == 0
        for flag in ("--num-samples", "--seed", "--split", "--drill-rate", "--config"):
            assert flag in done.stdout
        assert "torch" not in done.stderr


# --------------------------------------------------------------------------- what is in them


def test_each_file_has_exactly_the_samples_asked_for(tmp_path):
    plain, lines = tmp_path / "f.txt", tmp_path / "i.txt"
    generate_corpus.main(
        f"--num-samples 150 --output-foundational {plain} --output-instruction {lines}".split()
    )
    assert len(plain.read_text().splitlines()) == 300
    assert len(lines.read_text().splitlines()) == 150
    assert len([*read_corpus(plain)]) == len([*read_corpus(lines)]) == 150
    for path, drills in ((plain, True), (lines, False)):
        meta = json.loads(Path(f"{path}.meta.json").read_text())
        assert meta["samples"] == 150
        assert meta["by_style"]["invalid"] == 15
        assert ("drill" in meta["by_style"]) == drills


@pytest.mark.parametrize(("more", "count"), [([], 0), (["--drill-rate", "0.5"], 10)])
def test_a_test_file_has_no_drills_unless_asked_for(tmp_path, more, count):
    plain = tmp_path / "f.txt"
    argv = ["--num-samples", "20", "--foundational-only", "--split", "test", *more]
    generate_corpus.main([*argv, "--output-foundational", str(plain)])
    styles = json.loads(Path(f"{plain}.meta.json").read_text())["by_style"]
    assert styles.get("drill", 0) == count


@pytest.mark.parametrize("only", ["foundational", "instruction"])
def test_only_one_of_the_two(tmp_path, only):
    output = f"--output-{only}={tmp_path / only}"
    generate_corpus.main(["--num-samples", "20", f"--{only}-only", output])
    assert {path.name for path in tmp_path.iterdir()} == {only, f"{only}.meta.json"}


def test_a_given_rate_holds_for_both_files(tmp_path):
    plain, lines = tmp_path / "f.txt", tmp_path / "i.txt"
    flags = "--typed-rate 0 --padded-rate 0 --flat-rate 0 --drill-rate 1 --invalid-rate 0"
    outputs = f"--output-foundational {plain} --output-instruction {lines}"
    generate_corpus.main(f"--num-samples 50 {flags} {outputs}".split())
    records = [list(read_corpus(path)) for path in (plain, lines)]
    assert [r.expression for r in records[0]] == [r.expression for r in records[1]]
    assert {parse(record.expression).depth for record in records[0]} == {1}


def test_invalid_rate_is_rounded_to_the_nearest_sample(tmp_path):
    path = tmp_path / "i.txt"
    for rate, expected in ((0, 0), (0.014, 1), (0.016, 2), (0.5, 50), (1, 100)):
        generate_instruction_corpus_mixed.main(
            f"--num-samples 100 --typed-rate 0 --invalid-rate {rate} --output_mixed {path}".split()
        )
        assert sum(record.answer == "ERROR" for record in read_corpus(path)) == expected


def test_files_depend_on_the_seed_and_on_nothing_else(tmp_path):
    files = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        path = tmp_path / name
        generate_foundational_plaintext.main(
            f"--num-samples 100 --seed {seed} --output-txt {path}".split()
        )
        files[name] = path.read_bytes()
    assert files["a"] == files["b"] != files["c"]


def test_depths_from_min_to_max_and_negative_numbers(tmp_path):
    path = tmp_path / "i.txt"
    generate_instruction_corpus_mixed.main(
        "--num-samples 100 --min-depth 2 --max-depth 3 --num-range -30 -10 --invalid-rate 0 "
        f"--output-mixed {path}".split()
    )
    expressions = [parse(record.expression) for record in read_corpus(path)]
    assert {expression.depth for expression in expressions} == {2, 3}
    numbers = {n for expression in expressions for n in expression.postfix if isinstance(n, int)}
    assert (min(numbers), max(numbers)) == (-30, -10)


# -------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("", "--num-samples"),
        ("--num-samples 0", "--num-samples"),
        ("--num-samples ten", "--num-samples"),
        ("--num-samples 5 --max-depth 0", "--max-depth"),
        ("--num-samples 5 --max-depth 1000", "--max-depth"),
        ("--num-samples 5 --min-depth 6", "--min-depth"),
        ("--num-samples 5 --num-range 9 1", "--num-range"),
        ("--num-samples 5 --invalid-rate 1.5", "--invalid-rate"),
        ("--num-samples 5 --invalid-rate nan", "--invalid-rate"),
        ("--num-samples 5 --drill-rate 0.6 --flat-rate 0.6", "rates"),
        ("--num-samples 5 --split tset", "--split"),
        ("--num-samples 5 --no-such-flag", "--no-such-flag"),
        ("--num-samples 5 --foundational-only --instruction-only", "--foundational-only"),
        ("--num-samples 5 --output-foundational x --output-instruction x", "x"),
        (
            "--num-samples 5 --split test --num-range 3 3 --max-depth 1 --instruction-only",
            "depth 1",
        ),
    ],
)
def test_impossible_wishes_are_refused(tmp_path, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=named):
        generate_corpus.main(arguments.split())
    assert [*tmp_path.rglob("*.txt*")] == []


def test_a_directory_for_a_file_is_one_line_and_exit_code_2(tmp_path):
    done = run("generate_foundational_plaintext.py", "--num-samples=5", f"--output-txt={tmp_path}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path}: is a directory; name the corpus file itself\n"


def test_a_config_file_is_read_and_flags_win(tmp_path):
    path, config = tmp_path / "i.txt", tmp_path / "config.json"
    config.write_text(json.dumps({"num_samples": 30, "max_depth": 1, "output_mixed": str(path)}))
    generate_instruction_corpus_mixed.main(["--config", str(config), "--num-samples", "40"])
    records = [*read_corpus(path)]
    assert len(records) == 40
    assert {parse(r.expression).depth for r in records if r.answer != "ERROR"} == {1}
