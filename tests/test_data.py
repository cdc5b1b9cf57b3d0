"""From records to batches: loss weights by hand, tight batches, gradients whatever the cut."""

import re
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import load_script, make_tokenizer, on_threads, random_model, records
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from arithmetic_llm.config import FoundationalConfig, LoRAConfig
from arithmetic_llm.corpus.files import json_line
from arithmetic_llm.corpus.record import Record, rewriting
from arithmetic_llm.model.lora import add_lora
from arithmetic_llm.model.tokenizer import PAD
from arithmetic_llm.runtime import UserError
from arithmetic_llm.task.solution import solve
from arithmetic_llm.task.text import problem_text
from arithmetic_llm.threads import pool
from arithmetic_llm.training import batches
from arithmetic_llm.training.batches import LossWeights, TokenisedSamples, plan_epoch
from arithmetic_llm.training.step import update
from arithmetic_llm.training.supervised import SupervisedTask, held_out_sums

TOKENIZER = make_tokenizer()
PLAIN = LossWeights(prompt=1.0, result=1.0)
RECORDS = records(600, seed=3)


def record(expression):
    solution = solve(expression)
    return Record(expression, problem_text(expression), solution.text, solution.answer)


def tokenised(
    corpus=RECORDS, tokenizer=TOKENIZER, max_seq_length=1000, loss=PLAIN, excerpt_tokens=0
):
    return TokenisedSamples(corpus, tokenizer, max_seq_length, loss, excerpt_tokens)


def texts_of(samples):
    """The text of each sample."""
    cut = np.split(samples.ids, samples.starts[1:-1])
    return [TOKENIZER.decode(ids.tolist()) for ids in cut]


# ----------------------------------------------------------------------------- loss weights


def test_token_weights_by_hand():
    samples = tokenised([record("2 - (1 - 15)")], loss=LossWeights(prompt=0.5, result=3.0))
    texts = [TOKENIZER.token(i) for i in samples.ids]
    assert [*zip(texts, samples.weights.tolist(), strict=True)] == [
        ("<bos>", 0.0),  # nothing can predict it
        ("Evaluate: ", 0.5),
        ("2", 0.5),
        (" - ", 0.5),
        ("(", 0.5),
        ("1", 0.5),
        (" - ", 0.5),
        ("5", 0.5),  # 15, the units first
        ("1", 0.5),
        (")", 0.5),
        (" ", 0.5),
        ("<think>", 0.5),
        (" Step ", 1.0),
        ("1", 1.0),
        (": ", 1.0),
        ("1", 1.0),
        (" - ", 1.0),
        ("5", 1.0),
        ("1", 1.0),
        (" = ", 1.0),
        ("-", 3.0),  # a result is its sign, its digits, and the token that ends it
        ("4", 3.0),
        ("1", 3.0),
        (" Expression now: ", 3.0),
        ("2", 1.0),
        (" - ", 1.0),
        ("-", 1.0),
        ("4", 1.0),
        ("1", 1.0),
        (" Step ", 1.0),
        ("2", 1.0),
        (": ", 1.0),
        ("2", 1.0),
        (" - ", 1.0),
        ("-", 1.0),
        ("4", 1.0),
        ("1", 1.0),
        (" = ", 1.0),
        ("6", 3.0),
        ("1", 3.0),
        (" Expression now: ", 3.0),
        ("6", 1.0),
        ("1", 1.0),
        (" ", 1.0),
        ("</think>", 1.0),
        (" Final Result: ", 1.0),
        ("6", 1.0),
        ("1", 1.0),
        ("<eos>", 1.0),
    ]


# --------------------------------------------------------------------------------- excerpts


def test_an_excerpt_begins_where_the_one_before_it_ended():
    samples = tokenised([record("1 + 2 + 3 - 4")], loss=LossWeights(0.5, 3.0), excerpt_tokens=45)
    assert texts_of(samples) == [
        "<bos>Evaluate: 1 + 2 + 3 - 4 <think> Step 1: 1 + 2 = 3 Expression now: 3 + 3 - 4"
        " Step 2: 3 + 3 = 6 Expression now: 6 - 4",
        "<bos> Step 2: 3 + 3 = 6 Expression now: 6 - 4"
        " Step 3: 6 - 4 = 2 Expression now: 2 </think> Final Result: 2<eos>",
    ]
    first, second = np.split(samples.weights, samples.starts[1:-1])
    steps = [*[1] * 7, *[3] * 2, *[1] * 5, *[1] * 7, *[3] * 2, *[1] * 3]
    assert first.tolist() == [0, *[0.5] * 10, *steps]
    assert second[:22].tolist() == [0, *[0.5] * 12, *[1] * 7, *[3] * 2]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 700), st.integers(0, 10**6))
