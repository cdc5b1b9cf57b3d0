"""The model against transformers' Qwen3, and what a row may and may not see."""

import random
from unittest.mock import patch

import pytest
import torch
from helpers import TINY, of_transformers, random_model

from arithmetic_llm.config import ModelConfig
from arithmetic_llm.model import transformer
from arithmetic_llm.model.fused import rotate
from arithmetic_llm.model.tokenizer import PAD
from arithmetic_llm.model.transformer import ArithmeticModel, initialise, rotary_angles
from arithmetic_llm.runtime import UserError

VOCAB = 61
MODEL = random_model(VOCAB)
NARROW = random_model(VOCAB, attention_window=5)


def random_ids(rows, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(6, VOCAB, (rows, tokens), generator=generator)


# ----------------------------------------------------------------------------------- parity


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rope_theta", [10000.0, 500.0])
@pytest.mark.parametrize("window", [0, 1, 16, 200])
def test_logits_equal_those_of_transformers(tied, rope_theta, window):
    shape = {"tie_embeddings": tied, "rope_theta": rope_theta, "attention_window": window}
    model = random_model(VOCAB, **shape)
    ids = random_ids(3, 150)
    ours, theirs = model(ids), of_transformers(model)(ids).logits
    assert ours.std() > 0.5  # else closeness would say little
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("model", [MODEL, NARROW], ids=["whole", "window"])
def test_cached_logits_of_ragged_rows_equal_those_of_transformers(model):
    theirs = of_transformers(model)
    lengths, steps = torch.tensor([20, 3, 11]), 6
    ids = random_ids(3, 20 + steps)
    cache = model.new_cache(3)
    model.hidden_states(ids[:, :20], cache, lengths)
    for step in range(steps):
        at = lengths + step
        ours = model(ids[torch.arange(3), at][:, None], cache)[:, 0]
        for row in range(3):
            expected = theirs(ids[row : row + 1, : at[row] + 1]).logits[0, -1]
            torch.testing.assert_close(ours[row], expected, atol=1e-4, rtol=0)


def test_products_that_nothing_learns_from_are_onednns_and_the_same():
    ids, counted = random_ids(2, 40), []
    product = transformer._onednn

    def counting(*given):
        counted.append(given)
        return product(*given)

    with patch.object(transformer, "_onednn", counting):
        learned = MODEL(ids)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            MODEL(ids)
        assert not counted
        with torch.no_grad():
            read = MODEL(ids)
    assert len(counted) == 7 * MODEL.config.num_layers + 1
    torch.testing.assert_close(read, learned, rtol=1e-4, atol=1e-5)
    with patch.object(transformer, "_onednn", None), torch.no_grad():  # a build without it
        torch.testing.assert_close(MODEL(ids), learned)


# --------------------------------------------------------------------------------- the cache


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[1] * 12, [5, 7], [4, 1, 1, 6]])
@pytest.mark.parametrize("model", [MODEL, NARROW], ids=["whole", "window"])
def test_the_cache_changes_no_logits_however_the_text_is_cut(model, cuts):
    ids = random_ids(2, 12)
    cache = model.new_cache(2)
    parts = [model(part, cache) for part in ids.split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids), atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_window_hides_what_lies_further_back_layer_by_layer():
    ids = random_ids(1, 30)
    changed = ids.clone()
    changed[0, 3] = (ids[0, 3] + 1) % VOCAB
    differs = (NARROW(ids) != NARROW(changed)).any(-1)[0]
    reach = 3 + (NARROW.config.attention_window - 1) * NARROW.config.num_layers
    assert differs.nonzero().flatten().tolist() == list(range(3, reach + 1))


@torch.no_grad()
def test_rows_that_are_dropped_leave_the_others_alone():
    ids = random_ids(3, 9)
    cache, reference = MODEL.new_cache(3), MODEL(ids)
    MODEL.hidden_states(ids[:, :8], cache, torch.tensor([8, 2, 8]))
    cache.keep(torch.tensor([0, 2]))
    last = MODEL(ids[[0, 2], 8:], cache)
    torch.testing.assert_close(last[:, 0], reference[[0, 2], 8], atol=1e-4, rtol=0)


# ----------------------------------------------------------------------------------- padding


@torch.no_grad()
def test_whatever_stands_in_the_padding_no_bit_of_any_row_changes():
    lengths = torch.tensor([15, 4, 9])
    padding = torch.arange(15) >= lengths[:, None]
    last = []
    for filler in (PAD, 7, VOCAB - 1):
        ids = random_ids(3, 15).masked_fill(padding, filler)
        cache = MODEL.new_cache(3)
        hidden = MODEL.hidden_states(ids, cache, lengths)
        following = MODEL(random_ids(3, 1, seed=9), cache)
        last.append((hidden[~padding], following))
    for hidden, following in last[1:]:
        assert torch.equal(hidden, last[0][0])
        assert torch.equal(following, last[0][1])


@torch.no_grad()
def test_garbage_in_unused_slots_of_the_cache_changes_no_bit():
    lengths, ids, following = torch.tensor([15, 4]), random_ids(2, 15), random_ids(2, 1, seed=9)
    results = []
    for garbage in (0.0, 1e30, -1e30):
        cache = MODEL.new_cache(2)
        MODEL.hidden_states(ids, cache, lengths)
        cache.keys[:, 1, :, 4:] = garbage
        cache.values[:, 1, :, 4:] = garbage
        results.append(MODEL(following, cache))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@torch.no_grad()
