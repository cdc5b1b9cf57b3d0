"""Flags, JSON and defaults are one thing; every refusal is one line."""

import contextlib
import copy
import dataclasses
import io
import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass

import pytest
from helpers import ROOT, call, command, load_script

from arithmetic_llm.cli import (
    Above,
    Below,
    build,
    flag_of,
    opt,
    parse,
    parse_many,
    read_json,
    run_main,
    to_json,
)
from arithmetic_llm.config import (
    FoundationalConfig,
    InstructionConfig,
    LoRAInstructionConfig,
    ModelConfig,
)
from arithmetic_llm.folders import parse_run
from arithmetic_llm.model.lora import add_lora
from arithmetic_llm.runtime import UserError
from arithmetic_llm.training.optim import build_optimizer

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


@dataclass(frozen=True)
class Placed:
    """One with values that are told by their place."""

    size: int = opt(3, "a size")
    limits: tuple[int, ...] = opt((), "limits, 100 % of them", positional="LIMIT", required=True)


@dataclass(frozen=True)
class PlacedOnce:
    """One with a value that is told by its place."""

    path: str = opt("here", "a path", positional="PATH")


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


# ----------------------------------------------------------------------- values by their place


@pytest.mark.parametrize(
    "argv", [[1, 2, "--size", 5], ["--size", 5, 1, 2], [1, "--size", 5, 2], ["--size=5", 1, 2]]
)
def test_values_by_their_place_stand_anywhere_among_the_flags(argv):
    assert read(*argv, config=Placed) == Placed(5, (1, 2))


def test_values_by_their_place_may_come_from_json_and_read_back(tmp_path):
    path = json_file(tmp_path, limits=[1, 2, 3])
    assert read("--config", path, config=Placed) == Placed(limits=(1, 2, 3))
    assert read("--config", path, 9, config=Placed).limits == (9,)
    path.write_text(to_json(Placed(limits=(7,))))
    assert read("--config", path, config=Placed) == Placed(limits=(7,))


def test_one_value_by_its_place():
    assert read("there", config=PlacedOnce).path == "there"
    assert read(config=PlacedOnce).path == "here"
    assert "unknown argument x" in refusal("there", "x", config=PlacedOnce)


def test_what_is_wrong_with_values_by_their_place_is_one_line(tmp_path):
    assert refusal(config=Placed) == "LIMIT is required; see --help"
    assert "LIMIT" in refusal("x", config=Placed)
    for wrong in (5, "5", ["5"], [1.5], None):
        assert "limits" in refusal("--config", json_file(tmp_path, limits=wrong), config=Placed)
    assert "LIMIT is required" in refusal("--config", json_file(tmp_path, limits=[]), config=Placed)


