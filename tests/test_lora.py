"""Adapters: the same numbers as PEFT's, in memory and as files; and a base that nothing moves."""

import dataclasses
import json
import shutil

import pytest
import torch
from helpers import checkpoint_of, of_transformers, random_model

from arithmetic_llm.config import LoRAConfig, TrainingConfig
from arithmetic_llm.model import load
from arithmetic_llm.model.checkpoint import read_checkpoint, save_checkpoint
from arithmetic_llm.model.load import load_adapter, load_model
from arithmetic_llm.model.lora import (
    LoRALinear,
    adapter_weights,
    add_lora,
    disable_adapter,
    lora_layers,
    merge_adapter,
    target_names,
    without_adapter,
)
from arithmetic_llm.model.peft import read_peft, save_peft
from arithmetic_llm.runtime import UserError
from arithmetic_llm.training.adapters import with_adapter
from arithmetic_llm.training.optim import build_optimizer

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FEEDFORWARD = ["gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(6, 90, (3, 17), generator=torch.Generator().manual_seed(1))
KINDS = {
    "attention": LoRAConfig(lora_rank=4),
    "both groups": LoRAConfig(lora_rank=2, lora_target_modules="attention,feedforward"),
    "single names": LoRAConfig(lora_rank=3, lora_alpha=5.0, lora_target_modules="q_proj,up_proj"),
    "rslora": LoRAConfig(lora_rank=9, lora_alpha=4.0, use_rslora=True),
}


def trained(model, config=KINDS["attention"]):
    """The model with an adapter that changes much; not a fresh one, whose B is zero."""
    torch.manual_seed(0)
    return move(add_lora(model, config))


def move(model):
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B.weight, std=0.3)
    return model


def with_peft(folder, model):
    """The model with the adapter of a PEFT folder on it, not merged."""
    adapter = read_peft(folder)
    return load_adapter(model, adapter.config, adapter.weights)


def fresh_model(**shape):
    return random_model(90, seed=3, **shape)


def close(one, other):
    torch.testing.assert_close(one, other, atol=5e-5, rtol=1e-5)


# --------------------------------------------------------------------------- beside PEFT


def of_peft(model, config):
    """The same base and adapter in PEFT."""
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(
        of_transformers(without_adapter(model)),
        LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=0.0,
            target_modules=list(target_names(config.lora_target_modules)),
            use_rslora=config.use_rslora,
        ),
    )
    ours = {f"base_model.model.{name}": t for name, t in adapter_weights(model).items()}
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, weight in ours.items():
            parameters[name.replace(".weight", ".default.weight")].copy_(weight)
    assert sum(p.requires_grad for p in parameters.values()) == len(ours)
    return theirs


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_logits_and_gradients_are_those_of_peft(config):
    model = trained(fresh_model(), config).train()
    theirs = of_peft(model, config).train()
    logits, their_logits = model(IDS), theirs(input_ids=IDS).logits
    close(logits, their_logits)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)) / 50
    (logits * direction).sum().backward()
    (their_logits * direction).sum().backward()
    their_gradients = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == their_gradients.keys()
    assert min(g.abs().max() for g in gradients.values()) > 1e-3
    for name, gradient in gradients.items():
        close(gradient, their_gradients[name])


@pytest.fixture
def on_disk(tokenizer, tmp_path):
    """A model with an adapter, whose base and adapter, also as a PEFT folder, are files."""
    # Weights of its own: a base is found by its hash, also among the folders of other tests.
    base = checkpoint_of(random_model(tokenizer.vocab_size, seed=5), tokenizer)
    save_checkpoint(tmp_path / "base" / "best_model.pt", base)
    adapted = with_adapter(base, KINDS["rslora"], str(tmp_path / "base" / "best_model.pt"))
    move(adapted.model)
    save_checkpoint(tmp_path / "lora" / "lora_adapter.pt", adapted)
    save_peft(tmp_path / "lora" / "peft", read_checkpoint(tmp_path / "lora" / "lora_adapter.pt"))
    return adapted.model.eval()


