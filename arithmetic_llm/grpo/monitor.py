"""Records of a GRPO run: figures of steps and validations, samples of rollouts, a warning."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean, stdev

from arithmetic_llm.config import GRPOConfig
from arithmetic_llm.distributed import added_up
from arithmetic_llm.evaluation.metrics import accuracy, rows
from arithmetic_llm.grpo.loss import LossTerms
from arithmetic_llm.grpo.rollout import Rollout, is_dead
from arithmetic_llm.task.problem import Row
from arithmetic_llm.training.run import ROLLOUTS, MetricsLog

DEAD_STEPS_TO_WARN = 10
COUNTED = ("kl", "entropy", "clipped", "tokens")  # sums over tokens, of the loss


class Monitor:
    """Record of the step at hand, and the number of steps without signal before it.

    Attributes:
        folder: where samples of rollouts go; None = nowhere, until the run is open.
        dead_steps: steps in a row without any signal; part of a checkpoint.
    """

    def __init__(self, config: GRPOConfig, has_reference: bool):
        self.config, self.has_reference = config, has_reference
        self.folder: Path | None = None
        self.dead_steps = 0
        self.begin_step()

    def begin_step(self) -> None:
        """Forget the last step and start the clock."""
        self.noted: dict[str, float] = {}
        self.sums: dict[str, float] = defaultdict(float)
        self._clock = time.monotonic()

    def note_rollouts(self, step: int, groups: list[list[Rollout]]) -> None:
        """Note the figures of a step's rollouts; now and then keep a group of them."""
        self.noted = rollout_metrics(groups, self._lap())
        self._keep_sample(step, groups[0])

    def note_signal(self, found: bool) -> None:
        """Count a step with or without signal; each tenth in a row without is warned of."""
        self.dead_steps = 0 if found else self.dead_steps + 1
        if self.dead_steps and self.dead_steps % DEAD_STEPS_TO_WARN == 0:
            self._warn_of_dead_steps()

    def note_loss(self, terms: LossTerms) -> None:
        """Add up the parts of a micro-batch's loss."""
        for name in COUNTED:
            self.sums[name] += getattr(terms, name)

    def end_step(self) -> None:
        """Note the time since the rollouts as that of training; gather what all have counted."""
        counted = [self.sums[name] for name in COUNTED]
        self.sums.update(zip(COUNTED, added_up(counted), strict=True))
        self.noted["seconds_training"] = self._lap()

    def metrics(self) -> dict[str, float]:
        """The log line of a step, under the names that users of TRL know."""
        names = {"entropy": "entropy", "clip_ratio": "clipped"}
        if self.has_reference:
            names["kl"] = "kl"
        tokens = self.sums["tokens"]  # none in a step without signal, which has no such figures
        means = {name: self.sums[key] / tokens for name, key in names.items() if tokens}
        return {**self.noted, **means}

    def _lap(self) -> float:
        """Seconds since the step began or since the last call."""
        before, self._clock = self._clock, time.monotonic()
        return self._clock - before

    def _keep_sample(self, step: int, group: list[Rollout]) -> None:
        """Keep one whole group with its texts, so that a reader can see what is rewarded."""
        if self.folder and (step + 1) % self.config.log_every == 0:
            log = MetricsLog(self.folder, ROLLOUTS)
            log.append(step=step + 1, rollouts=[rollout.as_dict() for rollout in group])

    def _warn_of_dead_steps(self) -> None:
        print(
            f"WARNING: {self.dead_steps} steps in a row without any signal: in each group all "
            "rewards are alike, or what differs is cut off and masked. Attempts teach nothing "
            f"(accuracy {self.noted['accuracy']:.3f}, cut off "
            f"{self.noted['completions/clipped_ratio']:.3f}). Choose {self._worth_asking()}, "
            "a higher --temperature, more --num-candidates or --refill-rounds.",
            file=sys.stderr,
        )

    def _worth_asking(self) -> str:
        """Advice which problems to ask, in the words of the data mode."""
        if self.config.data_mode == "instruction":
            return "a corpus of problems that succeed sometimes"
        return "depths that succeed sometimes (--max-depth, --adaptive-difficulty)"


def rollout_metrics(groups: list[list[Rollout]], seconds: float) -> dict[str, float]:
    """Figures of a step's rollouts, those of dead groups included.

    Args:
        seconds: that they took.
    """
    rollouts = [*chain(*groups)]
    parts = {name: fmean(r.parts[name] for r in rollouts) for name in rollouts[0].parts}
    return {
        "reward": fmean(r.reward for r in rollouts),
        "reward_std": fmean(stdev(r.reward for r in group) for group in groups),
        "accuracy": fmean(r.outcome.correct for r in rollouts),
        "frac_reward_zero_std": fmean(map(is_dead, groups)),
        "completions/mean_length": fmean(r.outcome.tokens for r in rollouts),
        "completions/clipped_ratio": fmean(r.outcome.cut_off for r in rollouts),
        "seconds_generating": seconds,
        "seconds_training": 0.0,
        **{f"rewards/{name}": value for name, value in parts.items()},
    }


def validation_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Mean reward, exact match, and exact match in each row, as an evaluation counts them."""
    outcomes = [rollout.outcome for rollout in rollouts]
    metrics = {
        "eval_reward": fmean(rollout.reward for rollout in rollouts),
        "eval_exact": _share(accuracy(outcomes)),
    }
    for kind in ("depth", "invalid", "terms"):
        for row in rows(outcomes, kind, trained_on=None):
            metrics[f"eval_exact_{row_name(Row(kind, row[kind]))}"] = _share(row)
    return metrics


def row_name(row: Row) -> str:
    """``depth_3``, ``terms_7`` (a flat sum) or ``invalid``."""
    return row.kind if row.kind == "invalid" else f"{row.kind}_{row.number}"


def _share(counted: dict[str, float]) -> float:
    """Correct ones of all samples, not rounded as the percentage beside them is."""
    return counted["correct"] / counted["samples"]
