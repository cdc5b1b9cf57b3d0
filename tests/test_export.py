"""Models that travel: the ecosystem loads an export as it is, and it comes back as it was."""

import contextlib
import io
import json
import re
import shutil
import sys

import pytest
import torch
from helpers import call, checkpoint_of, full_when_flushing, make_tokenizer, random_model, records
from safetensors.torch import load_file, save_file

from arithmetic_llm import runtime
from arithmetic_llm.config import LoRAConfig
from arithmetic_llm.evaluation.evaluate import evaluate, save
from arithmetic_llm.evaluation.report import summary_text
from arithmetic_llm.model.card import EXAMPLE, hub_prompt
from arithmetic_llm.model.checkpoint import read_checkpoint, save_checkpoint, weights_hash
from arithmetic_llm.model.decode import generate
from arithmetic_llm.model.hub import read_hub_folder, write_hub_folder
from arithmetic_llm.model.load import load_model
from arithmetic_llm.model.lora import lora_layers
from arithmetic_llm.model.peft import save_peft
from arithmetic_llm.runtime import UserError
from arithmetic_llm.task.problem import problem_from
from arithmetic_llm.training.adapters import with_adapter

SCRIPT = "export_model.py"
EXPRESSIONS = [r.expression for r in records(48, seed=7, max_depth=2, num_range=(1, 9))]
IDS = torch.randint(6, 90, (3, 40), generator=torch.Generator().manual_seed(1))
LONGEST = 120  # new tokens


@pytest.fixture(scope="module")
def shelf(trained_model, tokenizer, tmp_path_factory):
    """A folder with a trained checkpoint, its evaluation and its export with a card."""
    folder = tmp_path_factory.mktemp("shelf")
    save_checkpoint(folder / "model.pt", checkpoint_of(trained_model, tokenizer))
    _evaluate(folder, trained_model, tokenizer)
    argv = ["--model-path", folder / "model.pt", "--metrics", folder / "metrics.json"]
    ended = call(SCRIPT, *argv, "--output-dir", folder / "export")
    assert (ended.code, ended.err) == (0, "")
    return folder


def _evaluate(folder, model, tokenizer):
    trained_on = checkpoint_of(model, tokenizer).trained_on
    problems = [problem_from(e) for e in (*EXPRESSIONS[:20], "1 + 2 + 3 + 4 + 5 + 6", "1 +")]
    said = {"model_path": "models/m/best_model.pt", "weights_hash": weights_hash(model)}
    said |= {"test_file": "t.jsonl", "stage": "foundational", "step": 0}
    result = evaluate(
        model, tokenizer, problems, trained_on=trained_on, max_new_tokens=LONGEST, settings=said
    )
    save(result, summary_text(result.metrics), folder / "evaluation")
    (metrics,) = (folder / "evaluation").glob("evaluation_metrics_*.json")
    shutil.copy(metrics, folder / "metrics.json")


@pytest.fixture(scope="module")
def theirs(shelf):
    """What transformers makes of the export: model and tokenizer."""
    return loaded_by_transformers(shelf / "export")


