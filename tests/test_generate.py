"""The decoder against a naive loop and transformers; and batches change nothing."""

import contextlib
import itertools
import math
import threading
import time
from collections import Counter

import pytest
import torch
from helpers import of_transformers, on_threads, random_model

from arithmetic_llm.config import SampleSpec
from arithmetic_llm.corpus.draw import draw_samples
from arithmetic_llm.model.decode import (
    GREEDY,
    Completion,
    SamplingParams,
    decode,
    generate,
    look_up,
    truncated_logprobs,
)
from arithmetic_llm.model.tokenizer import BOS, EOS
from arithmetic_llm.threads import pool

VOCAB = 61
MODEL = random_model(VOCAB, seed=1)
NARROW = random_model(VOCAB, seed=1, attention_window=5)
MODELS = pytest.mark.parametrize("model", [MODEL, NARROW], ids=["whole", "window"])
LIMIT = 24
SAMPLED = SamplingParams(temperature=0.9, top_k=20, top_p=0.95, seed=5)


def make_prompts(count, seed=0):
    """Prompts of 1 to 30 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 30, (count,), generator=generator).tolist()
    return [
        [BOS, *torch.randint(6, VOCAB, (length,), generator=generator).tolist()]
        for length in lengths
    ]


PROMPTS = make_prompts(70)


@torch.no_grad()
def naive_greedy(model, prompt, limit):
    """One token at a time, one row at a time, no cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + limit:
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :]


# ------------------------------------------------------------------------------------ greedy


@MODELS
def test_greedy_equals_the_naive_loop(model):
    completions = generate(model, PROMPTS[:20], LIMIT)
    for prompt, completion in zip(PROMPTS[:20], completions, strict=True):
        assert completion.tokens == naive_greedy(model, prompt, LIMIT)


def test_greedy_equals_generate_of_transformers():
    theirs = of_transformers(MODEL)
    completions = generate(MODEL, PROMPTS[:10], LIMIT)
    for prompt, completion in zip(PROMPTS[:10], completions, strict=True):
        ids = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=LIMIT,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=0,
        )
        assert completion.tokens == ids[0, len(prompt) :].tolist()


def test_the_reason_to_stop_is_told():
    completions = generate(MODEL, PROMPTS, LIMIT)
    ended = [completion for completion in completions if completion.finish_reason == "eos"]
    assert 0 < len(ended) < len(completions)  # this model does both, at various lengths
    assert len({len(completion.tokens) for completion in ended}) > 3
    for completion in completions:
        assert (completion.tokens[-1] == EOS) == (completion.finish_reason == "eos")
        assert EOS not in completion.tokens[:-1]
        if completion.finish_reason == "length":
            assert len(completion.tokens) == LIMIT


def test_a_limit_of_zero_writes_nothing():
    assert generate(MODEL, PROMPTS[:2], 0) == [Completion(), Completion()]


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=1.0, seed=3)])
@pytest.mark.parametrize("batch_size", [3, 64])
def test_each_row_has_its_own_limit(sampling, batch_size):
    limits = [7 * row % LIMIT for row in range(len(PROMPTS))]  # the first may write nothing
    ours = generate(MODEL, PROMPTS, limits, sampling, batch_size)
    for limit, one, other in zip(
        limits, ours, generate(MODEL, PROMPTS, LIMIT, sampling), strict=True
    ):
        assert one.tokens == other.tokens[:limit]


def test_no_prompts_no_completions():
    assert generate(MODEL, [], LIMIT) == []


# ----------------------------------------------------------------------------- batch invariance


@MODELS
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_batch_size_changes_no_token(sampling, model):
    one, seven, many = (
        [c.tokens for c in generate(model, PROMPTS, LIMIT, sampling, batch_size=size)]
        for size in (1, 7, 64)
    )
    assert one == seven == many


def test_the_batch_size_changes_no_token_of_a_trained_model(trained_model, tokenizer):
    spec = SampleSpec(max_depth=2, num_range=(1, 9), invalid_rate=0.0, typed_rate=0.0)
    problems = [sample.record for sample in draw_samples(spec, 100, seed=9)]
    prompts = [tokenizer.prompt_ids(problem.expression) for problem in problems]
    one, seven, many = (
        [c.tokens for c in generate(trained_model, prompts, 80, batch_size=size)]
        for size in (1, 7, 64)
    )
    assert one == seven == many
    written = [tokenizer.decode_completion(tokens) for tokens in one]
    right = [
        text.endswith(f"Final Result: {problem.answer}")
        for text, problem in zip(written, problems, strict=True)
    ]
    assert sum(right) > 30  # it is trained, indeed