@pytest.mark.parametrize("model", [MODEL, NARROW], ids=["whole", "window"])
@pytest.mark.parametrize("seed", range(5))
def test_drafts_of_any_length_that_rows_accept_in_part_change_no_logits(model, seed):
    """Passes of 1 to 9 tokens, the last of them wrong; each row goes on from where it is right."""
    rng, ids = random.Random(seed), random_ids(3, 100, seed)
    whole, rows = model(ids), torch.arange(3)[:, None]
    cache = model.new_cache(3)
    model.hidden_states(ids[:, :8], cache, torch.tensor([8, 2, 5]))
    while cache.lengths.max() < 90:
        start, tokens = cache.lengths, rng.randint(1, 9)
        right = torch.tensor([rng.randint(1, tokens) for _ in range(3)])
        positions = start[:, None] + torch.arange(tokens)
        read = ids[rows, positions]
        wrong = torch.arange(tokens) >= right[:, None]
        logits = model.lm_head(model.hidden_states(read.masked_fill(wrong, PAD), cache, right))
        torch.testing.assert_close(
            logits[~wrong], whole[rows, positions][~wrong], atol=1e-4, rtol=0
        )
    assert cache.lengths.max() - cache.lengths.min() > 5  # rows apart by more than the window
    assert cache.slots == 5 + 9 - 1 if model is NARROW else cache.slots >= 90


@torch.no_grad()
def test_with_a_window_a_cache_is_no_larger_than_what_a_pass_sees():
    ids = random_ids(2, 200)
    cache = NARROW.new_cache(2)
    for part in ids.split(3, dim=1):
        NARROW(part, cache)
    assert cache.slots == cache.held.shape[1] == 5 + 3 - 1
    assert sorted(cache.held[0].tolist()) == [*range(193, 200)]


@torch.no_grad()
def test_no_position_sees_a_later_one():
    ids = random_ids(2, 12)
    changed = ids.clone()
    changed[:, 7:] = random_ids(2, 5, seed=3)
    assert torch.equal(MODEL(ids)[:, :7], MODEL(changed)[:, :7])
    assert not torch.allclose(MODEL(ids)[:, 7:], MODEL(changed)[:, 7:])


@torch.no_grad()
def test_no_row_sees_another():
    ids = random_ids(3, 12)
    changed = ids.clone()
    changed[1] = random_ids(1, 12, seed=3)
    assert torch.equal(MODEL(ids)[[0, 2]], MODEL(changed)[[0, 2]])


# ------------------------------------------------------------------------------- its pieces


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 8)

    def score(at_q, at_k):
        turned = [
            rotate(x, *rotary_angles(torch.tensor(at), 8, 100.0))
            for x, at in ((q, at_q), (k, at_k))
        ]
        assert turned[0].norm() == pytest.approx(q.norm().item(), rel=1e-6)
        return (turned[0] @ turned[1]).item()

    assert score(9, 4) == pytest.approx(score(25, 20), rel=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), rel=1e-2)


def test_a_fresh_model_starts_as_the_identity_between_embedding_and_head():
    torch.manual_seed(0)
    model = initialise(ArithmeticModel(ModelConfig(**TINY), VOCAB))
    ids = random_ids(2, 6)
    hidden = model.model.norm(model.model.embed_tokens(ids))
    torch.testing.assert_close(model(ids), model.lm_head(hidden))


@pytest.mark.parametrize("tied", [False, True])
def test_composed_tokens_start_as_the_sum_of_their_parts_and_others_as_ever(tied):
    """Read and written: in the embedding and in the head."""
    drawn = []
    for composed in ({}, {40: (7, 50), 41: (8, 50)}):
        torch.manual_seed(0)
        shape = ModelConfig(**TINY, tie_embeddings=tied)
        drawn.append(initialise(ArithmeticModel(shape, VOCAB), composed))
    plain, summed = ([m.model.embed_tokens.weight, m.lm_head.weight] for m in drawn)
    for before, after in zip(plain, summed, strict=True):
        others = [token for token in range(VOCAB) if token not in (40, 41)]
        assert torch.equal(after[others], before[others])
        assert torch.equal(after[40], before[7] + before[50])
        assert torch.equal(after[41], before[8] + before[50])


def test_dropout_is_on_in_training_and_off_in_evaluation():
    model = random_model(VOCAB, dropout=0.5)
    ids = random_ids(2, 6)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_a_tied_head_is_the_embedding_and_counts_once():
    tied, untied = random_model(VOCAB, tie_embeddings=True), random_model(VOCAB)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.parameter_count() - tied.parameter_count() == VOCAB * TINY["d_model"]


@pytest.mark.parametrize(
    ("shape", "named"), [({"d_model": 30, "nhead": 4}, "nhead"), ({"d_model": 6}, "even")]
)
def test_a_shape_that_cannot_be_is_refused(shape, named):
    with pytest.raises(UserError, match=named):
        ModelConfig(**{**TINY, **shape})