def test_our_adapter_loads_in_peft(on_disk, tmp_path):
    from peft import PeftModel

    base = load_model(tmp_path / "base" / "best_model.pt").model
    theirs = PeftModel.from_pretrained(of_transformers(base), tmp_path / "lora" / "peft")
    with torch.no_grad():
        close(theirs(input_ids=IDS).logits, on_disk(IDS))
        with theirs.disable_adapter(), disable_adapter(on_disk):
            close(theirs(input_ids=IDS).logits, on_disk(IDS))


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_an_adapter_that_peft_saved_loads_here(config, tmp_path):
    model = trained(fresh_model(), config)
    of_peft(model, config).save_pretrained(tmp_path)
    loaded = with_peft(tmp_path, fresh_model())
    with torch.no_grad():
        assert torch.equal(loaded(IDS), model(IDS))


def trained_by_peft(folder, **settings):
    """PEFT's own model of an adapter that changes much, saved by PEFT; and its logits."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    defaults = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
    theirs = get_peft_model(of_transformers(fresh_model()), LoraConfig(**{**defaults, **settings}))
    convertible = folder / "start"  # what a later conversion subtracts
    start = theirs.peft_config["default"].init_lora_weights
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(convertible)
    theirs.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
        logits = theirs.eval()(input_ids=IDS).logits
    theirs.save_pretrained(folder / "as_it_is")
    return theirs, logits


def logits_here(folder):
    with torch.no_grad():
        return with_peft(folder, fresh_model()).eval()(IDS)


@pytest.mark.parametrize(
    "settings",
    [
        *({"init_lora_weights": start} for start in (True, False, None)),
        *({"init_lora_weights": start} for start in ("gaussian", "eva", "orthogonal", "mica")),
        {"lora_dropout": 0.3, "use_rslora": True},
        {"ensure_weight_tying": True, "qalora_group_size": 4, "task_type": "CAUSAL_LM"},
    ],
    ids=str,
)
def test_what_peft_trained_beside_an_unchanged_base_computes_here_what_it_does_there(
    tmp_path, settings
):
    _, logits = trained_by_peft(tmp_path, **settings)
    close(logits_here(tmp_path / "as_it_is"), logits)
    with torch.no_grad():
        assert (logits - fresh_model()(IDS)).abs().max() > 0.5


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_what_peft_trained_beside_a_changed_base_is_refused_unless_it_was_converted(
    tmp_path, start
):
    theirs, logits = trained_by_peft(tmp_path, init_lora_weights=start)
    with pytest.raises(UserError, match=f"init_lora_weights '{start}'.*weight_conversion") as error:
        with_peft(tmp_path / "as_it_is", fresh_model())
    assert "\n" not in str(error.value)
    change_settings(tmp_path / "as_it_is", init_lora_weights=True)
    assert (logits_here(tmp_path / "as_it_is") - logits).abs().max() > 0.5  # as well it is
    start = str(tmp_path / "start")
    theirs.save_pretrained(tmp_path / "new", path_initial_model_for_weight_conversion=start)
    torch.testing.assert_close(logits_here(tmp_path / "new"), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("start", ["corda", "lora_ga", "loftq", "Pissa", "of a later PEFT", 1, []])
def test_a_start_that_is_not_known_to_leave_the_base_alone_is_refused(on_disk, tmp_path, start):
    change_settings(tmp_path / "lora" / "peft", init_lora_weights=start)
    with pytest.raises(UserError, match="init_lora_weights") as error:
        load_model(tmp_path / "lora" / "peft")
    assert repr(start) in str(error.value)


def unknown_settings():
    """Every setting of the installed PEFT that is not known to be harmless, and one of its heirs'.

    Those that are known are named here again: a new one of PEFT's must be looked at.
    """
    from peft import LoraConfig

    read = {"base_model_name_or_path", "bias", "init_lora_weights", "lora_alpha", "lora_dropout"}
    read |= {"peft_type", "r", "target_modules", "use_rslora"}
    idle = {"auto_mapping", "inference_mode", "megatron_core", "peft_version", "revision"}
    idle |= {"corda_config", "eva_config", "loftq_config", "lora_ga_config", "runtime_config"}
    idle |= {"ensure_weight_tying", "qalora_group_size", "task_type"}
    names = {field.name for field in dataclasses.fields(LoraConfig)}
    return sorted(names - read - idle | {"setting_of_a_later_peft"})


def test_a_setting_that_may_change_the_computation_is_refused_by_name(on_disk, tmp_path):
    folder = tmp_path / "lora" / "peft"
    names = unknown_settings()
    assert {"use_dora", "alpha_pattern", "layers_to_transform"} < {*names}
    for name in names:
        for value in (0, True, 1.5, "x", {"q_proj": 3}):
            change_settings(folder, **{name: value})
            with pytest.raises(UserError, match=f"it uses {name}; train one without"):
                with_peft(folder, on_disk)
        change_settings(folder, **{name: None})
    base = tmp_path / "base" / "best_model.pt"
    for empty in (None, False, [], {}, ""):
        change_settings(folder, **dict.fromkeys(names, empty))
        with torch.no_grad():
            close(with_peft(folder, load_model(base).model).eval()(IDS), on_disk(IDS))


def test_a_folder_of_pefts_own_needs_to_be_told_its_base(on_disk, tokenizer, tmp_path):
    of_peft(on_disk, KINDS["rslora"]).save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match="--base-checkpoint"):
        load_model(tmp_path / "theirs")
    loaded = load_model(tmp_path / "theirs", base=tmp_path / "base" / "best_model.pt")
    with torch.no_grad():
        close(loaded.model.eval()(IDS), on_disk(IDS))


def test_a_folder_of_ours_finds_its_base_by_itself(on_disk, tmp_path):
    loaded = load_model(tmp_path / "lora" / "peft")
    with torch.no_grad():
        close(loaded.model.eval()(IDS), on_disk(IDS))


def test_a_folder_of_pefts_own_tells_nothing_of_its_training(on_disk, tmp_path):
    """The base's claim to have seen depth 1 to 3 alone would be false of the adapter."""
    of_peft(on_disk, KINDS["rslora"]).save_pretrained(tmp_path / "theirs")
    base = tmp_path / "base" / "best_model.pt"
    loaded = load_model(tmp_path / "theirs", base=base)
    assert (loaded.stage, loaded.step, loaded.trained_on) == ("adapter", 0, None)
    assert loaded.tokenizer.hash == load_model(base).tokenizer.hash