def test_a_row_writes_the_same_whoever_its_neighbours_are():
    alone = generate(MODEL, PROMPTS[:1], LIMIT)[0].tokens
    for seed in range(3):
        assert generate(MODEL, [PROMPTS[0], *make_prompts(9, seed)], LIMIT)[0].tokens == alone


@MODELS
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rows", [16, 40])
def test_threads_that_share_the_rows_change_no_token(rows, sampling, model):
    one, three = (
        on_so_many(threads, generate, model, PROMPTS[:rows], LIMIT, sampling, rows - 1)
        for threads in (1, 3)
    )
    assert [c.tokens for c in one] == [c.tokens for c in three]
    assert all(completion.tokens for completion in three)


def test_each_thread_decodes_a_part_of_the_rows_on_a_core_of_its_own():
    seen, all_here = {}, threading.Barrier(3, timeout=60)

    def note(module, args, output):
        passes = seen.setdefault(threading.get_ident(), [])
        passes.append((torch.get_num_threads(), len(args[0])))
        if len(passes) == 1:
            all_here.wait()  # so no thread has had two parts

    with MODEL.model.register_forward_hook(note):
        on_so_many(3, generate, MODEL, PROMPTS[:40], LIMIT, batch_size=36)
    assert [*map(max, seen.values())] == [(1, 12)] * 3


def test_dropout_is_off_for_all_threads_until_the_last_has_ended():
    prompts, states = sorted(PROMPTS[:48], key=len, reverse=True), []
    limits = [1] * 16 + [LIMIT] * 32  # the first part ends long before the others
    MODEL.train()
    with MODEL.model.register_forward_hook(lambda module, *_: states.append(module.training)):
        on_so_many(3, generate, MODEL, prompts, limits, batch_size=47)
    assert MODEL.training
    MODEL.eval()
    assert len(states) > LIMIT
    assert not any(states)


def test_an_error_in_a_thread_is_told_and_ends_the_others():
    passes, both = itertools.count(1), threading.Barrier(2, timeout=60)

    def fail(module, args, output):
        number = next(passes)
        time.sleep(0.01)  # so that the others can be told before they have ended
        if number == 5:
            raise MemoryError("no more")

    with MODEL.model.register_forward_hook(fail):
        with pytest.raises(MemoryError, match="no more"):
            # 269 passes each, two at a time
            on_so_many(2, generate, MODEL, [PROMPTS[67]] * 32, 400, batch_size=31)
        list(pool(2).map(lambda _: both.wait(), range(2)))  # until both have nothing to do
    assert next(passes) < 200


def test_all_threads_share_a_single_batch():
    cores = set()

    def note(*_):
        cores.add((threading.get_ident(), torch.get_num_threads()))

    with MODEL.model.register_forward_hook(note):
        on_so_many(3, generate, MODEL, PROMPTS[:40], LIMIT, batch_size=40)
    assert cores == {(threading.get_ident(), 3)}


def on_so_many(threads, function, *args, **settings):
    with on_threads(threads):
        return function(*args, **settings)


def test_completions_stand_in_the_order_of_the_prompts():
    forwards = [c.tokens for c in generate(MODEL, PROMPTS, LIMIT, batch_size=7)]
    backwards = [c.tokens for c in generate(MODEL, PROMPTS[::-1], LIMIT, batch_size=7)]
    assert forwards == backwards[::-1]


def test_every_row_is_reported_once_when_it_is_done():
    done = []
    completions = generate(
        MODEL,
        PROMPTS,
        LIMIT,
        batch_size=16,
        on_done=lambda row, c: done.append((row, len(c.tokens))),
    )
    assert sorted(done) == [(row, len(c.tokens)) for row, c in enumerate(completions)]


# --------------------------------------------------------------------------------- streaming


def test_tokens_stream_as_they_are_written_and_finished_rows_leave():
    expected = generate(MODEL, PROMPTS[:12], LIMIT)
    streamed = [[] for _ in range(12)]
    for emission in decode(MODEL, PROMPTS[:12], LIMIT):
        assert len(emission.tokens) == len(emission.logprobs) == len(emission.margins) > 0
        assert EOS not in streamed[emission.row]
        streamed[emission.row] += emission.tokens
    assert streamed == [completion.tokens for completion in expected]
    assert len({len(tokens) for tokens in streamed}) > 3


def test_a_stream_that_is_left_early_leaves_the_model_as_it_was():
    MODEL.train()
    stream = decode(MODEL, PROMPTS[:2], LIMIT)
    next(stream)
    assert not MODEL.training
    stream.close()
    assert MODEL.training
    MODEL.eval()


# ------------------------------------------------------------------------------------ drafts