def test_help_shows_values_by_their_place(capsys):
    with pytest.raises(SystemExit):
        read("--help", config=Placed)
    text = " ".join(capsys.readouterr().out.split())
    assert "[LIMIT ...]" in text
    assert "LIMIT limits, 100 % of them (required)" in text
    assert "--limits" not in text


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
    [
        *(b"", b"{", b"[1]", b"5", b"\xff\xfe", b'{"max_len": 1, }', b"[" * 100_000, b'{"a": 1}}'),
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_malformed_json_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    assert str(path) in refusal("--config", path)


def test_the_mark_that_some_editors_begin_a_file_with_is_no_mistake(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"limit": 9}')
    assert read_json(path) == {"limit": 9}


def test_a_package_that_is_missing_is_a_line(tmp_path):
    (tmp_path / "torch.py").write_text("import not_installed")
    words = command("run_foundational_training.py", "--corpus-path", "x", "--tokenizer-path", "y")
    ended = subprocess.run(
        words, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: not_installed is not installed for {sys.executable};")
    assert ended.stderr.count("\n") == 1


def test_a_path_that_the_output_cannot_show_ends_nothing(tmp_path):
    argv = ["--instruction-only", "--num-samples", 3, "--output-instruction", "数据/i.jsonl"]
    ended = subprocess.run(
        command("generate_corpus.py", *argv),
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert r"\u6570\u636e" in ended.stdout
    assert (tmp_path / "数据" / "i.jsonl").is_file()


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


# ------------------------------------------------------------- settings that can have no effect


@dataclass(frozen=True)
class Choosy:
    """A choosy one."""

    steps: int = opt(0, "a limit", at_least=0)
    epochs: int = opt(3, "passes", at_least=1, needs=[{"steps": 0}])
    rank: int = opt(0, "a rank", at_least=0)
    alpha: float = opt(2.0, "a scale", needs=[{"rank": Above(0)}])
    kind: str = opt("a", "a kind", choices=("a", "b", "c"))
    file: str = opt("", "a file")
    seed: int = opt(1, "a seed", needs=[{"file": ""}, {"kind": ("b", "c"), "rank": Above(1)}])
    merge: bool = opt(False, "whether", needs=[{"rank": Above(0), "elsewhere": "x"}])
    range: tuple[int, int] = opt((1, 2), "a range", needs=[{"file": ""}])
    old: float = opt(1.0, "a thing of the past", never="nothing uses it")
    name: str = opt("", "a name", required=True, needs=[{"file": ""}])


def choosy(*argv):
    return read("--name", "n", *argv, config=Choosy)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--epochs", 3, "--steps", 9],
            "--epochs 3 has no effect while steps is 9 (from the command line); "
            "leave it out, or set --steps 0",
        ),
        (
            ["--alpha", 1],
            "--alpha 1.0 has no effect while rank is 0 (the default); "
            "leave it out, or set --rank above 0",
        ),
        (
            ["--seed", 5],
            "--seed 5 has no effect while kind is a (the default) and rank is 0 (the default); "
            "leave it out, or set --kind b or c or set --rank above 1",
        ),
        (
            ["--range", 3, 4, "--file", "f"],
            "--range 3 4 has no effect while file is f (from the command line); "
            "leave it out, or leave --file out",
        ),
        (["--no-old"], "unknown argument --no-old; did you mean --old?"),
        (["--old", 2], "--old 2.0 has no effect here, because nothing uses it; leave it out"),
    ],
)
def test_a_void_flag_is_refused_with_what_makes_it_void_and_the_remedy(argv, message):
    if "--file" in argv:
        assert refusal(*argv, config=Choosy) == message
    else:
        assert refusal("--name", "n", *argv, config=Choosy) == message


def test_the_same_flags_are_taken_where_their_needs_are_met():
    assert choosy("--epochs", 4, "--alpha", 1, "--rank", 1) == Choosy(
        epochs=4, alpha=1.0, rank=1, name="n"
    )
    assert choosy("--kind", "c", "--seed", 5).seed == 5
    assert choosy("--rank", 2, "--seed", 5).seed == 5
    assert choosy("--merge").merge  # its needs name a setting that this script does not have


def test_what_is_required_is_so_only_where_it_has_an_effect():
    assert read("--file", "f", config=Choosy).name == ""
    assert refusal(config=Choosy) == "--name is required without --file; see --help"


def test_a_void_value_of_a_file_is_refused_if_its_own_file_makes_it_void(tmp_path):
    path = json_file(tmp_path, epochs=4, steps=9, name="n")
    assert refusal("--config", path, config=Choosy) == (
        f"epochs 4 (from {path}) has no effect while steps is 9 (from {path}); "
        "leave it out, or set --steps 0"
    )
    path = json_file(tmp_path, alpha=4, name="n")
    assert f"alpha 4.0 (from {path}) has no effect while rank is 0 (the default)" in refusal(
        "--config", path, config=Choosy
    )


def test_a_void_value_of_a_file_that_is_the_default_is_no_matter(tmp_path, capsys):
    path = json_file(tmp_path, epochs=3, steps=9, old=1, name="n")
    assert read("--config", path, config=Choosy) == Choosy(steps=9, name="n")
    assert capsys.readouterr().err == ""


def test_a_flag_names_the_file_that_makes_it_void(tmp_path):
    path = json_file(tmp_path, steps=9, name="n")
    text = refusal("--config", path, "--epochs", 4, config=Choosy)
    assert text.startswith(f"--epochs 4 has no effect while steps is 9 (from {path}); ")
    assert read("--config", path, "--steps", 0, "--epochs", 4, config=Choosy).epochs == 4


def test_a_files_value_gives_way_to_the_command_line_and_a_note_says_so(tmp_path, capsys):
    path = json_file(tmp_path, epochs=4, range=[3, 4], name="n")
    config = read("--config", path, "--steps", 9, config=Choosy)
    assert config == Choosy(steps=9, range=(3, 4), name="n")
    assert capsys.readouterr().err == (
        "note: no effect while steps is 9 (from the command line), so left at the default: "
        f"epochs 4 (from {path})\n"
    )
    assert read("--config", path, "--file", "f", config=Choosy) == Choosy(epochs=4, file="f")
    assert f"range 3 4 (from {path}), name n (from {path})\n" in capsys.readouterr().err


