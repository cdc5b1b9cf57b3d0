"""Materials that take a moment to make, made once for all tests of a process."""

from __future__ import annotations

import signal

import numpy as np
import pytest
import torch
from helpers import call, checkpoint_of, make_tokenizer, random_model

from arithmetic_llm.config import SampleSpec, TrainingConfig
from arithmetic_llm.corpus.draw import draw_samples
from arithmetic_llm.model.checkpoint import save_checkpoint
from arithmetic_llm.model.transformer import initialise
from arithmetic_llm.training.batches import LossWeights, TokenisedSamples, plan_epoch
from arithmetic_llm.training.optim import build_optimizer, learning_rate_factor
from arithmetic_llm.training.supervised import counted_logits

# A shell's background jobs ignore Ctrl-C, what nohup starts a closed terminal, and so would all
# that the tests start from there.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

SMALL_WORLD = SampleSpec(max_depth=2, num_range=(1, 9), invalid_rate=0.0, typed_rate=0.0)


@pytest.fixture(scope="session")
def tokenizer():
    """Trained on a few hundred samples."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tokenizer):
    """Random weights: as bad as a model can be."""
    return random_model(tokenizer.vocab_size)


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model, tokenizer, tmp_path_factory):
    """The path of a checkpoint of `tiny_model` that claims depth 1 to 3 as trained."""
    path = tmp_path_factory.mktemp("tiny") / "best_model.pt"
    save_checkpoint(path, checkpoint_of(tiny_model, tokenizer))
    return path


@pytest.fixture(scope="session")
def trained_model(tokenizer):
    """A small model after some seconds of training: it writes steps, and many are right."""
    torch.manual_seed(0)
    model = initialise(random_model(tokenizer.vocab_size, d_model=64, dim_feedforward=128))
    corpus = [sample.record for sample in draw_samples(SMALL_WORLD, 5000, seed=1)]
    samples = TokenisedSamples(corpus, tokenizer, 1024, LossWeights(prompt=0.0, result=3.0))
    plan = plan_epoch(samples.lengths, 16, 0, np.random.default_rng(0))
    config = TrainingConfig(optimizer="muon", learning_rate=5e-3, warmup_steps=0)
    optimizer = build_optimizer(model, config)
    for step, indices in enumerate(plan):
        logits, targets, weights = counted_logits(model, samples.batch(indices))
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        optimizer.zero_grad()
        ((losses * weights).sum() / weights.sum()).backward()
        optimizer.step(learning_rate_factor(config, step, len(plan)))
    return model.eval()


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """A folder with small corpora and a tokenizer, made by the scripts."""
    folder = tmp_path_factory.mktemp("workshop")
    small = ["--max-depth", 2, "--num-range", 1, 9]
    for script, *argv in (
        ("generate_foundational_plaintext.py", "--num-samples", 300, "--output-txt", "corpus.txt"),
        ("generate_instruction_corpus_mixed.py", "--num-samples", 200, "--output-mixed", "i.jsonl"),
    ):
        assert call(script, *argv[:-1], folder / argv[-1], *small).code == 0
    made = call(
        "train_tokenizer.py",
        "--corpus-path",
        folder / "corpus.txt",
        "--output-dir",
        folder / "tokenizer",
    )
    assert made.code == 0
    return folder