def test_a_folder_of_ours_tells_what_the_adapters_checkpoint_does(on_disk, tokenizer, tmp_path):
    base = load_model(tmp_path / "base" / "best_model.pt")
    base.model.config = dataclasses.replace(base.model.config, max_seq_length=77)
    seen = dataclasses.replace(
        base.trained_on, depths=(1, 2, 3, 4), styles={"nested": 7, "flat": 2}
    )
    trained = dataclasses.replace(base, stage="instruction_lora", step=17, trained_on=seen)
    trained = with_adapter(trained, KINDS["rslora"], str(tmp_path / "base" / "best_model.pt"))
    save_checkpoint(tmp_path / "lora" / "lora_adapter.pt", trained)
    save_peft(tmp_path / "lora" / "peft", read_checkpoint(tmp_path / "lora" / "lora_adapter.pt"))
    for name in ("lora_adapter.pt", "peft"):
        loaded = load_model(tmp_path / "lora" / name)
        assert (loaded.stage, loaded.step) == ("instruction_lora", 17), name
        assert loaded.trained_on == seen, name
        assert loaded.model.config.max_seq_length == 77, name


def _said(**changes):
    """A change of what the metadata of a folder of ours say; None drops a key."""

    def change(text):
        said = {**json.loads(text), **changes}
        return json.dumps({key: value for key, value in said.items() if value is not None})

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda text: text[:-5], "Expecting"),
        (lambda text: "", "Expecting"),
        (lambda text: "[" * 100_000, "recursion"),
        (lambda text: "[1]", "training is [1], not of type dict"),
        (_said(stage=None), "stage is missing"),
        (_said(stage=5), "stage is 5"),
        (_said(step="many"), "step is 'many'"),
        (_said(trained_on=None), "trained_on is missing"),
        (_said(trained_on={"depths": 3}), "styles is missing"),
        (_said(model_config=None), "model_config is missing"),
        (_said(model_config=[]), "model_config is [], not of type dict"),
        (_said(model_config={}), "shape"),
        (_said(model_config=7), ""),
        (_said(model_config={"d_modle": 5}), "did you mean d_model"),
    ],
)
def test_damaged_metadata_are_one_line(on_disk, tmp_path, change, named):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = tmp_path / "lora" / "peft" / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata["training"] = change(metadata["training"])
    save_file(load_file(path), path, metadata)
    with pytest.raises(UserError, match="damaged metadata") as error:
        load_model(path.parent)
    assert str(error.value).startswith(str(path))
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def change_settings(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"peft_type": "IA3"}, "not a plain LoRA adapter"),
        ({"bias": "all"}, "without biases"),
        ({"use_dora": True}, "use_dora"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": None}, "lora_rank"),
        ({"r": 2}, "does not fit"),
        ({"lora_alpha": "big"}, "lora_alpha"),
        ({"target_modules": None}, "target-modules"),
        ({"target_modules": ["c_attn"]}, "c_attn"),
        ({"target_modules": ["q_proj"]}, "does not fit"),
        ({"target_modules": 7}, "target-modules"),
        ({"target_modules": ["q_proj", 7]}, "target-modules"),
        ({"r": 10**18}, "does not fit"),
        ({"layers_to_transform": 0}, "layers_to_transform"),
        ({"exclude_modules": ["v_proj"]}, "exclude_modules"),
    ],
)
def test_a_peft_folder_that_would_compute_something_else_is_refused(
    on_disk, tmp_path, changes, named
):
    folder = tmp_path / "lora" / "peft"
    change_settings(folder, **changes)
    with pytest.raises(UserError, match=named) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize(
    "damage", [_truncate, lambda path: path.write_bytes(b"")], ids=["truncated", "empty"]
)
def test_a_damaged_peft_folder_is_refused(on_disk, tmp_path, name, damage):
    damage(tmp_path / "lora" / "peft" / name)
    with pytest.raises(UserError, match=name):
        load_model(tmp_path / "lora" / "peft")