def test_what_a_run_has_saved_starts_a_run_whatever_is_void_in_it(tmp_path, capsys):
    """Runs of earlier versions saved what was void; it did nothing there."""
    (tmp_path / "run.json").write_text("{}")
    path = json_file(tmp_path, epochs=4, steps=9, old=3, name="n")
    sections, from_file = {"config": Choosy2}, ["--config", str(path)]
    assert parse_run(sections, from_file, "") == (Choosy2(steps=9, name="n"),)
    assert capsys.readouterr().err.count("note: no effect") == 2
    with pytest.raises(UserError, match="--epochs 4 has no effect"):
        parse_run(sections, [*from_file, "--epochs", "4"], "")


def test_a_resumed_run_keeps_what_it_saved_void_or_not(tmp_path):
    saved = Choosy2(epochs=4, steps=9, name="n")
    (tmp_path / "training_config.json").write_text(to_json(saved))
    (config,) = parse_run({"config": Choosy2}, ["--resume", str(tmp_path)], "")
    assert config == dataclasses.replace(saved, resume=str(tmp_path))


@dataclass(frozen=True)
class Choosy2(Choosy):
    """A choosy one that can be resumed."""

    resume: str = opt("", "a run folder")


# ---- and every such declaration of the product, through the real scripts


REFERENCE = runpy.run_path(str(ROOT / "docs" / "flags.py"))
CONFIGS = REFERENCE["SCRIPTS"]


def fields_of(script):
    return {field.name: field for cls in CONFIGS[script] for field in dataclasses.fields(cls)}


def failing(field, wanted):
    """A value of a field other than a need wants it to be; None if there is none."""
    if isinstance(wanted, Above):
        return wanted.bound if field.metadata.get("at_least", 0) <= wanted.bound else None
    if isinstance(wanted, Below):
        return wanted.bound
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    others = [choice for choice in field.metadata.get("choices", ()) if choice not in wanted]
    return others[0] if others else {int: 1, str: "x", bool: True}[type(wanted[0])]


def meeting(clause):
    """The first of a clause's alternatives as a setting."""
    name, wanted = next(iter(clause.items()))
    if isinstance(wanted, Above):
        return name, wanted.bound + 1
    if isinstance(wanted, Below):
        return name, wanted.bound / 2
    return name, wanted[0] if isinstance(wanted, tuple) else wanted


def given(settings, fields):
    """Settings as flags; those at their defaults are left out."""
    words = []
    for name, value in settings.items():
        if value != fields[name].default:
            words += [flag_of(name)] if value is True else [flag_of(name), str(value)]
    return words


def another(field):
    """A value of a field that is not its default."""
    value = field.default
    if isinstance(value, bool):
        return not value
    if choices := field.metadata.get("choices"):
        return next(choice for choice in choices if choice != value)
    if isinstance(value, tuple):
        return (0.1, 0.2) if float in map(type, value) else (2, 3)
    return {int: lambda: value + 1, float: lambda: value / 2 or 0.5}.get(
        type(value), lambda: f"{value}x"
    )()


def as_words(field, value):
    if isinstance(value, bool):
        return [flag_of(field.name)]
    return [flag_of(field.name), *map(str, value if isinstance(value, tuple) else [value])]


def cases():
    """For every clause: script, field, what makes it void, what else is set, and what is right."""
    for script in CONFIGS:
        fields = fields_of(script)
        for field in fields.values():
            if "never" in field.metadata:
                yield pytest.param(script, field, {}, {}, None, id=f"{script} {field.name}")
            clauses = [c for c in field.metadata.get("needs", ()) if c.keys() <= fields.keys()]
            met = dict(map(meeting, clauses))
            for clause in clauses:
                void = {name: failing(fields[name], wanted) for name, wanted in clause.items()}
                if None not in void.values() and "never" not in field.metadata:
                    others = {n: v for n, v in met.items() if not needs(fields[n]) & void.keys()}
                    name = f"{script} {field.name} by {'+'.join(clause)}"
                    yield pytest.param(script, field, void, others | void, met, id=name)


def needs(field):
    """The names of all settings that a field depends on."""
    return {name for clause in field.metadata.get("needs", ()) for name in clause}


CASES = list(cases())
# Those that something on the command line makes void, and not only defaults.
GIVING_WAY = [
    case
    for case in CASES
    if any(
        value != fields_of(case.values[0])[name].default for name, value in case.values[2].items()
    )
]


