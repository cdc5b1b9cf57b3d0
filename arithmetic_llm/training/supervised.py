"""The supervised stages: learning to write the solutions of a corpus."""

from __future__ import annotations

import copy
import math
from collections import Counter
from pathlib import Path

import numpy as np
from torch import Tensor

from arithmetic_llm.config import (
    FoundationalConfig,
    InstructionConfig,
    LoRAConfig,
    LoRAInstructionConfig,
    ModelConfig,
    TrainingConfig,
)
from arithmetic_llm.corpus.files import read_corpus, read_problems
from arithmetic_llm.distributed import gather_shares, share, world_size
from arithmetic_llm.folders import resolve_paths
from arithmetic_llm.model import kernels
from arithmetic_llm.model.fused import summed_cross_entropy
from arithmetic_llm.model.lora import parameter_summary
from arithmetic_llm.model.transformer import ArithmeticModel
from arithmetic_llm.runtime import (
    UserError,
    prepare_training,
)
from arithmetic_llm.task.expression import ExpressionError, parse
from arithmetic_llm.training.batches import (
    Batch,
    LossWeights,
    TokenisedSamples,
    micro_batches,
    plan_epoch,
)
from arithmetic_llm.training.gradients import threads_side_by_side
from arithmetic_llm.training.loop import fit
from arithmetic_llm.training.run import Run, open_run
from arithmetic_llm.training.start import Beginning, Sources, begin, held_out_records
from arithmetic_llm.training.workers import require_a_worker_each

MORE_ROOM = "raise --max-seq-length, or make a corpus of shallower problems"


class SupervisedTask:
    """Next-token prediction over tokenised samples; see `step.Task`.

    Args:
        model: what is trained; its shape decides how batches are cut to fit into memory.
    """

    validates_start = False  # it is random weights, or the stage before has told

    def __init__(
        self,
        train: TokenisedSamples,
        held_out: TokenisedSamples,
        config: TrainingConfig,
        model: ArithmeticModel,
    ):
        self.train, self.held_out, self.config, self.model = train, held_out, config, model
        plan: list[np.ndarray] = []
        workers = config.workers  # a step is a batch of each
        epoch, most = 0, config.max_steps * workers
        while len(plan) < most if most else epoch < config.num_epochs:
            rng = np.random.default_rng((config.seed, epoch))
            plan += plan_epoch(train.lengths, config.batch_size, config.batch_tokens, rng)
            epoch += 1
        self.steps_per_epoch = math.ceil(len(plan) / epoch / workers)  # they differ by a few
        self.total_steps = config.max_steps or math.ceil(len(plan) / workers)
        # Where the last step would have too few, the first batches are learned from once more.
        self.plan = [plan[i % len(plan)] for i in range(self.total_steps * workers)]
        tokens = [int(train.lengths[batch].sum()) for batch in self.plan]
        self._tokens_before = np.cumsum([0, *tokens])[::workers]

    def of_worker(self, number: int) -> SupervisedTask:
        """The same task with the batches of one worker, every N-th of all."""
        own = copy.copy(self)
        own.plan = self.plan[number :: self.config.workers]
        return own

    @property
    def shares_batches(self) -> bool:
        return self.config.workers == 1

    @property
    def at_once(self) -> int:
        """One micro-batch a CPU thread, if nobody else is at work."""
        alone = world_size() == 1 and self.shares_batches
        return threads_side_by_side(self.model) if alone else 1

    def updates(self, step: int) -> list[list[Batch]]:
        sharers = world_size() if self.shares_batches else 1
        least = max(self.config.gradient_accumulation_steps, self.at_once, sharers)
        at_once = max(self.at_once, self.config.workers)  # that share the memory
        return [self._batches(self.train, self.plan[step], least, at_once)]

    def work(self, step: int) -> int:
        """Tokens of the samples before ``step``."""
        return int(self._tokens_before[step])

    def loss(self, model: ArithmeticModel, batch: Batch) -> Tensor:
        return summed_cross_entropy(*counted_logits(model, batch))

    def validate(self, model: ArithmeticModel) -> dict[str, float]:
        """Figures on the held-out samples.

        ``eval_loss`` is in nats per solution token. ``eval_exact`` is the share of samples whose
        every solution token is the likeliest one: just those that greedy decoding would write.
        A sample longer than the context has no loss, but it does count as wrong: it is the
        deepest ones that do not fit, and leaving them out would flatter the model where it is
        weakest.
        """
        batches = self._batches(self.held_out, np.arange(len(self.held_out)))
        counted = gather_shares([held_out_sums(model, batch) for batch in share(batches)])
        loss, tokens, exact = map(sum, zip(*counted, strict=True))
        drawn = len(self.held_out) + len(self.held_out.dropped)
        return {"eval_loss": loss / tokens, "eval_exact": exact / drawn}

    def _batches(
        self, samples: TokenisedSamples, indices: np.ndarray, least: int = 1, at_once: int = 1
    ) -> list[Batch]:
        shape, device = self.model.config, self.model.device
        parts = micro_batches(samples.lengths, indices, shape, device, least, at_once=at_once)
        return [samples.batch(part) for part in parts]

    def selection_loss(self, metrics: dict[str, float]) -> float:
        return metrics["eval_loss"]

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """The plan follows from the seed: there is nothing to take up."""