def loaded_by_transformers(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def export(shelf, tmp_path):
    """A copy of the export, to be changed."""
    return shutil.copytree(shelf / "export", tmp_path / "export")


@torch.no_grad()
def close(ours, theirs):
    torch.testing.assert_close(theirs(input_ids=IDS).logits, ours(IDS), atol=1e-4, rtol=0)


def import_from(folder, output):
    return call(SCRIPT, "--from-hf", folder, "--output-path", output)


def state_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -------------------------------------------------------------------------- in transformers


def test_prompts_have_the_same_ids(theirs, tokenizer):
    for expression in [*EXPRESSIONS, "-3 - (-4 + 12)", "((1 + 2)) - 3", "7", "1 +"]:
        ids = theirs[1](hub_prompt(expression))["input_ids"]
        assert ids == tokenizer.prompt_ids(expression)


def test_logits_are_equal(theirs, trained_model):
    close(trained_model, theirs[0])


def test_greedy_texts_are_equal_in_a_padded_batch(theirs, trained_model, tokenizer):
    model, their_tokenizer = theirs
    prompts = [hub_prompt(expression) for expression in EXPRESSIONS]
    inputs = their_tokenizer(prompts, return_tensors="pt", padding=True)
    written = model.generate(**inputs, max_new_tokens=LONGEST)[:, inputs["input_ids"].shape[1] :]
    ours = generate(trained_model, [tokenizer.prompt_ids(e) for e in EXPRESSIONS], LONGEST)
    for row, completion in zip(their_tokenizer.batch_decode(written), ours, strict=True):
        assert row.replace("<pad>", "") == tokenizer.decode(completion.tokens)
    assert sum(completion.finish_reason == "eos" for completion in ours) > len(ours) / 2


def test_what_config_json_says(shelf):
    said = json.loads((shelf / "export" / "config.json").read_text())
    expected = {"model_type": "qwen3", "head_dim": 32, "rms_norm_eps": 1e-6, "dtype": "float32"}
    expected |= {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "hidden_act": "silu"}
    expected |= {"architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 1536}
    assert expected.items() <= said.items()


def test_the_code_on_the_card_prints_what_the_model_writes(
    shelf, trained_model, tokenizer, monkeypatch
):
    card = (shelf / "export" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(shelf / "export")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    prompt = tokenizer.prompt_ids(EXAMPLE)
    (completion,) = generate(trained_model, [prompt], 1536)
    assert printed.getvalue() == tokenizer.decode([*prompt, *completion.tokens]) + "\n"


def test_a_tied_head_travels_both_ways(tokenizer, tmp_path):
    model = random_model(tokenizer.vocab_size, tie_embeddings=True, dropout=0.25, rope_theta=500.0)
    write_hub_folder(tmp_path, checkpoint_of(model, tokenizer))
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    close(model, loaded_by_transformers(tmp_path)[0])
    back = read_hub_folder(tmp_path).model
    assert weights_hash(back) == weights_hash(model)
    assert back.config == model.config


def test_a_window_travels_both_ways(tokenizer, tmp_path):
    model = random_model(tokenizer.vocab_size, attention_window=4)
    write_hub_folder(tmp_path, checkpoint_of(model, tokenizer))
    theirs = loaded_by_transformers(tmp_path)[0]
    close(model, theirs)
    theirs.save_pretrained(tmp_path)
    assert read_hub_folder(tmp_path).model.config == model.config


def test_an_adapter_is_merged_on_its_way(tokenizer, tmp_path):
    base = checkpoint_of(random_model(tokenizer.vocab_size, seed=8), tokenizer)
    save_checkpoint(tmp_path / "base.pt", base)
    adapted = with_adapter(base, LoRAConfig(lora_rank=3), str(tmp_path / "base.pt"))
    for _, layer in lora_layers(adapted.model):
        torch.nn.init.normal_(layer.lora_B.weight, std=0.3)
    save_checkpoint(tmp_path / "adapter.pt", adapted)
    save_peft(tmp_path / "peft", read_checkpoint(tmp_path / "adapter.pt"))
    for name in ("adapter.pt", "peft"):
        argv = ["--model-path", tmp_path / name, "--output-dir", tmp_path / f"of_{name}"]
        assert call(SCRIPT, *argv, "--base-checkpoint", tmp_path / "base.pt").code == 0
        back = read_hub_folder(tmp_path / f"of_{name}").model
        assert weights_hash(back) == weights_hash(load_model(tmp_path / name).model)
        torch.testing.assert_close(back(IDS), adapted.model.eval()(IDS), atol=1e-4, rtol=0)


# ------------------------------------------------------------------------- in PEFT and TRL


def test_peft_wraps_it(shelf, trained_model):
    from peft import LoraConfig, get_peft_model

    model, _ = loaded_by_transformers(shelf / "export")
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2))
    close(trained_model, wrapped)  # a fresh adapter changes nothing
    assert 0 < sum(p.numel() for p in wrapped.parameters() if p.requires_grad) < 10_000


def test_trl_trains_it(shelf, tmp_path):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    trainer = GRPOTrainer(
        model=str(shelf / "export"),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        train_dataset=Dataset.from_dict({"prompt": [hub_prompt(e) for e in EXPRESSIONS[:2]]}),
        args=GRPOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            max_steps=1,
            per_device_train_batch_size=2,
            num_generations=2,
            max_completion_length=6,
            temperature=2.0,
            report_to="none",
            disable_tqdm=True,
        ),
    )
    before = trainer.model.lm_head.weight.clone()
    trainer.train()
    assert not torch.equal(trainer.model.lm_head.weight, before)