# By hand, so that no declaration can be lost: flags, and the settings that they make void.
TRAINING = {
    "--max-steps 9": "num_epochs",
    "--schedule constant": "final_lr_ratio",
    "--optimizer adamw": "muon_learning_rate",
}
SUPERVISED = {**TRAINING, "--batch-tokens 2048": "batch_size", "--workers 1": "local_steps"}
INSTRUCTION = {**SUPERVISED, "": "prompt_loss_weight", "--init-from x": "foundational_checkpoint"}
CORPUS = {
    "--flat-rate 0": "flat_terms",
    "--flat-rate 1": "min_depth max_depth",
    "--chain-rate 0": "chain_numbers",
    "--rewrite-rate 0": "rewrite_depth rewrite_steps rewrite_leaf_probability",
    "--wide-rate 0": "wide_range cancel_rate",
    "--drill-rate 0": "cancel_rate",
}
VOID = {
    "generate_corpus": {
        **CORPUS,
        "--instruction-only": "output_foundational",
        "--foundational-only": "output_instruction",
    },
    "generate_foundational_plaintext": CORPUS,
    "generate_instruction_corpus_mixed": CORPUS,
    "run_foundational_training": {
        **SUPERVISED,
        "--init-from x": "d_model nhead num_layers dim_feedforward dropout max_seq_length "
        "attention_window rope_theta tie_embeddings",
    },
    "run_instruction_training": INSTRUCTION,
    "run_instruction_training_lora": {
        **INSTRUCTION,
        "--optimizer muon": "learning_rate adam_beta2",
    },
    "run_grpo_training": {
        **TRAINING,
        "--lora-rank 0": "lora_alpha lora_target_modules use_rslora save_merged_model "
        "save_peft_adapter",
        "--lora-rank 4": "lora_dropout",
        "--lora-rank 4 --optimizer muon": "learning_rate adam_beta2",
        "--data-mode instruction": "min_depth max_depth num_range adaptive_difficulty",
        "--data-mode generated": "instruction_corpus",
        "--learn-from solutions": "num_candidates temperature top_k top_p refill_rounds baseline "
        "scale_rewards loss_type epsilon_low epsilon_high kl_penalty_coef kl_estimator "
        "num_iterations sft_replay_coef adaptive_difficulty",
        "--baseline none": "scale_rewards",
        "--kl-penalty-coef 0": "kl_estimator",
        "--num-iterations 1": "epsilon_low epsilon_high",
    },
    "export_model": {
        "--from-hf x --output-path x": "model_path base_checkpoint output_dir metrics",
    },
    "run_evaluation": {
        "--test-file x": "num_samples min_depth max_depth num_range style flat_terms "
        "invalid_rate seed",
        "--style typed": "flat_terms",
        "--style flat": "min_depth max_depth",
        "--temperature 0": "top_k top_p",
    },
    "quickstart": {"--resume": "recipe processes"},
}


@pytest.mark.parametrize(
    ("script", "flags", "name"),
    [(s, flags, name) for s in VOID for flags, void in VOID[s].items() for name in void.split()],
)
def test_what_can_have_no_effect_is_refused(script, flags, name):
    words = as_words(field := fields_of(script)[name], another(field))
    ended = call(f"{script}.py", *flags.split(), *words)
    assert ended.code == 2
    assert ended.err.startswith(f"error: {words[0]}")
    assert " has no effect " in ended.err


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("generate_corpus", "--foundational-only --output-foundational x --drill-rate 0"),
        ("run_foundational_training", "--optimizer muon --learning-rate 0.1 --adam-beta2 0.9"),
        ("run_instruction_training", "--init-from x --max-seq-length 300"),
        ("run_grpo_training", "--batch-size 1 --gradient-accumulation-steps 16 --max-depth 3"),
        ("run_grpo_training", "--max-steps 9 --num-samples 64"),
        ("run_grpo_training", "--optimizer muon --learning-rate 0.1 --adam-beta2 0.9"),
        ("run_grpo_training", "--learn-from solutions --rewards format=1 --cutoff penalise"),
        ("run_grpo_training", "--learn-from solutions --max-gen-length 9 --rollout-batch-size 2"),
        ("run_evaluation", "--test-file x --temperature 0.7 --seed 5 --top-k 3"),
        ("run_evaluation", "--style flat --invalid-rate 0.1 --max-depth 3"),
    ],
)
def test_what_has_an_effect_is_taken(script, flags):
    generated = ["--data-mode", "generated"] if script == "run_grpo_training" else []
    ended = call(f"{script}.py", *flags.split(), *generated)
    assert re.fullmatch(r"error: --[\w-]+ is required; see --help\n", ended.err)