class Passes:
    """The shapes that a model reads inside a block, a forward pass each, all on one thread."""

    def __init__(self, model):
        self.model, self.shapes, self.block = model, [], contextlib.ExitStack()

    @property
    def count(self):
        return len(self.shapes)

    def __enter__(self):
        self.block.enter_context(on_threads(1))
        self.block.enter_context(self.model.model.register_forward_hook(self.add))
        return self

    def __exit__(self, *_):
        self.block.close()

    def add(self, module, inputs, output):
        self.shapes.append(tuple(inputs[0].shape))


def guesses_of_all_kinds(completions):
    """Right, wrong in one place, wrong at once, too short, too long, and none."""
    kinds = [
        lambda tokens: tokens,
        lambda tokens: [*tokens[:5], 7, *tokens[6:]],
        lambda tokens: [9, *tokens[1:]],
        lambda tokens: tokens[: len(tokens) // 2],
        lambda tokens: [*tokens, *range(6, 60), EOS],
        lambda tokens: [],
    ]
    texts = [kinds[row % 6](completion.tokens) for row, completion in enumerate(completions)]
    return lambda row, written: texts[row][len(written) :]


@MODELS
@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_guesses_change_no_token_and_no_logprob(sampling, batch_size, model):
    plain = generate(model, PROMPTS, LIMIT, sampling, batch_size=64)
    guess = guesses_of_all_kinds(plain)
    guessed = generate(model, PROMPTS, LIMIT, sampling, batch_size, guess=guess)
    for one, other in zip(plain, guessed, strict=True):
        assert one.tokens == other.tokens
        assert one.finish_reason == other.finish_reason
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert one.margin == pytest.approx(other.margin, abs=1e-4)
        assert len(one.support) == len(other.support)
        assert all(map(torch.equal, one.support, other.support))


def prompt_and_text():
    """A prompt and the 20 tokens that the model writes after it."""
    pairs = zip(PROMPTS, generate(MODEL, PROMPTS, 20), strict=True)
    return next((p, c.tokens) for p, c in pairs if len(p) > 1 and len(c.tokens) == 20)


def test_a_right_guess_takes_few_passes_and_a_wrong_one_no_more_than_none():
    prompt, text = prompt_and_text()
    passes = {}
    for name, guessed in {"right": text, "wrong": [9] * 20, "none": []}.items():
        with Passes(MODEL) as passed:
            generate(MODEL, [prompt], 20, guess=lambda _, new, g=guessed: [] if new else g)
        passes[name] = passed.count
    assert passes["right"] == 2  # the prompt, and all of the text at once
    assert passes["right"] < passes["wrong"] <= passes["none"] + 1 <= 20 + 2


def test_drafts_are_twice_as_long_as_what_they_gained_of_late():
    prompt, text = prompt_and_text()
    wrong = [token % (VOCAB - 1) + 1 for token in text]
    widths = {}
    for name, guessed in {"wrong": wrong, "right for eight": [*text[:8], *wrong[8:]]}.items():
        with Passes(MODEL) as passed:
            generate(MODEL, [prompt] * 32, 20, guess=lambda _, new, g=guessed: g[len(new) :])
        widths[name] = [width for _, width in passed.shapes[1:]]  # the first reads the prompt
    # A pass reads a token of each row and its draft, and the last token of all is never drafted.
    assert widths["wrong"] == [20, *[3] * 17, 2, 1]
    assert widths["right for eight"] == [20, 11, *[3] * 8, 2, 1]


def test_a_single_row_has_long_drafts_whatever_became_of_them():
    prompt, text = prompt_and_text()
    wrong = [token % (VOCAB - 1) + 1 for token in text]
    with Passes(MODEL) as passed:
        generate(MODEL, [prompt], 20, guess=lambda _, new: wrong[len(new) :])
    assert [width for _, width in passed.shapes[1:]] == [*range(20, 0, -1)]


def test_a_guess_is_asked_for_again_when_it_is_wrong_or_used_up_and_not_before():
    prompt, text = prompt_and_text()
    answers = {0: [*text[:5], 9, *text[6:]], 6: text[6:9], 10: text[10:]}
    asked = []

    def guess(row, written):
        asked.append((row, written))
        return answers[len(written)]

    generate(MODEL, [prompt], 20, guess=guess)
    # Wrong in its sixth place; then used up, one token having been chosen behind it; then right.
    assert text[5] != 9
    assert asked == [(0, text[:place]) for place in (0, 6, 10)]


def test_prompts_that_are_alike_are_read_once():
    one, other = PROMPTS[0], PROMPTS[1]
    with Passes(MODEL) as passed:
        generate(MODEL, [one, other, one, one, other], 3)
    longest = max(len(one), len(other)) - 1
    assert passed.shapes[0] == (2, longest)
    assert {rows for rows, _ in passed.shapes[1:]} <= {1, 2, 3, 4, 5}
    assert passed.shapes[1][0] == 5


def test_what_repeats_itself_is_looked_up(trained_model, tokenizer):
    """A solution copies its own expression; the naive loop takes a pass for each token."""
    written = passes = 0
    for expression in ("(7 - 2) + (3 - (4 + 1))", "((3 - 8) - 5) + (9 + 2)", "7 + (2 - (9 - 4))"):
        prompt = tokenizer.prompt_ids(expression)
        with Passes(trained_model) as passed:
            (completion,) = generate(trained_model, [prompt], 80)
        assert completion.tokens == naive_greedy(trained_model, prompt, 80)
        written, passes = written + len(completion.tokens), passes + passed.count
    assert passes < 0.9 * written


@pytest.mark.parametrize(
    ("text", "following"),
    [
        ("7+3=10,7+", "3=1"),
        ("7123912812", "812"),  # the later of two matches of the same length
        ("41239128412", "391"),  # the longer match before the later one
        ("555", "5"),  # behind the latest match only one token is known
        ("123", ""),
        ("1", ""),
    ],
)
def test_looking_up_by_hand(text, following):
    assert look_up(text, 3) == following


# -------------------------------------------------------------------------- log-probabilities


@torch.no_grad()
@pytest.mark.parametrize(
    "sampling",
    [GREEDY, SamplingParams(temperature=0.7, seed=2), SAMPLED],
    ids=["greedy", "T", "all"],
)
def test_logprobs_are_those_of_a_full_forward_pass(sampling):
    for prompt, completion in zip(
        PROMPTS[:8], generate(MODEL, PROMPTS[:8], LIMIT, sampling), strict=True
    ):
        logits = MODEL(torch.tensor([prompt + completion.tokens]))[0, len(prompt) - 1 : -1]
        logprobs = truncated_logprobs(logits, sampling)
        expected = logprobs.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-3, rtol=0)


