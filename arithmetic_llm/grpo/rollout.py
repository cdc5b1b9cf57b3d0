"""What the policy makes of its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from arithmetic_llm.config import GRPOConfig
from arithmetic_llm.evaluation.evaluate import right_answers
from arithmetic_llm.evaluation.metrics import Outcome, Row, judge, problem_from
from arithmetic_llm.grpo.rewards import Attempt, score
from arithmetic_llm.model.decode import Completion, Sampling, generate
from arithmetic_llm.model.tokenizer import ArithmeticTokenizer
from arithmetic_llm.model.transformer import ArithmeticModel


@dataclass(frozen=True)
class Rollout:
    """An outcome, the tokens that it was judged by, and what it is rewarded with."""

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


def row_name(row: Row) -> str:
    """``depth_3``, ``terms_7`` (a flat sum) or ``invalid``."""
    return row.kind if row.kind == "invalid" else f"{row.kind}_{row.number}"


def roll_out(
    model: ArithmeticModel,
    tokenizer: ArithmeticTokenizer,
    expressions: Sequence[str],
    copies: int,
    sampling: Sampling,
    config: GRPOConfig,
    weights: dict[str, float],
) -> list[list[Rollout]]:
    """``copies`` completions of each expression, in one batch; a group for each expression.

    As in an evaluation, right answers are guesses: they save passes and change no text.
    """
    asked = [problem_from(expression) for expression in expressions for _ in range(copies)]
    prompts = [tokenizer.prompt_ids(problem.expression) for problem in asked]
    guesses = right_answers(asked, tokenizer)
    limit, context = config.max_gen_length, model.config.max_seq_length
    size = config.rollout_batch_size
    written = generate(model, prompts, limit, sampling, size, guesses=guesses)
    rollouts = []
    for problem, prompt, completion in zip(asked, prompts, written, strict=True):
        outcome = judge(problem, completion, len(prompt), tokenizer, context)
        rollouts.append(rewarded(outcome, prompt, completion, config, weights))
    return [rollouts[start : start + copies] for start in range(0, len(rollouts), copies)]


def rewarded(
    outcome: Outcome,
    prompt: list[int],
    completion: Completion,
    config: GRPOConfig,
    weights: dict[str, float],
) -> Rollout:
    """The rollout of a completion that has been judged, with its reward."""
    attempt = Attempt(outcome.verdict, outcome.tokens, config.max_gen_length, outcome.cut_off)
    reward, parts = score(attempt, weights)
    if outcome.cut_off and config.cutoff == "penalise":
        reward = -1.0
    return Rollout(outcome, prompt, completion, reward, parts)
