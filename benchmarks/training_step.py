"""Tokens a second of the training step, and where its time goes.

    python benchmarks/training_step.py [threads] [steps]

Uses the CPU recipe's shape and batches on a small corpus made on the spot. Compare two versions by
running them in turn on a machine that does nothing else; one figure alone says little.
"""

import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from arithmetic_llm.cli import build, read_json  # noqa: E402
from arithmetic_llm.config import FoundationalConfig, FoundationalCorpusConfig, ModelConfig  # noqa: E402
from arithmetic_llm.corpus.draw import draw_samples  # noqa: E402
from arithmetic_llm.model.tokenizer import ArithmeticTokenizer  # noqa: E402
from arithmetic_llm.model.transformer import ArithmeticModel, initialise  # noqa: E402
from arithmetic_llm.runtime import prepare_training, resolve_precision  # noqa: E402
from arithmetic_llm.training.batches import LossWeights, TokenisedSamples  # noqa: E402
from arithmetic_llm.training.loop import add_gradients  # noqa: E402
from arithmetic_llm.training.optim import build_optimizer  # noqa: E402
from arithmetic_llm.training.supervised import SupervisedTask  # noqa: E402

RECIPE = ROOT / "configs" / "cpu"
WARM_UP = 20  # steps that are not counted


def prepare():
    """Model, optimizer and task of the recipe's foundational stage."""
    paths = {"tokenizer_path": "-", "corpus_path": "-"}
    config = build(FoundationalConfig, {**read_json(RECIPE / "foundational.json"), **paths}, {})
    spec = build(FoundationalCorpusConfig, read_json(RECIPE / "foundational_corpus.json"), {})
    records = [sample.record for sample in draw_samples(spec, 8000, seed=1)]
    tokenizer = ArithmeticTokenizer.train((record.sequence for record in records), 1000)
    shape = build(ModelConfig, read_json(RECIPE / "model.json"), {})
    samples = TokenisedSamples(records, tokenizer, shape.max_seq_length, LossWeights(0.05, 3.0))
    model = initialise(ArithmeticModel(shape, tokenizer.vocab_size))
    task = SupervisedTask(samples, samples, config, model)
    return model, build_optimizer(model, config), task


def main(threads=2, steps=120):
    prepare_training(threads, seed=0)
    model, optimizer, task = prepare()
    precision = resolve_precision("auto", torch.device("cpu"))
    run = SimpleNamespace(model=model, precision=precision)
    seconds, tokens = Counter(), 0
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            seconds, tokens = Counter(), 0
        marks = [time.perf_counter()]
        (micro_batches,) = task.updates(step)
        marks.append(time.perf_counter())
        optimizer.zero_grad()
        add_gradients(run, task, micro_batches)
        marks.append(time.perf_counter())
        optimizer.step()
        marks.append(time.perf_counter())
        for name, start, end in zip(
            ("batch", "gradients", "optimizer"), marks, marks[1:], strict=False
        ):
            seconds[name] += end - start
        tokens += sum(batch.tokens for batch in micro_batches)
    total = seconds.total()
    shares = ", ".join(f"{name} {value / total:.0%}" for name, value in seconds.items())
    print(f"{threads} threads, {precision}: {tokens / total:,.0f} padded tokens/s ({shares})")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