def test_excerpts_have_every_step_once_and_no_more_than_fits(most, seed):
    drawn = records(1, seed=seed)
    whole, cut = tokenised(drawn), tokenised(drawn, excerpt_tokens=most)
    solution = texts_of(whole)[0].partition("<think>")[2]
    pieces = texts_of(cut)
    begin = r"<bos>(.*?<think>| Step [^S]* Expression now: [^S]*(?= Step ))"
    seeds = [re.match(begin, text)[0] for text in pieces]
    rests = [text.removeprefix(seed) for text, seed in zip(pieces, seeds, strict=True)]
    assert "".join(rests) == solution
    for piece, rest, length in zip(pieces, rests, cut.lengths, strict=True):
        assert length <= most or rest.count(" Step ") <= 1 or len(pieces) == 1
        assert piece.count("<eos>") == (piece is pieces[-1])
    for before, begin in zip(rests, seeds[1:], strict=False):
        assert before.endswith(begin.removeprefix("<bos>"))


def test_an_excerpt_has_room_for_its_end_too():
    long = record("1 + 2 + 3 - 4 + (5 - 6) + 7 - 8")
    for most in range(50, 200):  # two of these steps and what they go on from are shorter
        assert max(tokenised([long], excerpt_tokens=most).lengths) <= most


def test_what_has_no_step_is_never_cut():
    samples = tokenised([record("1 + + 2"), record("1 + 2")], excerpt_tokens=2)
    assert len(samples) == 2
    assert texts_of(samples)[0].endswith("Final Result: ERROR<eos>")


@pytest.mark.parametrize(
    "trace",
    [
        "Step 1: 1 + 2 = 3 Expression now: 3 - 4 Step 2: 3 - 4 = -1",
        "Expression now: 1 + 2 - 4 Step 1: 1 + 2 = 3 Expression now: 3 - 4 Step 2: 3 - 4 = -1",
        "Expression now: 3 - 4",
    ],
)
def test_a_solution_in_which_steps_and_expressions_take_no_turns_stays_whole(trace):
    odd = record("1 + 2 - 4")._replace(solution=f"<think> {trace} </think> Final Result: -1")
    assert texts_of(tokenised([odd], excerpt_tokens=20)) == texts_of(tokenised([odd]))


def test_a_rewriting_is_like_the_excerpt_of_one_step():
    """The step before stands there like a prompt, and nothing ends with it."""
    long, loss = record("1 + 2 + 3 - 4"), LossWeights(0.5, 3.0)
    cut = tokenised([long], loss=loss, excerpt_tokens=2)  # a step each
    step = rewriting(long.expression, solve(long.expression), 2, 2)
    alone = tokenised([step], loss=loss, excerpt_tokens=2)
    middle = slice(cut.starts[1], cut.starts[2])
    assert alone.ids.tolist() == cut.ids[middle].tolist()
    assert alone.weights.tolist() == cut.weights[middle].tolist()
    assert texts_of(alone) == [
        "<bos> Step 1: 1 + 2 = 3 Expression now: 3 + 3 - 4 Step 2: 3 + 3 = 6 Expression now: 6 - 4"
    ]


def test_a_first_step_is_like_the_first_excerpt_of_its_problem():
    long, loss = record("1 + 2 + 3 - 4"), LossWeights(0.5, 3.0)
    cut = tokenised([long], loss=loss, excerpt_tokens=2)  # a step each
    step = rewriting(long.expression, solve(long.expression), 1, 1)
    alone = tokenised([step], loss=loss, excerpt_tokens=2)
    assert alone.ids.tolist() == cut.ids[: cut.starts[1]].tolist()
    assert alone.weights.tolist() == cut.weights[: cut.starts[1]].tolist()