# ------------------------------------------------------------------------------ and back


def test_an_export_comes_back_as_the_checkpoint_it_was(shelf, tmp_path):
    ended = import_from(shelf / "export", tmp_path / "back.pt")
    assert (ended.code, ended.err) == (0, "")
    ours, back = load_model(shelf / "model.pt"), load_model(tmp_path / "back.pt")
    assert weights_hash(back.model) == weights_hash(ours.model)
    assert back.model.config == ours.model.config
    assert back.tokenizer.hash == ours.tokenizer.hash
    assert (back.stage, back.step, back.trained_on) == (ours.stage, ours.step, ours.trained_on)


def test_what_transformers_has_saved_comes_back(shelf, tokenizer, tmp_path):
    model, their_tokenizer = loaded_by_transformers(shelf / "export")
    their_tokenizer(["1", "1 + 2"], padding=True, truncation=True, max_length=2)  # it is saved, too
    model.save_pretrained(tmp_path)
    their_tokenizer.save_pretrained(tmp_path)
    back = read_hub_folder(tmp_path)
    assert weights_hash(back.model) == weights_hash(load_model(shelf / "model.pt").model)
    assert back.tokenizer.hash == tokenizer.hash
    assert back.trained_on is not None
    torch.nn.init.ones_(model.model.norm.weight)  # trained elsewhere: on what, nobody knows
    model.save_pretrained(tmp_path)
    back = read_hub_folder(tmp_path)
    assert (back.stage, back.step, back.trained_on) == ("imported", 0, None)


def test_half_precision_becomes_fp32(shelf, export):
    weights = {n: t.bfloat16() for n, t in load_file(export / "model.safetensors").items()}
    save_file(weights, export / "model.safetensors")
    back = read_hub_folder(export).model
    assert {tensor.dtype for tensor in back.state_dict().values()} == {torch.float32}


# -------------------------------------------------------------- what is not of our shape


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"model_type": None}, "model_type"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is not num_attention_heads"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rotary positions"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial"),
        ({"rope_parameters": [1]}, "rope"),
        ({"use_sliding_window": True}, "layer_types: full_attention"),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": None,
                "max_window_layers": 1,
            },
            "layer_types: full_attention",
        ),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": None,
                "max_window_layers": ...,
            },
            "layer_types: full_attention",
        ),
        (
            {
                "use_sliding_window": True,
                "sliding_window": None,
                "layer_types": ["sliding_attention"] * 2,
            },
            "attention_window",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": 5}, "int"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"head_dim": 64}, "head_dim is 64"),
        ({"hidden_size": "64"}, "d_model"),
        ({"num_hidden_layers": 3}, "layers.2"),
        ({"intermediate_size": 100}, "has shape"),
        ({"tie_word_embeddings": True}, "head and embedding differ"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"head_dim": ...}, "head_dim is missing"),
    ],
    ids=str,
)
def test_another_model_is_refused_in_one_line(export, tmp_path, said, why):
    path = export / "config.json"
    changed = {**json.loads(path.read_text()), **said}
    path.write_text(json.dumps({name: v for name, v in changed.items() if v is not ...}))
    refused(export, tmp_path, why)


def refused(export, tmp_path, *named):
    """One line that names the folder's file and the reason; nothing is written."""
    ended = import_from(export, tmp_path / "back.pt")
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert all(str(word) in line for word in (*named, export)), line
    assert not (tmp_path / "back.pt").exists()