@torch.no_grad()
def test_the_margin_is_the_smallest_gap_between_the_two_best_logits():
    (completion,) = generate(MODEL, PROMPTS[:1], LIMIT)
    ids = torch.tensor([PROMPTS[0] + completion.tokens])
    best = MODEL(ids)[0, len(PROMPTS[0]) - 1 : -1].topk(2).values
    assert completion.margin == pytest.approx((best[:, 0] - best[:, 1]).min().item(), abs=1e-4)
    (drawn,) = generate(MODEL, PROMPTS[:1], LIMIT, SamplingParams(temperature=1.0))
    assert drawn.margin == math.inf  # a draw has no runner-up


# ---------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 5, VOCAB + 3])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 0.01])
def test_the_distribution_is_that_of_transformers(temperature, top_k, top_p):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(50, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1.0:
        expected = TopPLogitsWarper(top_p)(None, expected)
    ours = truncated_logprobs(logits, SamplingParams(temperature, top_k, top_p))
    torch.testing.assert_close(ours, expected.log_softmax(-1))


def test_tokens_are_drawn_as_often_as_their_probability_says():
    draws, sampling = 4000, SamplingParams(temperature=1.3, top_k=8, top_p=0.9, seed=3)
    prompt = PROMPTS[0]
    with torch.no_grad():
        logits = MODEL(torch.tensor([prompt]))[0, -1]
    probs = truncated_logprobs(logits, sampling).exp()
    drawn = Counter(c.tokens[0] for c in generate(MODEL, [prompt] * draws, 1, sampling, 2000))
    possible = probs.nonzero().flatten().tolist()
    assert drawn.keys() <= {*possible}
    assert len(possible) > 3
    chi_square = sum((drawn[t] - draws * probs[t]) ** 2 / (draws * probs[t]) for t in possible)
    assert chi_square < 27  # 7 degrees of freedom at most: exceeded by chance once in 3,000


def test_the_seed_decides_what_is_drawn():
    def tokens(seed):
        sampling = SamplingParams(temperature=1.0, seed=seed)
        return [c.tokens for c in generate(MODEL, PROMPTS[:5], LIMIT, sampling)]

    assert tokens(1) == tokens(1) != tokens(2)


def test_equal_prompts_are_drawn_independently():
    sampling = SamplingParams(temperature=1.0, seed=1)
    completions = generate(MODEL, [PROMPTS[0]] * 8, LIMIT, sampling)
    assert len({tuple(completion.tokens) for completion in completions}) > 4
