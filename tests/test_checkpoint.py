"""Checkpoints: whole or not there, never executed, and refused by name if anything is wrong."""

import io
import pickle
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    ROOT,
    Hostile,
    checkpoint_of,
    edit,
    full_when_flushing,
    full_when_writing,
    make_tokenizer,
    put,
    random_model,
)

from arithmetic_llm.model.checkpoint import save_checkpoint, weights_hash
from arithmetic_llm.model.load import check_tokenizer, load_model
from arithmetic_llm.runtime import UserError, atomic_write, atomic_write_text


@pytest.fixture
def saved(tiny_model, tokenizer, tmp_path):
    """The path of a fresh checkpoint that a test may damage."""
    path = tmp_path / "model.pt"
    save_checkpoint(path, checkpoint_of(tiny_model, tokenizer))
    return path


def refusal(path):
    """The one line that a load is refused with; it names the file."""
    with pytest.raises(UserError) as caught:
        load_model(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    return text


# -------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_everything_comes_back(tokenizer, tmp_path, tied):
    model = random_model(tokenizer.vocab_size, tie_embeddings=tied, dropout=0.25)
    checkpoint = checkpoint_of(model, tokenizer)
    checkpoint.step = 17
    checkpoint.training = {"best": 0.5, "rng": torch.get_rng_state()}
    save_checkpoint(tmp_path / "m.pt", checkpoint)
    loaded = load_model(tmp_path / "m.pt")
    assert weights_hash(loaded.model) == weights_hash(model)
    assert loaded.model.config == model.config
    assert (loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight) == tied
    assert loaded.tokenizer.hash == tokenizer.hash
    assert (loaded.stage, loaded.step) == ("foundational", 17)
    assert loaded.trained_on == checkpoint.trained_on
    assert torch.equal(loaded.training["rng"], checkpoint.training["rng"])
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())


def test_it_needs_no_file_beside_it(saved, tiny_model):
    elsewhere = saved.rename(saved.parent / "other.pt")
    ids = torch.tensor([[2, 50, 60]])
    assert torch.equal(load_model(elsewhere).model.eval()(ids), tiny_model(ids))


def test_loading_does_not_import_the_compiler_of_torch(saved):
    """It would take longer than all the rest."""
    code = (
        "import sys; from arithmetic_llm.model.load import load_model; load_model(sys.argv[1]); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, saved], check=True, cwd=ROOT)


def test_the_hash_of_the_weights_sees_every_change(tiny_model, tokenizer):
    changed = random_model(tokenizer.vocab_size)
    assert weights_hash(changed) == weights_hash(tiny_model)
    with torch.no_grad():
        changed.model.norm.weight[0] += 1e-6
    assert weights_hash(changed) != weights_hash(tiny_model)


# ------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.99999])
def test_a_truncated_file_is_refused(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(len(content) * share)])
    refusal(saved)


def test_a_flipped_bit_in_a_weight_is_noticed(saved, tiny_model):
    content = bytearray(saved.read_bytes())
    at = content.index(tiny_model.lm_head.weight.detach().numpy().tobytes())
    content[at + 1000] ^= 1
    saved.write_bytes(content)
    assert "have changed" in refusal(saved)


def test_code_in_a_checkpoint_is_refused_and_not_executed(saved, tmp_path):
    trace = tmp_path / "executed"
    edit(saved, lambda content: content.update(stage=Hostile(trace)))
    assert "was not executed" in refusal(saved)
    assert not trace.exists()
    torch.load(saved, weights_only=False)
    assert trace.exists()  # so the file was hostile indeed


def test_a_bare_pickle_is_refused_and_not_executed(tmp_path):
    path, trace = tmp_path / "model.pt", tmp_path / "executed"
    path.write_bytes(pickle.dumps(Hostile(trace)))
    refusal(path)
    assert not trace.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(saved, value):
    edit(saved, lambda content: content["weights"]["lm_head.weight"][3, 2].fill_(value))
    assert "lm_head.weight holds NaN or infinity" in refusal(saved)


def _set(*path_and_value):
    """A change that sets ``content[a][b]... = value``."""
    *path, value = path_and_value
    return partial(put, path, value)


def _drop(*path):
    *path, last = path

    def change(content):
        for key in path:
            content = content[key]
        del content[last]

    return change