def with_weights(export, change):
    weights = load_file(export / "model.safetensors")
    change(weights)
    save_file(weights, export / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda w: w.update(bias=torch.ones(64)), "bias is unknown"),
        (lambda w: w.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda w: w["model.norm.weight"].fill_(float("nan")), "NaN"),
        (lambda w: w.update({"lm_head.weight": torch.ones(5, 5, dtype=torch.int8)}), "lm_head"),
    ],
    ids=["another", "missing", "nan", "quantised"],
)
def test_other_weights_are_refused_in_one_line(export, tmp_path, change, why):
    with_weights(export, change)
    refused(export, tmp_path, why)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda said: said.update(arithmetic_llm=[]), "arithmetic_llm is []"),
        (lambda said: said["arithmetic_llm"].update(stage=1), "stage is 1"),
        (lambda said: said["arithmetic_llm"].update(dropout=2.0), "--dropout"),
        (lambda said: said["arithmetic_llm"]["trained_on"].pop("depths"), "depths is missing"),
    ],
    ids=["a list", "stage", "dropout", "depths"],
)
def test_a_damaged_past_is_refused_in_one_line(export, tmp_path, change, why):
    said = json.loads((export / "config.json").read_text())
    change(said)
    (export / "config.json").write_text(json.dumps(said))
    refused(export, tmp_path, why)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_files_that_are_missing_or_damaged_are_named(export, tmp_path, name):
    content = (export / name).read_bytes()
    (export / name).write_bytes(content[: len(content) // 2])
    refused(export, tmp_path, name)
    (export / name).write_bytes(b"")
    refused(export, tmp_path, name)
    (export / name).unlink()
    refused(export, tmp_path, name)


def test_a_tokenizer_without_the_special_tokens_is_refused(export, tmp_path):
    path = export / "tokenizer.json"
    path.write_text(path.read_text().replace("</think>", "</thought>"))
    refused(export, tmp_path, "special tokens")


def test_a_tokenizer_of_another_size_is_refused(export, tmp_path, tokenizer):
    make_tokenizer(150).save(export)
    shape = f"({tokenizer.vocab_size}, 64)"
    refused(export, tmp_path, f"lm_head.weight has shape {shape}, not (150, 64)")


# ------------------------------------------------------------------------------- the card


def test_the_card_warns_of_text_made_token_by_token(shelf):
    """It is what happens: transformers' text of each token by itself."""
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(shelf / "export" / "tokenizer.json"))
    ids = theirs("= 723 ")["input_ids"]
    assert theirs.decode(ids) == "= 723 "
    assert "".join(theirs.decode([token]) for token in ids) == "= 327 "
    assert "would show `723` as `327`" in (shelf / "export" / "README.md").read_text()


def test_the_card_has_the_evaluation_with_its_intervals(shelf):
    card = (shelf / "export" / "README.md").read_text()
    metrics = json.loads((shelf / "metrics.json").read_text())
    row = metrics["by_depth"][-1]
    figures = f"{row['samples']} | {row['exact_match_accuracy']:.1f} % | "
    assert f"| depth {row['depth']} | {figures}{row['low']:.1f} to {row['high']:.1f} |" in card
    assert f"| all | 22 | {metrics['exact_match_accuracy']:.1f} % | " in card
    assert "| 6 numbers * | 1 | " in card
    assert f"| invalid * | {metrics['invalid']['samples']} | " in card
    assert "All problems of the file `t.jsonl`; greedy decoding" in card


def test_the_card_tells_what_it_was_trained_on(shelf, tokenizer, tiny_model, tmp_path):
    card = (shelf / "export" / "README.md").read_text()
    assert "Last stage: foundational, step 0." in card
    for line in ("numbers 1 to 20", "trees of depth 1, 2, 3", "styles: nested (100)"):
        assert f"- {line}\n" in card or f"- expression {line}\n" in card
    unknown = checkpoint_of(tiny_model, tokenizer)
    unknown.trained_on = None
    write_hub_folder(tmp_path, unknown)
    card = (tmp_path / "README.md").read_text()
    assert "Nothing is known" in card
    assert "No evaluation came with this export." in card


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: m["settings"].update(weights_hash="0"), "of another model, models/m/best"),
        (lambda m: m.pop("by_depth"), "by_depth is missing"),
        (lambda m: m.update(low="much"), "not the metrics of an evaluation"),
        (lambda m: m.update(settings=[]), "not the metrics of an evaluation"),
        (lambda m: m["by_depth"][0].pop("samples"), "samples is missing"),
    ],
    ids=["another model", "no rows", "a text", "no settings", "no samples"],
)
def test_figures_of_something_else_are_refused(shelf, tmp_path, change, why):
    metrics = json.loads((shelf / "metrics.json").read_text())
    change(metrics)
    (tmp_path / "m.json").write_text(json.dumps(metrics))
    argv = ["--model-path", shelf / "model.pt", "--output-dir", tmp_path / "out"]
    ended = call(SCRIPT, *argv, "--metrics", tmp_path / "m.json")
    assert ended.code == 2
    assert str(tmp_path / "m.json") in ended.err
    assert why in ended.err
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------- writing