def test_nothing_else_is_declared():
    listed = {(s, name) for s in VOID for void in VOID[s].values() for name in void.split()}
    assert {(case.values[0], case.values[1].name) for case in CASES} == listed


@pytest.mark.parametrize(("script", "field", "void", "settings", "met"), CASES)
def test_a_void_flag_is_refused_by_its_script_and_taken_where_its_needs_are_met(
    script, field, void, settings, met
):
    words, fields = as_words(field, another(field)), fields_of(script)
    ended = call(f"{script}.py", *words, *given(settings, fields))
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert line.startswith(f"error: {words[0]}")
    assert " has no effect " in line
    assert "; leave it out" in line
    for name, value in void.items():
        assert re.search(rf"\b{name} is {value}(\.0)? \(", line)
    if met is not None and script != "quickstart":  # which needs nothing, and would begin
        ended = call(f"{script}.py", *words, *given(met, fields))
        (line,) = ended.err.splitlines()
        assert re.fullmatch(r"error: --[\w-]+ is required.*; see --help", line)  # the next mistake


@pytest.mark.parametrize(("script", "field", "void", "settings", "met"), GIVING_WAY)
def test_a_files_value_gives_way_to_the_script_s_flags(
    tmp_path, script, field, void, settings, met
):
    """And what is left of it starts the same run again, without a word."""
    sections = dict(zip(("config", "model_config"), CONFIGS[script], strict=False))
    section = next(n for n, cls in sections.items() if field.name in cls.__dataclass_fields__)
    path = json_file(tmp_path, **{field.name: another(field)})
    fields = fields_of(script)
    flags = [*given(settings, fields), *needed_flags(fields, settings)]
    argv = [flag_of(section), str(path), *flags]
    with contextlib.redirect_stderr(io.StringIO()) as told:
        configs = parse_many(sections, argv, "")
    assert told.getvalue().startswith("note: no effect while ")
    assert f"{field.name} " in told.getvalue()
    values = {name: value for c in configs for name, value in dataclasses.asdict(c).items()}
    assert values[field.name] == field.default
    files = []
    for name, config in zip(sections, configs, strict=True):
        (tmp_path / f"{name}.json").write_text(to_json(config))
        files += [flag_of(name), str(tmp_path / f"{name}.json")]
    with contextlib.redirect_stderr(io.StringIO()) as told:
        assert parse_many(sections, files, "") == configs
    assert told.getvalue() == ""


def needed_flags(fields, settings):
    """What the script requires beside the settings, whatever it needs."""
    words = []
    for field in fields.values():
        if field.metadata.get("required") and field.name not in settings:
            clauses = field.metadata.get("needs", ())
            if all(settings.get(n, fields[n].default) == w for c in clauses for n, w in c.items()):
                words += [flag_of(field.name), "1"]
    if settings.get("flat_rate") == 1:  # rates add up to 1
        for style in ("typed", "padded", "drill", "invalid"):
            words += [f"--{style}-rate", "0"]
    if settings.get("from_hf"):  # the way back needs a place to go to
        words += ["--output-path", "x"]
    return words


def test_needs_name_settings_and_are_inherited():
    """Else a setting could be left at its default and so make another void, unseen."""
    known = {name for script in CONFIGS for name in fields_of(script)}
    for script in CONFIGS:
        fields = fields_of(script)
        for field in fields.values():
            clauses = list(field.metadata.get("needs", ()))
            for cause in needs(field):
                assert cause in known
                of_cause = fields[cause].metadata.get("needs", ()) if cause in fields else ()
                assert all(clause in clauses for clause in of_cause), (script, field.name, cause)


def test_under_muon_an_adapter_leaves_nothing_to_adamw(tiny_model):
    """What the needs of LoRA's learning_rate and adam_beta2 rest on."""
    config = LoRAInstructionConfig(optimizer="muon", lora_target_modules="attention,feedforward")
    adapted = add_lora(copy.deepcopy(tiny_model), config)
    assert all(group["muon"] for group in build_optimizer(adapted, config).param_groups)
    assert config.rate_flags == "--muon-learning-rate"


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
    heavy = {{"torch", "numpy", "tokenizers", "transformers", "matplotlib"}} & sys.modules.keys()
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