def test_a_peft_folder_without_weights_is_refused(on_disk, tmp_path):
    (tmp_path / "lora" / "peft" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="no such adapter file"):
        load_model(tmp_path / "lora" / "peft")


# --------------------------------------------------------------------------- the adapter itself


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_a_fresh_adapter_changes_nothing_at_all(config):
    with torch.no_grad():
        assert torch.equal(add_lora(fresh_model(), config)(IDS), fresh_model()(IDS))


def test_a_starts_kaiming_uniform_and_b_at_zero():
    model = add_lora(fresh_model(), LoRAConfig(lora_rank=16))
    for _, layer in lora_layers(model):
        bound = layer.base_layer.in_features**-0.5  # sqrt(6 / ((1 + 5) fan_in))
        assert 0.95 * bound < layer.lora_A.weight.abs().max() <= bound
        assert not layer.lora_B.weight.any()


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_merged_computes_the_same(config):
    model = trained(fresh_model(), config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = merge_adapter(model)
    with torch.no_grad():
        close(merged(IDS), model(IDS))
        assert (merged(IDS) - fresh_model()(IDS)).abs().max() > 0.1
    assert not lora_layers(merged)
    assert merged.state_dict().keys() == fresh_model().state_dict().keys()
    for name, tensor in model.state_dict().items():  # merging happens on a copy
        assert torch.equal(tensor, before[name])


def test_merging_what_is_not_finite_is_refused():
    model = trained(fresh_model())
    layer = lora_layers(model)[0][1]
    layer.lora_A.weight.data.fill_(10.0)
    layer.lora_B.weight.data.fill_(1e38)
    with pytest.raises(UserError, match="not finite"):
        merge_adapter(model)


def test_without_its_adapter_a_model_is_its_base_bit_for_bit():
    with torch.no_grad():
        base = fresh_model()
        base.model.layers[0].self_attn.q_proj.weight[0, :] = -0.0  # adding zero would lose the sign
    signs = torch.signbit(base.model.layers[0].self_attn.q_proj.weight)
    plain = without_adapter(add_lora(base, KINDS["attention"]))
    assert torch.equal(torch.signbit(plain.model.layers[0].self_attn.q_proj.weight), signs)
    assert plain.state_dict().keys() == fresh_model().state_dict().keys()


def test_a_disabled_adapter_is_the_base_and_comes_back():
    model, base = trained(fresh_model()), fresh_model()
    with torch.no_grad():
        with disable_adapter(model):
            assert torch.equal(model(IDS), base(IDS))
            with disable_adapter(model):
                assert torch.equal(model(IDS), base(IDS))
            assert torch.equal(model(IDS), base(IDS))
        assert not torch.equal(model(IDS), base(IDS))
        with pytest.raises(RuntimeError), disable_adapter(model):
            raise RuntimeError
        assert not torch.equal(model(IDS), base(IDS))


def test_dropout_touches_the_adapters_input_alone():
    model = trained(fresh_model(), LoRAConfig(lora_dropout=0.5)).train()
    with torch.no_grad():
        assert not torch.equal(model(IDS), model(IDS))
        with disable_adapter(model):
            assert torch.equal(model(IDS), fresh_model()(IDS))
        model.eval()
        assert torch.equal(model(IDS), model(IDS))


def test_dropout_is_on_the_input_not_on_the_output():
    """Through one rank all outputs of a row feel the same dropped inputs."""
    torch.manual_seed(0)
    base = torch.nn.Linear(4, 6, bias=False)
    layer = LoRALinear(base, LoRAConfig(lora_rank=1, lora_dropout=0.5)).train()
    with torch.no_grad():
        for part in (layer.lora_A, layer.lora_B):
            part.weight.fill_(1.0)
        x = torch.ones(100, 4)
        correction = (layer(x) - base(x)) / layer.scale
    torch.testing.assert_close(correction, correction[:, :1].expand(-1, 6))
    assert {*correction[:, 0].round().tolist()} == {0.0, 2.0, 4.0, 6.0, 8.0}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_the_adapter_trains_and_all_else_stays_bit_equal(optimizer, tied):
    config = LoRAConfig(lora_target_modules="attention,feedforward")
    model = add_lora(fresh_model(tie_embeddings=tied), config).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    steps = build_optimizer(model, TrainingConfig(optimizer=optimizer, weight_decay=0.1))
    for _ in range(3):
        model(IDS).square().mean().backward()
        steps.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("lora_" not in name), name


def test_embedding_and_head_are_never_targets():
    everything = LoRAConfig(lora_target_modules="attention,feedforward")
    model = add_lora(fresh_model(tie_embeddings=True), everything)
    assert {path.rpartition(".")[2] for path, _ in lora_layers(model)} == {*ATTENTION, *FEEDFORWARD}
    assert len(lora_layers(model)) == 7 * 2
    for name in ("lm_head", "embed_tokens"):
        with pytest.raises(UserError, match=f"no module matched '{name}'; there are attention"):
            target_names(name)


def test_targets_are_groups_and_single_names():
    assert target_names("attention") == tuple(ATTENTION)
    assert target_names(" feedforward , q_proj,up_proj") == (*FEEDFORWARD, "q_proj")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("qproj", "no module matched 'qproj'; did you mean q_proj?"),
        ("attention,feed_forward", "did you mean feedforward?"),
        ("xyz", "there are attention, feedforward, q_proj"),
        (" , ", "is empty; choose from attention, feedforward"),
    ],
)
def test_a_target_that_is_none_names_the_candidates(spec, message):
    with pytest.raises(UserError) as caught:
        target_names(spec)
    assert message in str(caught.value)