def test_the_table_of_lengths_has_a_row_for_rewritings(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer")
    step = rewriting("1 + 2 + 3 - 4", solve("1 + 2 + 3 - 4"), 2, 2)
    (tmp_path / "c.jsonl").write_text("".join(map(json_line, [step, record("1 + 2")])))
    counted = load_script("check_sequence_lengths.py").lengths_by_depth
    told = counted(tmp_path / "c.jsonl", tmp_path / "tokenizer")
    one_step, sample = tokenised([step, record("1 + 2")]).lengths.tolist()
    assert told == {"rewrite": [one_step], "1": [sample]}


def test_records_are_counted_not_their_excerpts():
    samples = tokenised([record("1 + 2 + 3 - 4"), record("1 + 2")], excerpt_tokens=20)
    assert len(samples) > samples.kept == 2


def test_a_step_longer_than_the_context_drops_its_sample():
    two = [record("1 + 2 + 3 - 4"), record("1 + 2")]
    samples = tokenised(two, max_seq_length=23, excerpt_tokens=20)
    assert samples.dropped == ["1 + 2 + 3 - 4"]
    assert len(samples) == 1


def test_weights_start_anew_with_each_sample():
    loss = LossWeights(prompt=0.5, result=3.0)
    first, second = (tokenised([record(e)], loss=loss).weights for e in ("1 + 2", "3 - 5"))
    both = tokenised([record("1 + 2"), record("3 - 5")], loss=loss).weights
    assert both.tolist() == [*first, *second]


@pytest.mark.parametrize(("least", "digits"), [(145, "places"), (101, "alone")])
@pytest.mark.parametrize("merges", [0, 14, 29])
def test_results_are_found_whatever_the_merges(merges, least, digits):
    """With few merges, "=" and the space after it are tokens of their own."""
    small = make_tokenizer(least + merges, digits)
    samples = tokenised([record("7 - 12")], small, loss=LossWeights(prompt=0.0, result=3.0))
    marked = [small.token(i) for i, w in zip(samples.ids, samples.weights, strict=True) if w == 3]
    assert marked[:2] == ["-", "5"]
    assert len(marked) == 3  # and the token behind it


# ----------------------------------------------------------------------------------- samples


def test_a_batch_predicts_each_token_from_those_before_it():
    samples = tokenised([record("1 + 2"), record("(1 + 2) - 30")])
    batch = samples.batch([0, 1])
    for row in range(2):
        ids = samples.ids[samples.starts[row] : samples.starts[row + 1]].tolist()
        length = len(ids) - 1
        assert batch.input_ids[row, :length].tolist() == ids[:-1]
        assert batch.targets[row, :length].tolist() == ids[1:]
        assert batch.weights[row, :length].tolist() == [1.0] * length
        assert (batch.targets[row, length:] == PAD).all()
        assert (batch.weights[row, length:] == 0).all()


def test_the_number_of_predicted_tokens_survives_batching():
    samples = tokenised()
    batches = [samples.batch(part) for part in np.array_split(np.arange(len(samples)), 7)]
    assert sum(batch.weights.sum() for batch in batches) == samples.weights.sum()


def test_long_samples_are_dropped_whole_and_remembered():
    lengths = tokenised().lengths
    context = int(np.median(lengths))
    samples = tokenised(max_seq_length=context)
    assert samples.lengths.max() <= context
    assert samples.lengths.tolist() == [n for n in lengths if n <= context]
    assert samples.dropped == [
        r.expression for r, n in zip(RECORDS, lengths, strict=True) if n > context
    ]


def test_a_character_that_the_tokenizer_lacks_is_an_error():
    with pytest.raises(UserError, match="no token for a character"):
        tokenised([record("5 \u00d7 3")])


# ------------------------------------------------------------------------------------- plans


def plan(samples, batch_size=16, batch_tokens=0, seed=0):
    return plan_epoch(samples.lengths, batch_size, batch_tokens, np.random.default_rng(seed))


@pytest.mark.parametrize("batch_tokens", [0, 900])
def test_an_epoch_has_every_sample_exactly_once(batch_tokens):
    samples = tokenised()
    batches = plan(samples, batch_tokens=batch_tokens)
    assert sorted(np.concatenate(batches)) == [*range(len(samples))]


def test_batches_have_the_asked_size_but_for_the_rest_of_each_pool():
    sizes = [len(batch) for batch in plan(tokenised())]
    assert max(sizes) == 16
    assert sum(size < 16 for size in sizes) <= 1


def test_batch_tokens_bounds_a_batch_padding_included():
    samples = tokenised()
    widths = [samples.lengths[batch].max() * len(batch) for batch in plan(samples, 0, 900)]
    assert max(widths) <= 900
    assert np.mean(widths) > 600  # and they are well filled


@pytest.mark.parametrize(("length", "rows"), [(100, 10), (111, 8), (200, 4), (333, 2), (400, 2)])
def test_a_batch_has_an_even_number_of_samples_for_two_threads_to_share(length, rows):
    batches = plan_epoch(np.full(40, length), 0, 1000, np.random.default_rng(0))
    assert {len(batch) for batch in batches} == {rows}


def test_a_sample_beyond_batch_tokens_is_a_batch_of_its_own():
    batches = plan_epoch(np.array([10, 500, 12]), 0, 100, np.random.default_rng(0))
    assert [1] in [batch.tolist() for batch in batches]


def test_little_is_padding():
    samples = tokenised()
    batches = [samples.batch(indices) for indices in plan(samples)]
    padded = sum(batch.input_ids.numel() for batch in batches)
    assert samples.lengths.sum() / padded > 0.85
    in_order = [samples.batch(part) for part in np.array_split(np.arange(600), 38)]
    assert samples.lengths.sum() / sum(b.input_ids.numel() for b in in_order) < 0.6


def test_the_plan_follows_from_the_seed():
    samples = tokenised()
    one, same, other = (plan(samples, seed=seed) for seed in (1, 1, 2))
    assert all(map(np.array_equal, one, same))
    assert not all(map(np.array_equal, one, other))


def test_short_and_long_batches_come_in_random_order():
    samples = tokenised()
    means = [samples.lengths[batch].mean() for batch in plan(samples)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.5


# -------------------------------------------------------------------------------- gradients


def task(**settings):
    config = FoundationalConfig(tokenizer_path="t", corpus_path="c", **settings)
    model = random_model(TOKENIZER.vocab_size)
    return SupervisedTask(tokenised(), tokenised(RECORDS[:50]), config, model)


def gradient(pieces, threads=1):
    """The gradient of one update on step 3's batch, computed in so many pieces."""
    model = random_model(TOKENIZER.vocab_size)
    job = task(batch_size=24, gradient_accumulation_steps=pieces)
    with on_threads(threads):
        (micro_batches,) = job.updates(3)
        assert len(micro_batches) == max(pieces, threads)
        return of_update(model, job, micro_batches)


def of_update(model, job, micro_batches):
    """Loss and gradient as an update leaves them."""
    config = SimpleNamespace(gradient_clip=0.0)
    optimizer = SimpleNamespace(zero_grad=model.zero_grad, step=lambda scale: None)
    run = SimpleNamespace(
        model=model, config=config, optimizer=optimizer, precision=torch.float32, step=3
    )
    loss = update(run, job, micro_batches, 1.0)
    return loss, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("pieces", [2, 5, 24])
def test_the_gradient_does_not_depend_on_how_a_batch_is_cut(pieces):
    loss, whole = gradient(1)
    loss_in_pieces, in_pieces = gradient(pieces)
    assert loss_in_pieces == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(in_pieces, whole, atol=1e-5 * whole.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize("pieces", [1, 5])
def test_the_gradient_does_not_depend_on_threads(pieces):
    loss, whole = gradient(1)
    loss_of_three, of_three = gradient(pieces, threads=3)
    assert loss_of_three == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(of_three, whole, atol=1e-5 * whole.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize("slow", [0, 1, 2])
def test_gradients_add_up_in_order_whichever_thread_is_late(monkeypatch, slow):
    """So a step on several threads is the same, bit for bit, whenever it is taken."""
    expected = gradient(3, threads=3)
    original, threads = SupervisedTask.loss, set()

    def late(job, model, batch):
        threads.add(threading.get_ident())
        time.sleep(0.2 * torch.equal(batch.targets, batches[slow].targets))
        return original(job, model, batch)

    with on_threads(3):
        (batches,) = task(batch_size=24).updates(3)
    monkeypatch.setattr(SupervisedTask, "loss", late)
    loss, summed = gradient(3, threads=3)
    assert len(threads) > 1
    assert loss == expected[0]
    assert torch.equal(summed, expected[1])


def test_a_worker_computes_on_one_core_whatever_is_set_elsewhere():
    fresh, both = pool.__wrapped__(2), threading.Barrier(2)
    with on_threads(2):
        list(fresh.map(lambda _: both.wait(), range(2)))
    with on_threads(3):
        assert [*fresh.map(lambda _: torch.get_num_threads(), range(2))] == [1, 1]
        assert torch.get_num_threads() == 3


def test_with_dropout_micro_batches_draw_their_random_numbers_one_after_another():
    with on_threads(3):
        assert task().at_once == 3
        for dropout in (0.0, 0.1):
            model = random_model(TOKENIZER.vocab_size)
            config = LoRAConfig(lora_rank=2, lora_alpha=4, lora_dropout=dropout)
            job = task()
            job.model = add_lora(model, config)
            assert job.at_once == (1 if dropout else 3)
        job.model = random_model(TOKENIZER.vocab_size, dropout=0.1)
        assert job.at_once == 1


def test_the_loss_is_the_mean_over_weighted_tokens():
    model, job = random_model(TOKENIZER.vocab_size), task(batch_size=6)
    batch = job.train.batch([0, 1, 2])
    logprobs = model(batch.input_ids).log_softmax(-1)
    chosen = logprobs.gather(-1, batch.targets[..., None])[..., 0]
    expected = -(chosen * batch.weights).sum()
    torch.testing.assert_close(job.loss(model, batch), expected)


# ------------------------------------------------------------------------------------ budgets


def test_epochs_and_steps_are_the_two_budgets():
    per_epoch = task(batch_size=16, num_epochs=1).total_steps
    assert per_epoch == 38  # 600 samples
    assert task(batch_size=16, num_epochs=3).total_steps == 3 * per_epoch
    assert task(batch_size=16, num_epochs=3, max_steps=50).total_steps == 50
    assert task(batch_size=16, num_epochs=1, max_steps=100).total_steps == 100


def test_no_step_lies_beyond_the_last_epoch():
    """By tokens, epochs differ in their number of batches."""
    for tokens in (300, 450, 600, 1000):
        job = task(batch_tokens=tokens, num_epochs=10)
        assert (job.total_steps - 1) // job.steps_per_epoch + 1 == 10


def test_every_epoch_has_another_order():
    job = task(batch_size=16, num_epochs=2)
    assert not np.array_equal(job.plan[0], job.plan[job.steps_per_epoch])


# ------------------------------------------------------------------------------ held-out figures


def test_held_out_figures_are_those_of_plain_sums():
    model, job = random_model(TOKENIZER.vocab_size), task()
    metrics = job.validate(model)
    total = count = 0.0
    for index in range(50):
        batch = job.held_out.batch([index])
        total += job.loss(model, batch).item()
        count += batch.weights.sum().item()
    assert metrics["eval_loss"] == pytest.approx(total / count, rel=1e-4)
    assert metrics["eval_exact"] == 0.0


def test_exact_are_the_samples_whose_every_solution_token_is_right():
    batch = tokenised(records(3, seed=5), loss=LossWeights(0.0, 1.0)).batch([0, 1, 2])
    logits = F.one_hot(batch.targets, TOKENIZER.vocab_size).float()
    prompt, *_, second_last, last = batch.weights[1].nonzero()[:, 0].tolist()
    logits[1, [second_last, last]] = 0.0  # two wrong tokens are one wrong sample
    logits[2, 0] = 0.0  # of the prompt
    assert prompt > 0
    model = SimpleNamespace(
        device=torch.device("cpu"), hidden_states=lambda ids: logits, lm_head=nn.Identity()
    )
    assert held_out_sums(model, batch)[2] == 2


def test_processes_share_out_the_tokens_of_a_corpus(monkeypatch):
    """In chunks, in turn; together they have all, in order."""
    whole, shares = tokenised(RECORDS[:40], max_seq_length=60), []
    monkeypatch.setattr(batches, "_CHUNK", 7)
    for rank in (0, 1):
        monkeypatch.setattr(batches, "is_mine", lambda place, rank=rank: place % 2 == rank)
        monkeypatch.setattr(batches, "gather_shares", lambda mine: shares.append(mine) or mine)
        tokenised(RECORDS[:40], max_seq_length=60)
    assert [*map(len, shares)] == [3, 3]
    in_order = [part for pair in zip(*shares, strict=True) for part in pair]
    assert np.concatenate([part.ids for part in in_order]).tolist() == whole.ids.tolist()
    assert np.concatenate([part.lengths for part in in_order]).tolist() == whole.lengths.tolist()
    assert sum(part.kept for part in in_order) == whole.kept
    assert [e for part in in_order for e in part.dropped] == whole.dropped != []