def test_a_second_export_writes_the_same_bytes(shelf, export, tokenizer, tiny_model):
    before = state_of(export)
    write_hub_folder(export, checkpoint_of(tiny_model, tokenizer))
    assert state_of(export).keys() == before.keys()
    assert state_of(export) != before
    argv = ["--model-path", shelf / "model.pt", "--metrics", shelf / "metrics.json"]
    assert call(SCRIPT, *argv, "--output-dir", export).code == 0
    assert state_of(export) == before


@pytest.mark.parametrize("good", [0, 3, 6])
def test_a_disk_that_fills_up_leaves_the_earlier_export(
    export, tokenizer, tiny_model, monkeypatch, good
):
    """Whichever file it is that does not fit any more."""
    before, flushed = state_of(export), []
    full_when_flushing(monkeypatch)
    fails = runtime.os.fsync

    def fsync(descriptor):
        flushed.append(descriptor)
        if len(flushed) > good:
            fails(descriptor)

    monkeypatch.setattr(runtime.os, "fsync", fsync)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        write_hub_folder(export, checkpoint_of(tiny_model, tokenizer))
    assert state_of(export) == before


@pytest.mark.parametrize("name", ["README.md", "adapter_config.json", "tokenizer.json"])
def test_the_files_of_someone_else_are_left_alone(shelf, tmp_path, name):
    (tmp_path / name).write_text("mine")
    ended = call(SCRIPT, "--model-path", shelf / "model.pt", "--output-dir", tmp_path)
    assert ended.code == 2
    assert ended.err == (
        f"error: {tmp_path}: holds a {name} that is of no export; name a new folder\n"
    )
    assert state_of(tmp_path) == {name: b"mine"}


def test_a_folder_that_has_a_files_name_is_left_alone(export, tokenizer, tiny_model):
    (export / "config.json").unlink()
    (export / "config.json").mkdir()
    before = {path.name for path in export.iterdir()}
    with pytest.raises(UserError, match="holds a config"):
        write_hub_folder(export, checkpoint_of(tiny_model, tokenizer))
    assert {path.name for path in export.iterdir()} == before


def test_shards_of_another_model_are_in_the_way(export, tokenizer, tiny_model):
    (export / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="holds a model\\.safetensors\\.index"):
        write_hub_folder(export, checkpoint_of(tiny_model, tokenizer))


@pytest.mark.parametrize("argv", [["--model-path", "m"], ["--from-hf", "d"]])
def test_without_safetensors_it_says_what_to_install(shelf, tmp_path, monkeypatch, argv):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    ways = {
        "--model-path": [shelf / "model.pt", "--output-dir", tmp_path / "new"],
        "--from-hf": [shelf / "export", "--output-path", tmp_path / "new"],
    }
    ended = call(SCRIPT, argv[0], *ways[argv[0]])
    assert ended.code == 2
    assert ended.err == "error: this needs safetensors; pip install -r requirements-extras.txt\n"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        ("", "--model-path is required"),
        ("--model-path m", "--output-dir is required"),
        ("--from-hf d", "--output-path is required with --from-hf"),
        ("--output-path x --model-path m --output-dir d", "no effect without --from-hf"),
        ("--from-hf d --output-path x --model-path m", "--model-path m has no effect"),
        ("--from-hf d --output-path x --metrics m", "--metrics m has no effect"),
    ],
)
def test_flags_of_the_other_way_are_refused(argv, why):
    ended = call(SCRIPT, *argv.split())
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert why in line
