"""Rollouts: completions of prompts, judged and rewarded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from arithmetic_llm.config import GRPOConfig
from arithmetic_llm.distributed import gather_shares, share
from arithmetic_llm.evaluation.draft import right_continuations
from arithmetic_llm.evaluation.judge import Outcome, judge
from arithmetic_llm.grpo.rewards import Attempt, score
from arithmetic_llm.model.decode import Completion, SamplingParams, generate
from arithmetic_llm.model.tokenizer import ArithmeticTokenizer
from arithmetic_llm.model.transformer import ArithmeticModel
from arithmetic_llm.task.problem import problem_from


@dataclass(frozen=True)
class Rollout:
    """An outcome with its reward, and the tokens that it was judged by."""

    outcome: Outcome
    prompt: list[int]
    completion: Completion
    reward: float
    parts: dict[str, float]  # each reward before its weight

    def as_dict(self) -> dict[str, Any]:
        """An entry of ``rollouts.jsonl``."""
        outcome = self.outcome
        return {
            "expression": outcome.expression,
            "depth": outcome.problem.depth,
            "text": outcome.text,
            "tokens": outcome.tokens,
            "finish_reason": self.completion.finish_reason,
            "correct": outcome.correct,
            "error": outcome.verdict.trace_error,
            "reward": self.reward,
            "rewards": self.parts,
        }


def roll_out(
    model: ArithmeticModel,
    tokenizer: ArithmeticTokenizer,
    expressions: Sequence[str],
    copies: int,
    sampling: SamplingParams,
    config: GRPOConfig,
    weights: dict[str, float],
) -> list[list[Rollout]]:
    """Write ``copies`` completions of each expression and reward them.

    As in an evaluation, a right solver makes the decoder's guesses: they save passes and change no
    text. Of several processes each writes whole groups, and has them all in the end; what a row's
    random numbers are does not depend on who writes it.

    Args:
        sampling: how tokens are chosen.
        weights: of the rewards, by name.

    Returns:
        A group of ``copies`` rollouts for each expression, in order.
    """
    asked = [problem_from(expression) for expression in expressions for _ in range(copies)]
    prompts = [tokenizer.prompt_ids(problem.expression) for problem in asked]
    groups = [range(i * copies, (i + 1) * copies) for i in range(len(expressions))]
    mine = [*chain(*share(groups))]
    guess = right_continuations(asked, tokenizer)
    limit, context = config.max_gen_length, model.config.max_seq_length
    size = config.rollout_batch_size
    written = generate(model, prompts, limit, sampling, size, guess=guess, rows=mine)
    rollouts = []
    for row, completion in zip(mine, written, strict=True):
        outcome = judge(asked[row], completion, len(prompts[row]), tokenizer, context)
        rollouts.append(rewarded(outcome, prompts[row], completion, config, weights))
    return gather_shares(
        [rollouts[start : start + copies] for start in range(0, len(rollouts), copies)]
    )


def rewarded(
    outcome: Outcome,
    prompt: list[int],
    completion: Completion,
    config: GRPOConfig,
    weights: dict[str, float],
) -> Rollout:
    """Rollout of a completion that has been judged, with its reward.

    Args:
        config: has the length limit, and what a cut-off completion costs.
        weights: of the rewards, by name.
    """
    attempt = Attempt(outcome.verdict, outcome.tokens, config.max_gen_length, outcome.cut_off)
    reward, parts = score(attempt, weights)
    if outcome.cut_off and config.cutoff == "penalise":
        reward = -1.0
    return Rollout(outcome, prompt, completion, reward, parts)


def is_dead(group: Sequence[Rollout]) -> bool:
    """Tell whether all rewards are alike: such a group does not say what to do better."""
    return all(rollout.reward == group[0].reward for rollout in group)
