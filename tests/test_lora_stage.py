"""LoRA fine-tuning and merging as a user runs them; what evaluates and solves takes the adapter."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import call, checkpoint_of, random_model, run

from arithmetic_llm.evaluation.solver import ArithmeticSolver
from arithmetic_llm.folders import FINISHED
from arithmetic_llm.model.checkpoint import read_checkpoint, save_checkpoint, weights_hash
from arithmetic_llm.model.load import load_model

LORA, MERGE = "run_instruction_training_lora.py", "merge_lora_adapter.py"
STEPS = 12


@pytest.fixture(scope="module")
def shelf(workshop, tokenizer, tmp_path_factory):
    """A folder with a base model, its tokenizer and a corpus."""
    folder = tmp_path_factory.mktemp("shelf")
    base = checkpoint_of(random_model(tokenizer.vocab_size, dropout=0.1), tokenizer)
    base.trained_on = replace(base.trained_on, depths=(1,))  # the corpus has depth 2 as well
    base_folder = folder / "models" / "foundational_20250101_000000"
    save_checkpoint(base_folder / "best_model.pt", base)
    (base_folder / FINISHED).write_text("{}")
    tokenizer.save(folder / "tokenizer")
    shutil.copy(workshop / "i.jsonl", folder / "i.jsonl")
    return folder


def base_of(shelf):
    return shelf / "models" / "foundational_20250101_000000" / "best_model.pt"


def arguments(shelf, *more):
    return [
        *("--instruction-corpus-path", shelf / "i.jsonl", "--tokenizer-path", shelf / "tokenizer"),
        *("--foundational-checkpoint", base_of(shelf), "--lora-rank", 4, "--lora-alpha", 8),
        *("--lora-dropout", 0.1, "--max-steps", STEPS, "--batch-size", 8, "--learning-rate", 1e-2),
        *("--eval-samples", 10, "--eval-every", 4, "--save-every", 4, "--threads", 1),
        *("--device", "cpu", *more),
    ]


@pytest.fixture(scope="module")
def trained(shelf):
    """A run of a process of its own with everything saved; its folder, and how it ended."""
    extras = ["--save-merged-model", "--save-peft-adapter", "--output-dir", shelf / "models"]
    ended = run(LORA, *arguments(shelf, *extras))
    assert ended.code == 0, ended.err
    (folder,) = (shelf / "models").glob("instruction_lora_*")
    return folder, ended


def test_a_run_leaves_the_documented_files_and_no_other(trained):
    folder, _ = trained
    assert {path.name for path in folder.iterdir()} == {
        *("best_model.pt", "final_model.pt", "checkpoint_step_4.pt", "checkpoint_step_8.pt"),
        *("lora_adapter.pt", "merged_model.pt", "peft_adapter"),
        *("training_config.json", "model_config.json", "training_log.json"),
        *("training_summary.json", "run.json", "metrics.jsonl"),
    }
    assert {path.name for path in (folder / "peft_adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_trainable_and_total_parameters_are_printed(shelf, trained):
    _, ended = trained
    base = load_model(base_of(shelf)).model
    adapter = 2 * 4 * (4 * 2 * 32)  # layers, modules, rank x (in + out)
    total = base.parameter_count() + adapter
    assert f"{adapter:,} of {total:,} parameters ({100 * adapter / total:.2f} %) train" in ended.out


def test_the_base_is_bit_equal_after_training_and_the_adapter_is_not_fresh(shelf, trained):
    """A checkpoint has nothing but the adapter; its base is known by hash."""
    folder, _ = trained
    for name in ("best_model.pt", "final_model.pt", "lora_adapter.pt"):
        content = read_checkpoint(folder / name)
        assert all(".lora_" in key for key in content.weights)
        assert content.adapter["base_hash"] == weights_hash(load_model(base_of(shelf)).model)
        assert all(w.any() for key, w in content.weights.items() if key.endswith("lora_B.weight"))


def test_it_learns(trained):
    folder, _ = trained
    losses = [
        line["eval_loss"]
        for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        if "eval_loss" in line
    ]
    assert losses[-1] < losses[0]


def merge(shelf, adapter, output):
    argv = ["--base-checkpoint", base_of(shelf), "--adapter-path", adapter, "--output-path", output]
    ended = run(MERGE, *argv)
    assert ended.code == 0, ended.err
    assert ended.out == f"merged model in {output}\n"
    return load_model(output)


def test_merging_gives_what_the_run_merged(shelf, trained, tmp_path):
    folder, _ = trained
    ours = load_model(folder / "merged_model.pt")
    merged = merge(shelf, folder / "lora_adapter.pt", tmp_path / "merged.pt")
    assert weights_hash(merged.model) == weights_hash(ours.model)
    assert (merged.stage, merged.step) == (ours.stage, ours.step) == ("instruction_lora", ours.step)
    assert merged.trained_on == ours.trained_on
    assert merged.tokenizer.hash == ours.tokenizer.hash
    of_peft = merge(shelf, folder / "peft_adapter", tmp_path / "of_peft.pt")
    assert weights_hash(of_peft.model) == weights_hash(ours.model)
    assert (of_peft.stage, of_peft.step) == (ours.stage, ours.step)
    assert of_peft.trained_on == ours.trained_on


def test_the_documented_commands_paste_as_they_stand(shelf, trained, monkeypatch):
    folder, _ = trained
    before = weights_hash(load_model(folder / "merged_model.pt").model)
    (folder / "merged_model.pt").unlink()
    monkeypatch.chdir(shelf)
    ended = call(
        MERGE,
        *("--base-checkpoint", "models/foundational_YYYYMMDD_HHMMSS/best_model.pt"),
        *("--adapter-path", "models/instruction_lora_YYYYMMDD_HHMMSS/lora_adapter.pt"),
        *("--output-path", "models/instruction_lora_YYYYMMDD_HHMMSS/merged_model.pt"),
    )
    assert ended.code == 0, ended.err
    assert weights_hash(load_model(folder / "merged_model.pt").model) == before


def evaluate(output, *argv):
    ended = call(
        "run_evaluation.py",
        *argv,
        *("--num-samples", 6, "--max-depth", 3, "--max-gen-length", 8, "--output-dir", output),
    )
    assert ended.code == 0, ended.err
    (path,) = output.glob("evaluation_metrics_*.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("adapter", ["lora_adapter.pt", "peft_adapter"])
def test_evaluation_takes_an_adapter_directly(trained, shelf, tmp_path, adapter):
    folder, _ = trained
    merged = weights_hash(load_model(folder / "lora_adapter.pt").model)
    found = evaluate(tmp_path / "found", "--model-path", folder / adapter)
    copy = tmp_path / "far" / "away" / adapter
    copy.parent.mkdir(parents=True)
    (shutil.copytree if adapter == "peft_adapter" else shutil.copy)(folder / adapter, copy)
    argv = ["--model-path", copy, "--base-checkpoint", base_of(shelf)]
    named = evaluate(tmp_path / "named", *argv)
    assert found["settings"]["weights_hash"] == named["settings"]["weights_hash"] == merged
    for metrics in (found, named):  # what the adapter's training was, and not its base's
        assert [row["trained"] for row in metrics["by_depth"]] == [True, True, False]
        assert metrics["settings"]["stage"] == "instruction_lora"
        assert metrics["settings"]["step"] == load_model(folder / "best_model.pt").step > 0


def test_the_solver_takes_an_adapter_directly(trained, shelf, tmp_path):
    folder, _ = trained
    solver = ArithmeticSolver.from_checkpoint(
        folder / "lora_adapter.pt", base_checkpoint=str(base_of(shelf)), max_new_tokens=5
    )
    assert solver.solve("1 + 2").tokens <= 5
    argv = ["--model-path", folder / "lora_adapter.pt", "--base-checkpoint", base_of(shelf)]
    ended = run("run_interactive.py", *argv, "--max-gen-length", 5, stdin="1 + 2\nexit\n")
    assert ended.code == 0, ended.err
    assert "SOLUTION" in ended.out


def test_an_adapter_on_another_base_is_refused_everywhere(trained, shelf, tokenizer, tmp_path):
    folder, _ = trained
    other = tmp_path / "other.pt"
    save_checkpoint(other, checkpoint_of(random_model(tokenizer.vocab_size, seed=4), tokenizer))
    adapter = folder / "lora_adapter.pt"
    for script, *argv in (
        ("run_evaluation.py", "--model-path", adapter, "--output-dir", tmp_path / "out"),
        ("run_interactive.py", "--model-path", adapter),
        (MERGE, "--adapter-path", adapter, "--output-path", tmp_path / "out.pt"),
        (
            "run_grpo_training.py",
            *("--sft-checkpoint", adapter, "--tokenizer", shelf / "tokenizer"),
            *("--data-mode", "generated", "--output-dir", tmp_path / "out"),
        ),
    ):
        ended = call(script, *argv, "--base-checkpoint", other)
        assert ended.code == 2, script
        assert "other.pt: not the base of" in ended.error_lines[0]
    assert not (tmp_path / "out.pt").exists()


def test_merging_what_is_no_adapter_is_refused(shelf, tmp_path):
    base = base_of(shelf)
    argv = ["--base-checkpoint", base, "--output-path", tmp_path / "out.pt"]
    for adapter, message in (
        (base, "is a whole model, not an adapter"),
        (tmp_path / "nowhere.pt", "no such checkpoint file"),
        (tmp_path, "is a directory"),
    ):
        ended = call(MERGE, *argv, "--adapter-path", adapter)
        assert ended.code == 2
        assert message in ended.error_lines[0]
    assert not (tmp_path / "out.pt").exists()


def train(argv, output):
    ended = call(LORA, *argv, "--output-dir", output)
    assert ended.code == 0, ended.err
    (folder,) = output.iterdir()
    return folder


def test_a_resumed_run_ends_bit_identical(trained, tmp_path):
    whole, _ = trained
    folder = shutil.copytree(whole, tmp_path / whole.name)
    for name in (FINISHED, "final_model.pt", "lora_adapter.pt", "checkpoint_step_8.pt"):
        (folder / name).unlink()
    ended = call(LORA, "--resume", folder)
    assert ended.code == 0, ended.err
    assert "at step 4" in ended.out
    for name in ("final_model.pt", "best_model.pt"):
        left, right = (read_checkpoint(path / name).weights for path in (whole, folder))
        assert all(torch.equal(left[key], right[key]) for key in left.keys() | right.keys())


def test_a_changed_base_is_refused_on_resume(trained, tokenizer, tmp_path):
    whole, _ = trained
    folder = shutil.copytree(whole, tmp_path / whole.name)
    (folder / FINISHED).unlink()
    other = checkpoint_of(random_model(tokenizer.vocab_size, seed=4), tokenizer)
    save_checkpoint(tmp_path / "other.pt", other)
    config = json.loads((folder / "training_config.json").read_text())
    config["foundational_checkpoint"] = str(tmp_path / "other.pt")
    (folder / "training_config.json").write_text(json.dumps(config))
    ended = call(LORA, "--resume", folder)
    assert ended.code == 2
    assert "start_hash has changed" in ended.error_lines[0]


def test_an_adapter_of_an_adapter_keeps_its_base_and_can_move(trained, shelf, tmp_path):
    first, _ = trained
    start = ["--foundational-checkpoint", first / "lora_adapter.pt", "--max-steps", 2]
    folder = train(arguments(shelf, *start), tmp_path / "runs")
    base, start = load_model(folder / "base_model.pt"), load_model(first / "lora_adapter.pt")
    assert weights_hash(base.model) == weights_hash(load_model(first / "merged_model.pt").model)
    assert (base.stage, base.step, base.trained_on) == (start.stage, start.step, start.trained_on)
    before = weights_hash(load_model(folder / "lora_adapter.pt").model)
    moved = folder.rename(tmp_path / "elsewhere")
    assert weights_hash(load_model(moved / "lora_adapter.pt").model) == before


def test_the_context_that_a_run_was_given_is_the_merged_models(shelf, tmp_path):
    argv = arguments(shelf, "--max-seq-length", 300, "--max-steps", 1)
    argv += ["--save-merged-model", "--save-peft-adapter"]
    folder = train(argv, tmp_path / "runs")
    for name in ("lora_adapter.pt", "merged_model.pt", "peft_adapter"):
        assert load_model(folder / name).model.config.max_seq_length == 300


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lora-target-modules", "qproj"], "no module matched 'qproj'; did you mean q_proj?"),
        (["--lora-rank", 0], "--lora-rank: must be at least 1"),
        (["--lora-dropout", 1], "--lora-dropout: must be at most 0.99"),
        (["--foundational-checkpoint", "nowhere.pt"], "nowhere.pt: no such checkpoint file"),
        (["--instruction-corpus-path", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(shelf, tmp_path, argv, message):
    ended = call(LORA, *arguments(shelf, *argv), "--output-dir", tmp_path / "out")
    assert ended.code == 2
    assert len(ended.error_lines) == 1
    assert message in ended.error_lines[0]
    assert not (tmp_path / "out").exists()
