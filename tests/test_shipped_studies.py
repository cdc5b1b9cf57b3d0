"""Every study that is shipped, in miniature: all kinds of stages and arms, on a tiny recipe.

The stages are real; they run in this process, since starting one takes longer than they do.
"""

import csv
import json

import pytest
from helpers import ROOT, call

from arithmetic_llm.study.kinds import KINDS
from studies import run_here, write_recipe

STEPS = {"max_steps": 2, "eval_every": 2, "eval_samples": 4, "save_every": 2}
GRPO = {"max_steps": 1, "eval_every": 1, "eval_samples": 4, "save_every": 1}
TEST = {"num_samples": 24, "num_range": [1, 9]}
SMALLER = {
    "foundational_corpus": {"num_samples": 200},
    "instruction_corpus": {"num_samples": 100},
    "everything": {"num_samples": 200},
    "depth_1_to_3": {"num_samples": 100},
    "depth_4": {"num_samples": 20, "max_depth": 4},
    "foundational": STEPS,
    "instruction": STEPS,
    "lora": STEPS,
    "grpo": {**GRPO, "batch_size": 2, "max_gen_length": 8, "max_depth": 4},
    "evaluation": {"max_gen_length": 4},
}
TWO_ARMS = {  # where the quick study has more
    "lora_rank": {
        "vary": {
            "lora.lora_rank, lora.lora_alpha": [[1, 2], [32, 64]],
            "lora.lora_target_modules": ["attention,feedforward"],
        }
    },
    "depth_by_range": {"vary": {"test_corpus.num_range": [[1, 20], [1, 999]]}},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the tiny recipe; the studies share their stages in it."""
    folder = tmp_path_factory.mktemp("studies")
    write_recipe(folder / "tiny")
    return folder


def miniature(file, recipe):
    """The quick study with every stage cut down, as the content of a file."""
    study = json.loads(file.read_text())
    quick = study.pop("quick")
    of_its_own = {name for name, settings in study["stages"].items() if "like" in settings}
    joined = {name for name, settings in study["stages"].items() if "join" in settings}
    stages = {name: dict(settings) for name, settings in study["stages"].items()}
    for name in (SMALLER.keys() & (KINDS.keys() | of_its_own)) - joined:
        stages[name] = {**stages.get(name, {}), **SMALLER[name]}
    depth = stages.get("test_corpus", {}).get("max_depth", 4)
    stages["test_corpus"] = {**TEST, "max_depth": depth}
    quick.pop("stages")
    changes = {**quick, **TWO_ARMS.get(file.stem, {}), "base": str(recipe), "stages": stages}
    return {**study, **changes, "name": file.stem}


@pytest.mark.parametrize("file", sorted((ROOT / "studies").glob("*.json")), ids=lambda p: p.stem)
def test_a_shipped_study_in_miniature(file, place, monkeypatch):
    run_here(monkeypatch)
    monkeypatch.chdir(place)
    content = miniature(file, "tiny")
    (place / file.name).write_text(json.dumps(content))
    ended = call("run_study.py", file.name, "--stages-dir", "stages", "--output-dir", "results")
    assert ended.code == 0, ended.err
    results = place / "results" / file.stem
    lines = list(csv.DictReader((results / "results.csv").open()))
    arms = len({line["arm"] for line in lines})
    assert arms > 1
    assert len(lines) == arms * len(content["seeds"]) * len(content["rows"])
    page = (results / "results.md").read_text()
    assert content["question"] in page
    assert page.count("| cannot be told apart |") + page.count("| the same runs |") == (
        (arms - 1) * len(content["rows"])
    )
    assert (results / "grid.png").stat().st_size > 5000