# --------------------------------------------------------------------------- beside its base


def loads_as(path, model, **options):
    with torch.no_grad():
        close(load_model(path, **options).model.eval()(IDS), model(IDS))


def test_an_adapter_file_holds_the_adapter_alone(on_disk, tmp_path):
    content = read_checkpoint(tmp_path / "lora" / "lora_adapter.pt")
    assert content.weights.keys() == adapter_weights(on_disk).keys()
    assert len(content.adapter["base_hash"]) == 64


def test_an_adapter_loads_merged_and_can_be_saved_as_any_model(on_disk, tokenizer, tmp_path):
    checkpoint = load_model(tmp_path / "lora" / "lora_adapter.pt")
    save_checkpoint(tmp_path / "merged.pt", checkpoint)
    for folder in ("base", "lora"):
        shutil.rmtree(tmp_path / folder)
    loads_as(tmp_path / "merged.pt", on_disk)
    assert load_model(tmp_path / "merged.pt").tokenizer.hash == tokenizer.hash


def test_a_base_that_was_renamed_is_found_by_its_hash(on_disk, tokenizer, tmp_path):
    (tmp_path / "base").rename(tmp_path / "archive")
    (tmp_path / "archive" / "best_model.pt").rename(tmp_path / "archive" / "final_model.pt")
    other = random_model(tokenizer.vocab_size, seed=8)
    save_checkpoint(tmp_path / "base" / "best_model.pt", checkpoint_of(other, tokenizer))
    loads_as(tmp_path / "lora" / "lora_adapter.pt", on_disk)