HEAD = "lm_head.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_set("weights", HEAD, torch.zeros(3, 5)), "shape (3, 5), not"),
        (_drop("weights", HEAD), f"{HEAD} is missing"),
        (_set("weights", "surplus", torch.zeros(1)), "surplus is unknown"),
        (_set("weights", HEAD, "not a tensor"), ""),
        (_set("weights", 7, torch.zeros(1)), ""),
        (_set("weights", None), ""),
        (_drop("weights"), "weights is missing"),
        (_drop("model_config"), "model_config is missing"),
        (_set("model_config", "d_model", 64), "shape"),
        (_set("model_config", "d_model", 0), "d-model"),
        (_set("model_config", "d_model", "big"), "d_model"),
        (_set("model_config", "d_model", 10**15), ""),
        (_set("model_config", "num_layers", 10**12), "num-layers"),
        (_set("model_config", "nhead", 3), "nhead"),
        (_set("model_config", "rope_theta", float("nan")), "rope-theta"),
        (_set("model_config", "d_modle", 32), "did you mean d_model"),
        (_set("tokenizer", "{}"), "tokenizer"),
        (_set("tokenizer", make_tokenizer(150).serialized), "its tokenizer is another"),
        (_set("tokenizer_hash", None), "its tokenizer is another"),
        (_set("tokenizer", None), ""),
        (_set("trained_on", 5), "trained_on is 5, not of type dict"),
        (_set("trained_on", {"depths": 3}), "styles is missing"),
        (_set("trained_on", "depths", 3), "trained_on depths is 3, not of type list"),
        (_set("trained_on", "depths", ["1"]), "trained_on depths is '1', not of type int"),
        (
            _set("trained_on", "flat_terms", [True]),
            "trained_on flat_terms is True, not of type int",
        ),
        (_set("trained_on", "num_range", [1]), "trained_on num_range is [1], not 2 values"),
        (
            _set("trained_on", "num_range", [1, None]),
            "trained_on num_range is None, not of type int",
        ),
        (
            _set("trained_on", "styles", {"nested": "all"}),
            "trained_on styles is 'all', not of type int",
        ),
        (_set("trained_on", "splits", {5: 1}), "trained_on splits is 5, not of type str"),
        (_drop("trained_on", "splits"), "splits is missing"),
        (_set("stage", None), "stage is None, not of type str"),
        (_set("step", "many"), "step is 'many', not of type int"),
        (_set("step", 2.5), "step is 2.5, not of type int"),
        (_set("step", -1), "step is -1"),
        (_set("adapter", {}), "config is missing"),
        (_set("adapter", 0), "adapter is 0, not of type dict"),
        (_set("weights", HEAD, torch.zeros(3).to_sparse()), "no plain tensor"),
        (_set("weights", HEAD, torch.zeros(3, dtype=torch.int64)), "no plain tensor"),
        (_set("format", "another program's"), "not a checkpoint of this toolkit"),
    ],
)
def test_content_that_does_not_fit_is_refused(saved, change, named):
    edit(saved, change)
    assert named in refusal(saved)


def test_nothing_known_of_the_training_is_no_damage(saved):
    edit(saved, _set("trained_on", {}))
    assert load_model(saved).trained_on is None


def test_weights_of_another_kind_of_number_still_give_an_fp32_model(saved, tiny_model):
    """Exporters write bf16 or fp64; what does not fit must not crash in the first product."""

    def halve(content):
        content["weights"] = {name: w.double() for name, w in content["weights"].items()}

    edit(saved, halve)
    assert weights_hash(load_model(saved).model) == weights_hash(tiny_model)
    ids = torch.tensor([[2, 50, 60]])
    assert torch.equal(load_model(saved).model.eval()(ids), tiny_model(ids))


def test_other_files_are_refused(tmp_path, tokenizer):
    path = tmp_path / "model.pt"
    refusal(path)  # nothing there
    path.write_bytes(b"")
    assert "empty" in refusal(path)
    path.write_text("not a checkpoint")
    refusal(path)
    torch.save([1, 2, 3], path)
    refusal(path)
    (tmp_path / "folder.pt").mkdir()
    assert "is a directory" in refusal(tmp_path / "folder.pt")


def test_another_tokenizer_is_refused(tmp_path, tiny_model, tokenizer):
    checkpoint = checkpoint_of(tiny_model, tokenizer)
    make_tokenizer(150).save(tmp_path)
    with pytest.raises(UserError, match="not the tokenizer that here was trained with"):
        check_tokenizer(checkpoint, str(tmp_path), "here")
    tokenizer.save(tmp_path)
    check_tokenizer(checkpoint, str(tmp_path), "here")
    check_tokenizer(checkpoint, "", "here")


# ------------------------------------------------------------------------------- safe writes


@pytest.mark.parametrize("full", [full_when_writing, full_when_flushing])
@pytest.mark.parametrize("exists", [True, False], ids=["over an old file", "new file"])
def test_a_full_disk_leaves_the_old_file_and_no_other(
    tmp_path, tiny_model, tokenizer, monkeypatch, full, exists
):
    path = tmp_path / "model.pt"
    if exists:
        path.write_text("old")
    full(monkeypatch)
    with pytest.raises(UserError, match=r"model\.pt: cannot be written: No space left") as caught:
        save_checkpoint(path, checkpoint_of(tiny_model, tokenizer))
    assert "\n" not in str(caught.value)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("model.pt", "old")] * exists


def test_a_write_that_fails_lets_go_of_its_buffer(tmp_path, tiny_model, tokenizer, monkeypatch):
    """Python 3.12.1 crashes where an error's traceback holds a view of one."""
    buffers = []

    class Kept(io.BytesIO):
        def __init__(self):
            super().__init__()
            buffers.append(self)

    monkeypatch.setattr("arithmetic_llm.model.checkpoint.io", SimpleNamespace(BytesIO=Kept))
    full_when_writing(monkeypatch)
    with pytest.raises(UserError) as caught:  # whose traceback is alive to the end
        save_checkpoint(tmp_path / "model.pt", checkpoint_of(tiny_model, tokenizer))
    buffers[0].close()  # an open view would not let it
    del caught


def test_an_interrupt_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write_and_be_interrupted():
        with atomic_write(path) as file:
            file.write(b"half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_be_interrupted()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "old")]


def test_a_new_file_replaces_the_old_one_and_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    atomic_write_text(path, "one")
    atomic_write_text(path, "two\n")
    assert path.read_bytes() == b"two\n"
    assert [*path.parent.iterdir()] == [path]


def test_a_directory_in_the_way_is_named(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match=r"taken: cannot be written"):
        atomic_write_text(tmp_path / "taken", "text")
    assert [*tmp_path.iterdir()] == [tmp_path / "taken"]


def test_a_file_where_a_folder_should_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        atomic_write_text(tmp_path / "file" / "inside", "text")
