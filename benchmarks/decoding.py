"""Decoding: greedy, beside `generate` of transformers on the same weights, prompts and limit.

    python benchmarks/decoding.py

All in fp32, which is how evaluations decode. ``generate`` tries the dynamic cache, the static cache
and, for one prompt at a time, drafts by prompt look-up, each with both attentions. How many of the
completions are the same, token for token, is in the JSON file.
"""

import warnings
from functools import partial

import torch
from common import (
    ATTENTIONS,
    Materials,
    Row,
    compare,
    main_of,
    need,
    of_transformers,
    ratio_row,
    thousands,
    timed,
)

from arithmetic_llm.cli import run_main
from arithmetic_llm.evaluation.evaluate import evaluate
from arithmetic_llm.model.decode import generate
from arithmetic_llm.model.load import load_model
from arithmetic_llm.model.tokenizer import EOS, PAD
from arithmetic_llm.task.problem import problem_from

DEPTH = 4
CACHES = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
}
LOOK_UP = {"prompt look-up": {"prompt_lookup_num_tokens": 8}}  # for one prompt at a time only


def measure(config):
    """Rows of one prompt at a time, and of 64."""
    materials = Materials(config)
    checkpoint = load_model(materials.model, torch.device("cpu"), "")
    limit = config.size(600, 24)
    one = Prompts(checkpoint, materials.problems(DEPTH, config.size(6, 2)), 1, limit)
    many = Prompts(checkpoint, materials.problems(DEPTH, config.size(64, 4)), 64, limit)
    rows = [*rows_of(one, config), *rows_of(many, config)]
    return [*rows, *gpu_rows(materials, config)]


class Prompts:
    """Problems to be solved by both sides, so many at a time."""

    def __init__(self, checkpoint, expressions, batch_size, limit):
        self.model, self.tokenizer = checkpoint.model, checkpoint.tokenizer
        self.problems = [problem_from(expression) for expression in expressions]
        self.batch_size, self.limit = batch_size, limit
        self.ids = [self.tokenizer.prompt_ids(p.expression) for p in self.problems]
        self.written = {}  # the tokens of each side's last turn

    def batches(self, brief):
        """The prompts, a batch at a time; the first batch alone, if brief."""
        starts = range(0, len(self.ids), self.batch_size)
        return [self.ids[i : i + self.batch_size] for i in starts][: 1 if brief else None]

    def same(self):
        """Share of the completions of both sides that are the same."""
        pairs = zip(self.written["ours"], self.written["generate"], strict=True)
        return sum(a == b for a, b in pairs) / len(self.ids)


def ours(prompts):
    """Tokens a second, drafts by look-up in the text so far alone."""
    work = partial(generate, prompts.model, prompts.ids, prompts.limit)
    seconds, completions = timed(lambda: work(batch_size=prompts.batch_size))
    prompts.written["ours"] = [completion.tokens for completion in completions]
    return sum(map(len, prompts.written["ours"])) / seconds


def as_evaluated(prompts):
    """Tokens a second of an evaluation, judging included: there a right solver drafts, too."""
    result = evaluate(
        prompts.model,
        prompts.tokenizer,
        prompts.problems,
        trained_on=None,
        max_new_tokens=prompts.limit,
        batch_size=prompts.batch_size,
    )
    return sum(outcome.tokens for outcome in result.outcomes) / result.seconds


def theirs(prompts, attention, settings, brief):
    """Tokens a second of transformers' ``generate``."""
    model, written, total = of_transformers(prompts.model, attention), [], 0.0
    limit = prompts.limit // 2 if brief else prompts.limit
    for batch in prompts.batches(brief):
        seconds, tokens = timed(partial(complete, model, batch, limit, settings))
        written, total = written + tokens, total + seconds
    prompts.written["generate"] = written
    return sum(map(len, written)) / total


@torch.no_grad()
def complete(model, batch, limit, settings):
    """Completions of a batch, padded on the left, each to its end."""
    width = max(map(len, batch))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in batch])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = model.generate(
            ids,
            attention_mask=(ids != PAD).long(),
            max_new_tokens=limit,
            do_sample=False,
            **settings,
        )
    return [to_its_end(row) for row in written[:, width:].tolist()]


def to_its_end(tokens):
    """Tokens up to the first ``<eos>``, which is one of them."""
    return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens


def rows_of(prompts, config):
    """Two rows: ours by itself, and as evaluations and rollouts decode."""
    need("transformers")
    ways = CACHES | (LOOK_UP if prompts.batch_size == 1 else {})
    peers = {
        f"{name}, {attention}": partial(theirs, prompts, attention, settings)
        for name, settings in ways.items()
        for attention in ATTENTIONS
    }
    found = compare(partial(ours, prompts), {"generate": peers}, config.repetitions)
    guided = compare(
        partial(as_evaluated, prompts),
        {"generate": {found.settings["generate"]: peers[found.settings["generate"]]}},
        max(1, config.repetitions - 1),
    )
    subject = f"greedy decoding, depth {DEPTH}, batch {prompts.batch_size}"
    facts = {"same_tokens": prompts.same(), "limit": prompts.limit}
    return [
        ratio_row(subject, found, "generate", 5, thousands, **facts),
        ratio_row(f"{subject}, as evaluated", guided, "generate", 5, thousands),
    ]


def gpu_rows(materials, config):
    """Decoding at batch 1,024 on a GPU, where one is at hand."""
    if not torch.cuda.is_available():
        return []
    checkpoint = load_model(materials.model, torch.device("cuda"), "")
    expressions = materials.problems(DEPTH, config.size(1024, 8))
    prompts = Prompts(checkpoint, expressions, 1024, config.size(600, 24))
    rate = max(ours(prompts) for _ in range(config.repetitions))
    subject = "GPU: greedy decoding, batch 1,024"
    return [Row(subject, thousands(rate), "", rate / 1e6, "M tokens/s", 1)]


main = main_of("decoding", measure, __doc__)

if __name__ == "__main__":
    run_main(main)
