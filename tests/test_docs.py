"""The documents say what the scripts do."""

import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (ROOT / "docs" / "FLAGS.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands():
    """(script, flags) of each `python script.py ...` in the README's shell blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    for script, rest in re.findall(r"^\S*python (\w+)\.py(.*)$", text, re.MULTILINE):
        yield script, re.findall(r"--[\w-]+", rest)


def documented(script):
    """The flags that docs/FLAGS.md lists for a script."""
    (section,) = re.findall(rf"^## {script}\.py$(.*?)(?=^## |\Z)", FLAGS, re.DOTALL | re.MULTILINE)
    return set(re.findall(r"^\| `(--[\w-]+)`", section, re.MULTILINE))


def test_flag_reference_is_what_the_configs_say():
    reference = runpy.run_path(str(ROOT / "docs" / "flags.py"))["reference"]
    assert reference() == FLAGS, "run: python docs/flags.py"


def test_every_root_script_is_in_the_reference_and_in_the_readme():
    for script in ROOT.glob("*.py"):
        assert f"## {script.name}\n" in FLAGS
        assert f"`{script.name}`" in README


@pytest.mark.parametrize(("script", "flags"), list(commands()))
def test_readme_commands_use_flags_that_exist(script, flags):
    assert set(flags) <= documented(script)


def test_the_commands_of_the_study_of_grpo_use_flags_that_exist():
    study = runpy.run_path(str(ROOT / "benchmarks" / "what_grpo_adds.py"))
    preparation = [command for _, command in study["CORPORA"] + study["START_MODELS"]]
    arms = [f"run_grpo_training.py {flags}" for flags in study["ARMS"].values()]
    for command in preparation + arms:
        flags = {*re.findall(r"--[\w-]+", command)} - {"--config", "--model-config"}
        assert flags <= documented(command.split(".py")[0])


STAGE_OF = {  # of a config, by its name
    "foundational_corpus": "generate_foundational_plaintext",
    "instruction_corpus": "generate_instruction_corpus_mixed",
    "test_corpus": "generate_corpus",
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
    "path", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], ids=lambda p: p.name
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
