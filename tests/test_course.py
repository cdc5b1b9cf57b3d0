"""The course's commands, evening by evening, in miniature and in this process."""

import io
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from helpers import ROOT, call, load_script, recipe

COURSE = (ROOT / "docs" / "COURSE.md").read_text(encoding="utf-8")
EVENINGS = re.findall(r"^## Evening \d: .*?(?=^## |\Z)", COURSE, re.DOTALL | re.MULTILINE)
SMALL = {  # in place of what the course says
    "--num-samples": "60",
    "--min-depth": "1",
    "--max-depth": "2",
    "--flat-terms": "3",
    "--max-steps": "2",
}
MORE = {  # and beyond it
    "run_instruction_training_lora.py": ["--eval-samples", 5],
    "run_grpo_training.py": ["--eval-samples", 5, "--max-gen-length", 8],
    "run_evaluation.py": ["--max-gen-length", 8],
    "show_trace.py": ["--max-gen-length", 8],
}


def commands_of(text):
    """The commands of a text's shell blocks, each as its words."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    return [shlex.split(line) for line in blocks.splitlines() if line]


def in_miniature(script, argv):
    """The arguments with small numbers; the configs are those of a small recipe."""
    words = [SMALL.get(flag, word) for flag, word in zip([script, *argv], argv, strict=False)]
    words = [word.replace("configs/cpu", "recipe") for word in words]
    return [*words, *MORE.get(script, [])]


def paste(line, monkeypatch):
    """Run a command of the course."""
    program, script, *argv = line
    if program == "make":
        assert [script, *argv] == ["quickstart"]
        return quickstart(monkeypatch)
    assert program == "python"
    argv, target = (argv[:-2], argv[-1]) if ">" in argv else (argv, None)
    monkeypatch.setattr(sys, "stdin", io.StringIO("1 + 2\nexit\n"))
    ended = call(script, *in_miniature(script, argv))
    assert ended.code == 0, (line, ended.err)
    if target:
        Path(target).write_text(ended.out)


def quickstart(monkeypatch):
    """All stages of it in this process, on the small recipe."""
    script = load_script("quickstart.py")

    def run(name, arguments):
        ended = call(arguments[0], *arguments[1:], *MORE.get(arguments[0], []))
        assert ended.code == 0, (name, ended.err)
        return 1.0

    monkeypatch.setattr(script, "run", run)
    script.main(["--recipe", "recipe", "--processes", "1"])


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder to work in, with a small recipe."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe").mkdir()
    recipe(tmp_path / "recipe")
    return tmp_path


def test_there_are_five_evenings_and_each_has_commands_and_questions():
    assert [evening[:13] for evening in EVENINGS] == [f"## Evening {n}:" for n in range(1, 6)]
    for evening in EVENINGS:
        assert commands_of(evening)
        assert "Questions" in evening


def test_the_first_four_evenings(desk, monkeypatch):
    for evening in EVENINGS[:4]:
        for line in commands_of(evening):
            paste(line, monkeypatch)
        made = [
            p for p in re.findall(r"(?:course|evaluation_results)/[\w./]+", evening) if "." in p
        ]
        assert [path for path in made if "YYYYMMDD" not in path and not Path(path).is_file()] == []
    header, first, *_ = (desk / "course" / "tokens.csv").read_text().splitlines()
    assert (header, first) == ("id,token,kind,count", "0,<pad>,special,0")
    assert (desk / "course" / "ways.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(
    not (ROOT / "run_study.py").exists(), reason="run_study.py is not in this checkout yet"
)
def test_the_last_evening(desk, monkeypatch):
    """What is shipped is a miniature of its own test; here it is only planned."""
    from studies import run_here

    run_here(monkeypatch)
    shutil.copytree(ROOT / "studies", desk / "studies")
    shutil.copytree(ROOT / "configs", desk / "configs")
    (study,) = re.findall(r"```json\n(.*?)```", EVENINGS[4], re.DOTALL)
    sizes = {'"max_depth": 3': '"max_depth": 2', "depth 3": "depth 2", "1000": "3", "200": "2"}
    sizes |= {"600": "30", '"{foundational}"': '"{foundational}", "max_gen_length": 8'}
    for course, small in sizes.items():
        assert course in study
        study = study.replace(course, small)
    (desk / "course").mkdir()
    (desk / "course" / "my_study.json").write_text(study)
    for program, script, file, *flags in commands_of(EVENINGS[4]):
        assert (program, script) == ("python", "run_study.py")
        own = ["--base", "recipe"] if file == "course/my_study.json" else ["--dry-run"]
        ended = call(script, file, *dict.fromkeys([*flags, *own]))
        assert ended.code == 0, ended.err
    for name in ("my_study", "my_study_quick"):
        results = desk / "results" / "studies" / name
        assert {"results.md", "results.csv", "results.png"} <= {p.name for p in results.iterdir()}
