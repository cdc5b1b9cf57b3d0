"""The documents say what the scripts do."""

import ast
import json
import re
import runpy
import shlex

import pytest
from browser import NAMES
from helpers import ROOT, call, load_script

from arithmetic_llm.cli import parse_many

REFERENCE = runpy.run_path(str(ROOT / "docs" / "flags.py"))
FLAGS = (ROOT / "docs" / "FLAGS.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands():
    """(script, its arguments) of each `python script.py ...` in the README's shell blocks.

    Those that torchrun starts included.
    """
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    by = r"(?:\S*python|torchrun [^\n]*?) "
    for script, rest in re.findall(rf"^{by}(\w+)\.py(.*)$", text, re.MULTILINE):
        yield script, shlex.split(rest.split(">")[0])


def documented(script):
    """The flags that docs/FLAGS.md lists for a script."""
    (section,) = re.findall(rf"^## {script}\.py$(.*?)(?=^## |\Z)", FLAGS, re.DOTALL | re.MULTILINE)
    return set(re.findall(r"^\| `(--[\w-]+)`", section, re.MULTILINE))


def test_flag_reference_is_what_the_configs_say():
    assert REFERENCE["reference"]() == FLAGS, "run: python docs/flags.py"


CONFIG_FLAGS = ["--config", "--model-config"]


@pytest.mark.parametrize("script", REFERENCE["SCRIPTS"])
def test_help_and_flag_reference_agree(script, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        load_script(f"{script}.py").main(["--help"])
    text = re.sub(r"\n {8,}", "  ", capsys.readouterr().out)
    lines = re.findall(r"^  (--[\w-]+|[A-Z]+\b)(.*?) {2,}(.*)$", text, re.MULTILINE)
    shown = {flag: (value, text) for flag, value, text in lines if flag not in CONFIG_FLAGS}
    (section,) = re.findall(rf"^## {script}\.py$(.*?)(?=^## |\Z)", FLAGS, re.DOTALL | re.MULTILINE)
    rows = re.findall(r"^\| `(--[\w-]+|[A-Z]+)` \| (.*?) \| (.*) \|$", section, re.MULTILINE)
    assert [*shown] == [flag for flag, _, _ in rows]
    for flag, default, text in rows:
        value, help_text = shown[flag]
        for choices in re.findall(r"{(.*)}", value):
            text = text.replace(f" ({choices.replace(',', ', ')})", "")
        label = "" if default.startswith("required") else "default: "
        ending = f" ({label}{default.strip('`')})" if default else ""
        assert text.replace("\\|", "|") + ending == help_text, flag


def test_what_the_corpus_script_says_of_its_defaults_is_what_each_corpus_gets(tmp_path):
    (section,) = re.findall(
        r"^## generate_corpus\.py$(.*?)(?=^## )", FLAGS, re.DOTALL | re.MULTILINE
    )
    said = dict(re.findall(r"^\| `--(\w+)-rate` \| (.*?) \|", section, re.MULTILINE))
    outputs = ["--output-foundational", tmp_path / "f", "--output-instruction", tmp_path / "i"]
    argv = ["--num-samples", 1000, "--max-depth", 2, "--invalid-rate", 0, *outputs]
    assert call("generate_corpus.py", *argv).code == 0
    for place, name in ((0, "i"), (-1, "f")):
        styles = json.loads((tmp_path / f"{name}.meta.json").read_text())["by_style"]
        for style in ("typed", "padded", "flat", "drill"):
            rate = re.findall(r"[\d.]*\d", said[style])[place]
            assert styles.get(style, 0) == 1000 * float(rate)


def test_every_root_script_is_in_the_reference_and_in_the_readme():
    for script in ROOT.glob("*.py"):
        assert f"## {script.name}\n" in FLAGS
        assert f"`{script.name}`" in README


def accept(script, argv):
    """Have a script's configs read its arguments, as its ``main`` does first."""
    sections = dict(zip(("config", "model_config"), REFERENCE["SCRIPTS"][script], strict=False))
    parse_many(sections, argv, "")


@pytest.mark.parametrize(("script", "argv"), list(commands()))
def test_readme_commands_are_accepted(script, argv):
    accept(script, argv)


RECIPES = [f"configs/{path.parent.name}" for path in (ROOT / "configs").glob("*/model.json")]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_commands_of_the_quickstart_are_accepted_without_a_word(recipe, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    quickstart = load_script("quickstart.py")
    config = quickstart.Settings(recipe=recipe, processes=2)
    for _, command, _ in quickstart.STAGES:
        script, *argv = quickstart.words(command, config)
        accept(script.removesuffix(".py"), argv)
    assert capsys.readouterr().err == ""


STAGE_OF = {  # of a config, by its name
    "foundational_corpus": "generate_foundational_plaintext",
    "instruction_corpus": "generate_instruction_corpus_mixed",
    "test_corpus": "generate_corpus",
    "tokenizer": "train_tokenizer",
    "model": "run_foundational_training",
    "foundational": "run_foundational_training",
    "instruction": "run_instruction_training",
    "lora": "run_instruction_training_lora",
    "grpo": "run_grpo_training",
}


@pytest.mark.parametrize("path", [*(ROOT / "configs").glob("*/*.json")], ids=str)
def test_the_keys_of_shipped_configs_are_flags_of_their_stage(path):
    keys = json.loads(path.read_text(encoding="utf-8"))
    flags = {"--" + key.replace("_", "-") for key in keys}
    assert flags <= documented(STAGE_OF[path.stem])


def torn_tables(text):
    """The rows that stand apart from a table: after a blank line, with no line of dashes next."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for block in re.split(r"\n\s*\n", text):
        rows = [line for line in block.split("\n") if line.startswith("|")]
        if rows and (len(rows) < 2 or not re.fullmatch(r"\|([ :]*-+[ :]*\|)+", rows[1])):
            yield rows[0]


@pytest.mark.parametrize(
    "path",
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("studies/*.md")],
    ids=lambda p: p.name,
)
def test_no_table_is_torn_by_a_blank_line(path):
    assert not [*torn_tables(path.read_text(encoding="utf-8"))]


def test_a_torn_table_would_be_noticed():
    table = "| a | b |\n|---|:-:|\n| 1 | 2 |"
    assert not [*torn_tables(f"text\n\n{table}\n\nmore\n\n{table}\n")]
    assert [*torn_tables(f"{table}\n\n| 3 | 4 |\n| 5 | 6 |\n")] == ["| 3 | 4 |"]
    assert not [*torn_tables("```\n| 3 | 4 |\n```\n")]


def test_readme_shows_every_numbered_stage():
    assert {script for script, _ in commands()} >= {
        "generate_foundational_plaintext",
        "train_tokenizer",
        "run_foundational_training",
        "run_instruction_training",
        "run_instruction_training_lora",
        "run_grpo_training",
        "run_evaluation",
        "run_interactive",
    }


def test_ci_looks_for_the_same_browsers_and_installs_one():
    script = (ROOT / ".ci" / "run").read_text()
    (listed,) = re.findall(r'^browsers="([^"]*)"', script, re.MULTILINE)
    assert tuple(listed.split()) == NAMES
    assert "apt-get install" in script
    assert 'export CI="${CI:-true}"' in script


# ----------------------------------------------------------------------- flags that messages name


TRAINING = (
    "run_foundational_training",
    "run_instruction_training",
    "run_instruction_training_lora",
)
TRAINING = (*TRAINING, "run_grpo_training")
LOADING = (*TRAINING, "run_evaluation", "run_interactive")
GENERATING = [script for script in REFERENCE["SCRIPTS"] if script.startswith("generate")]
# Where the texts of a module are read, and what they name of another script, in so many words.
READ_BY = {
    "cli": (TRAINING, {}),
    "runtime": (LOADING, {}),
    "distributed": ((*TRAINING, "run_evaluation"), {"--resume": "run_foundational_training"}),
    "folders": (TRAINING, {}),
    "corpus/draw": (LOADING[:-1], {"--num-range": "generate_corpus"}),
    "corpus/files": (GENERATING, {}),
    "model/checkpoint": (LOADING, {}),
    "model/load": (LOADING, {"--base-checkpoint": "merge_lora_adapter"}),
    "model/lora": (TRAINING[2:], {}),
    "model/tokenizer": (("train_tokenizer",), {}),
    "training/workers": (TRAINING[:3], {"--processes": "run_foundational_training"}),
    "training/loop": (TRAINING, {}),
    "training/run": (TRAINING, {}),
    "training/start": (TRAINING, {"--split": "generate_corpus"}),
    "training/supervised": (TRAINING[:3], {}),
    "evaluation/evaluate": (("run_evaluation", "run_grpo_training"), {}),
    "evaluation/length": (("run_evaluation", "run_grpo_training"), {}),
    "evaluation/report": (("run_evaluation",), {}),
    "evaluation/trace": (("show_trace",), {}),
    "grpo/checks": (("run_grpo_training",), {}),
    "grpo/monitor": (("run_grpo_training",), {}),
    "grpo/rewards": (("run_grpo_training",), {}),
    "study/kinds": (("generate_corpus",), {}),
    "study/runner": (TRAINING, {}),
    "study/study": (("run_study",), {}),
}


def texts_of(path):
    """The strings of a module that are no docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docs = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


def named(path):
    return {flag for text in texts_of(path) for flag in re.findall(r"--[a-z][a-z-]*[a-z]", text)}


PACKAGE = ROOT / "arithmetic_llm"
MODULES = sorted(PACKAGE.rglob("*.py"))
COMMON = {"--help", *CONFIG_FLAGS}


def name_of(path):
    """``grpo/monitor``."""
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


@pytest.mark.parametrize("path", [p for p in MODULES if p.stem != "config"], ids=name_of)
def test_the_messages_of_a_module_name_flags_that_its_readers_have(path):
    if flags := named(path) - COMMON:
        scripts, elsewhere = READ_BY[name_of(path)]
        for flag in flags - elsewhere.keys():
            assert {script for script in scripts if flag not in documented(script)} == set(), flag
        for flag, script in elsewhere.items():
            assert flag in documented(script)


def test_every_flag_that_is_named_anywhere_is_a_flag_of_some_script():
    known = {flag for script in REFERENCE["SCRIPTS"] for flag in documented(script)} | COMMON
    for path in [*MODULES, *ROOT.glob("*.py")]:
        assert named(path) <= known, path
