"""The one way to begin a run, for every stage: load and check everything, then open a folder."""

from __future__ import annotations

from dataclasses import dataclass, replace

from arithmetic_llm.config import LoRAConfig, ModelConfig, RunConfig, SampleSpec
from arithmetic_llm.corpus.coverage import Coverage, coverage_of
from arithmetic_llm.corpus.draw import distinct_samples
from arithmetic_llm.corpus.record import Record
from arithmetic_llm.model.checkpoint import Checkpoint, weights_hash
from arithmetic_llm.model.load import check_tokenizer, load_model
from arithmetic_llm.model.tokenizer import ArithmeticTokenizer
from arithmetic_llm.model.transformer import ArithmeticModel, initialise
from arithmetic_llm.runtime import resolve_device, sha256_file
from arithmetic_llm.training.adapters import with_adapter


@dataclass(frozen=True)
class Sources:
    """Paths of what a run begins with; an empty one is not needed."""

    tokenizer: str
    corpus: str = ""  # empty: problems are drawn as they are needed
    start: str = ""  # a checkpoint; empty: random weights
    base: str = ""  # where the start's base is, if it is an adapter that has moved


@dataclass(frozen=True)
class Beginning:
    """Model, coverage and hashes that a run begins with."""

    checkpoint: Checkpoint  # the model that is to be trained
    covered: Coverage | None  # of the corpus; None if there is none
    hashes: dict[str, str]  # of corpus and start; a resumed run must find the same
    is_new: bool  # has the model random weights
    before: Coverage | None  # what it had seen before, if anything is known

    def seen_after(self, later: Coverage) -> Coverage | None:
        """All that the model will have seen after this, too; None = unknown."""
        return later if self.is_new else self.before and self.before.merge(later)


def begin(
    config: RunConfig,
    sources: Sources,
    shape: ModelConfig | None = None,
    drawn: Coverage | None = None,
    lora: LoRAConfig | None = None,
) -> Beginning:
    """Load the model to train, or make one; nothing is written yet.

    Args:
        shape: of a model with random weights.
        drawn: what a run without a corpus will be trained on.
        lora: settings of a fresh adapter, if one is to be trained.

    Raises:
        UserError: a file is missing or damaged, or of another tokenizer.
    """
    tokenizer = ArithmeticTokenizer.load(sources.tokenizer)
    covered, hashes = None, {}
    if sources.corpus:
        covered = coverage_of(sources.corpus)
        warn_of_other_splits(covered, sources.corpus)
        hashes["corpus_sha256"] = sha256_file(sources.corpus)
    model, before = _model(config, sources, shape, tokenizer)
    if sources.start:  # hashed before an adapter is added: that changes the names of the weights
        hashes["start_hash"] = weights_hash(model)
    checkpoint = Checkpoint(model, tokenizer, config.STAGE)
    if lora:
        checkpoint = with_adapter(checkpoint, lora, sources.start)
    beginning = Beginning(checkpoint, covered, hashes, not sources.start, before)
    checkpoint.trained_on = beginning.seen_after(covered or drawn)
    return beginning


def _model(
    config: RunConfig,
    sources: Sources,
    shape: ModelConfig | None,
    tokenizer: ArithmeticTokenizer,
) -> tuple[ArithmeticModel, Coverage | None]:
    """The model to begin with, on its device, and what it has seen; None = nothing or unknown."""
    device = resolve_device(config.device)
    if not sources.start:
        fresh = initialise(ArithmeticModel(shape, tokenizer.vocab_size), tokenizer.composed)
        return fresh.to(device), None
    base = load_model(sources.start, device, sources.base)
    check_tokenizer(base, sources.tokenizer, sources.start)
    if context := getattr(config, "max_seq_length", 0):  # only some stages may change it
        base.model.config = replace(base.model.config, max_seq_length=context)
    return base.model, base.trained_on


def warn_of_other_splits(covered: Coverage, corpus_path: str) -> None:
    """Say so if a corpus to train on holds problems that are kept for judging."""
    for split in ("validation", "test"):
        if count := covered.splits.get(split):
            print(
                f"warning: {count} samples of {corpus_path} belong to the {split} split, so "
                "held-out figures will flatter this model; make the corpus with --split train"
            )


def held_out_records(spec: SampleSpec, config: RunConfig) -> list[Record]:
    """Problems of the validation split to judge a run by, the same for the same seed."""
    samples = distinct_samples(spec, config.eval_samples, config.seed, "validation")
    return [sample.record for sample in samples]