def held_out_sums(model: ArithmeticModel, batch: Batch) -> tuple[float, float, int]:
    """Loss in nats, its weights, and the number of samples without any wrong token."""
    batch = batch.to(model.device)
    logits, targets, weights = counted_logits(model, batch)
    rows, width = batch.input_ids.shape
    wrong = batch.counted[logits.argmax(-1) != targets] // width  # the rows of the wrong tokens
    loss = summed_cross_entropy(logits, targets, weights)
    return loss.item(), weights.sum().item(), rows - len(wrong.unique())


def counted_logits(model: ArithmeticModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, vocabulary), targets (N,) and weights (N,) of the tokens whose loss counts."""
    hidden = model.hidden_states(batch.input_ids).flatten(0, 1)[batch.counted]
    targets, weights = (each.flatten()[batch.counted] for each in (batch.targets, batch.weights))
    return model.lm_head(hidden), targets, weights


# ------------------------------------------------------------------------------ the stages


def train_foundational(config: FoundationalConfig, shape: ModelConfig) -> Path:
    """Train a model from random weights, or from ``init_from``'s; returns the run folder."""
    config = resolve_paths(config)
    sources = Sources(config.tokenizer_path, config.corpus_path, config.init_from)
    loss = LossWeights(config.prompt_loss_weight, config.result_loss_weight)
    return _train(config, sources, loss, shape=shape)


def train_instruction(config: InstructionConfig) -> Path:
    """Fine-tune a foundational model on the tokens after ``<think>``; returns the run folder."""
    return _tune(config)


def train_instruction_lora(config: LoRAInstructionConfig) -> Path:
    """Fine-tune a low-rank adapter on a frozen model; returns the run folder."""
    return _tune(config, lora=config)


def _tune(config: InstructionConfig, lora: LoRAConfig | None = None) -> Path:
    config = resolve_paths(config)
    start = config.init_from or config.foundational_checkpoint
    sources = Sources(config.tokenizer_path, config.instruction_corpus_path, start)
    loss = LossWeights(0.0, config.result_loss_weight)
    return _train(config, sources, loss, lora=lora)


def _train(
    config: TrainingConfig,
    sources: Sources,
    loss: LossWeights,
    shape: ModelConfig | None = None,
    lora: LoRAConfig | None = None,
) -> Path:
    require_a_worker_each(config, world_size())
    prepare_training(config.threads, config.seed)
    beginning = begin(config, sources, shape=shape, lora=lora)
    task = _task(config, sources.corpus, beginning, loss)
    run = open_run(config, beginning.checkpoint, **beginning.hashes)
    _describe(run, task)
    summary = fit(run, task)
    print(f"done: best eval loss {summary['best']['eval_loss']:.4g}; models in {run.folder}")
    return run.folder


def _task(
    config: TrainingConfig, corpus_path: str, beginning: Beginning, loss: LossWeights
) -> SupervisedTask:
    model, tokenizer = beginning.checkpoint.model, beginning.checkpoint.tokenizer
    context, most = model.config.max_seq_length, config.excerpt_tokens
    if most > context:
        raise UserError(f"--excerpt-tokens {most}: is above the context of {context} tokens")
    train = TokenisedSamples(read_corpus(corpus_path), tokenizer, context, loss, most)
    report_dropped(train, f"samples of {corpus_path}", context, "left out")
    if train.dropped:
        left_out = set(train.dropped)
        kept = [r.expression for r in read_problems(corpus_path) if r.expression not in left_out]
        if not kept:
            longer = f"are longer than {context} tokens"
            raise UserError(f"all problems of {corpus_path} {longer}; {MORE_ROOM}")
        seen = beginning.seen_after(beginning.covered.limited_to(kept))
        beginning.checkpoint.trained_on = seen
    records = held_out_records(beginning.covered.held_out_spec(), config)
    held_out = TokenisedSamples(records, tokenizer, context, LossWeights(0.0, 1.0))
    counted = "left out of eval_loss and wrong in eval_exact"
    report_dropped(held_out, "held-out samples", context, counted)
    return SupervisedTask(train, held_out, config, model)


def report_dropped(
    samples: TokenisedSamples, name: str, context: int, consequence: str, remedy: str = MORE_ROOM
) -> None:
    """Say how many samples of each depth are longer than the context, and what follows.

    Raises:
        UserError: all of them are.
    """
    if len(samples) == 0:
        raise UserError(f"all {name} are longer than {context} tokens; {remedy}")
    if samples.dropped:
        depths = Counter(_depth_name(expression) for expression in samples.dropped)
        shown = ", ".join(f"{count} of depth {depth}" for depth, count in sorted(depths.items()))
        print(
            f"warning: {len(samples.dropped)} of {samples.kept + len(samples.dropped)} {name} are "
            f"longer than {context} tokens and {consequence} ({shown}); {remedy}"
        )


def _depth_name(expression: str) -> str:
    try:
        return str(parse(expression).depth)
    except ExpressionError:
        return "none (invalid)"


def _describe(run: Run, task: SupervisedTask) -> None:
    config, model = run.config, run.model
    print(
        f"{run.checkpoint.stage}: {parameter_summary(model)} on {model.device} "
        f"in {str(run.precision).removeprefix('torch.')}, {task.train.kept:,} samples, "
        f"{task.work(task.total_steps):,} tokens in {task.total_steps:,} steps, "
        f"seed {config.seed}\nrun folder {run.folder}"
    )
    if why := kernels.failure(model.device):
        print(f"note: training is faster with compiled functions; there are none, since {why}")