def test_a_base_is_found_from_a_folder_within_the_models_folder(on_disk, tmp_path):
    """As a GRPO run has it: models/grpo/RUN/lora_adapter.pt, models/RUN/best_model.pt."""
    (tmp_path / "base").rename(tmp_path / "archive")
    (tmp_path / "grpo").mkdir()
    (tmp_path / "lora").rename(tmp_path / "grpo" / "lora")
    for name in ("lora_adapter.pt", "peft"):
        loads_as(tmp_path / "grpo" / "lora" / name, on_disk)


@pytest.mark.parametrize("name", ["lora_adapter.pt", "peft"])
def test_a_base_is_read_once(on_disk, tmp_path, monkeypatch, name):
    """Reading takes most of the time of loading a large model."""
    read = []
    reader = load.read_checkpoint
    monkeypatch.setattr(load, "read_checkpoint", lambda path: read.append(path) or reader(path))
    base = tmp_path / "base" / "best_model.pt"
    for named in ("", base):
        loads_as(tmp_path / "lora" / name, on_disk, base=named)
        assert read.count(base) == 1
        assert len(read) == len({*read})
        read.clear()


def test_a_base_that_is_far_away_must_be_named(on_disk, tmp_path, tmp_path_factory):
    far = tmp_path_factory.mktemp("far") / "model.pt"
    shutil.move(tmp_path / "base" / "best_model.pt", far)
    for path in (tmp_path / "lora" / "lora_adapter.pt", tmp_path / "lora" / "peft"):
        with pytest.raises(UserError, match="say where it is with --base-checkpoint"):
            load_model(path)
        loads_as(path, on_disk, base=far)


def test_another_base_is_refused(on_disk, tokenizer, tmp_path):
    other = random_model(tokenizer.vocab_size, seed=8)
    save_checkpoint(tmp_path / "other.pt", checkpoint_of(other, tokenizer))
    for path in (tmp_path / "lora" / "lora_adapter.pt", tmp_path / "lora" / "peft"):
        with pytest.raises(UserError, match=r"other\.pt: not the base of"):
            load_model(path, base=tmp_path / "other.pt")


def test_a_base_for_a_model_that_needs_none_is_refused(on_disk, tmp_path):
    base = tmp_path / "base" / "best_model.pt"
    with pytest.raises(UserError, match="leave --base-checkpoint out"):
        load_model(base, base=base)


@pytest.mark.parametrize(
    "change",
    [
        {"config": {}},
        {"config": {"lora_rank": "many"}},
        {"config": {"lora_rank": 10**18}},
        {"config": {"rank": 2}},
        {"config": None},
    ],
)
def test_an_adapter_with_damaged_settings_is_refused(on_disk, tmp_path, change):
    path = tmp_path / "lora" / "lora_adapter.pt"
    content = torch.load(path, weights_only=True)
    content["adapter"].update(change)
    torch.save(content, path)
    with pytest.raises(UserError) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
