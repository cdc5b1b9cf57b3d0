"""Judging one completion: for evaluation, validation, rewards and the solver alike."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any

from arithmetic_llm.model.decode import Completion
from arithmetic_llm.model.tokenizer import ArithmeticTokenizer
from arithmetic_llm.task.problem import Problem
from arithmetic_llm.task.text import Answer, settled
from arithmetic_llm.task.verifier import StepVerdict, Verdict, verify

NEAR_TIE = 1e-4  # a gap between the two best logits that another kernel's rounding might close


@dataclass(frozen=True)
class Outcome:
    """Text that a policy wrote for one problem, with its verdict."""

    problem: Problem
    text: str  # what followed the prompt, without a last <eos>
    verdict: Verdict
    tokens: int  # written, <eos> included
    cut_off: bool  # by the length limit
    beyond_context: bool  # prompt and text together are longer than any training sample could be
    margin: float = float("inf")  # smallest gap between the two best logits on the way

    @property
    def expression(self) -> str:
        """Problem as the policy read it: canonical, or as it stands if it is invalid."""
        return self.problem.expression

    @property
    def result(self) -> Answer | None:
        """The result that the text ends with; ``"ERROR"`` calls the problem invalid."""
        return self.verdict.predicted

    @property
    def value(self) -> Answer:
        """The exact value; ``"ERROR"`` for an invalid expression."""
        return self.verdict.answer

    @property
    def correct(self) -> bool:
        """The text ends with one final result, the exact value; see `verifier`."""
        return self.verdict.correct

    @property
    def steps(self) -> tuple[StepVerdict, ...]:
        """The steps as written: ``text``, ``ok``, and ``error`` if one is not."""
        return self.verdict.steps

    @property
    def near_tie(self) -> bool:
        """Another kernel's rounding might have led to another text."""
        return self.margin < NEAR_TIE

    def as_dict(self) -> dict[str, Any]:
        """An entry of ``sample_outputs_*.json``."""
        verdict = self.verdict
        return {
            "expression": self.expression,
            "depth": self.problem.depth,
            "ground_truth": self.value,
            "predicted": self.result,
            "generated_text": self.text,
            "correct": self.correct,
            "error": verdict.error,
            "terms": self.problem.terms,
            "style": self.problem.style,
            "trace_error": verdict.trace_error,
            "first_error": verdict.first_error,
            "valid_steps": verdict.valid_steps,
            "needed_steps": verdict.needed_steps,
            "tokens": self.tokens,
            "cut_off": self.cut_off,
            "beyond_context": self.beyond_context,
            "margin": self.margin if isfinite(self.margin) else None,
        }


def judge(
    problem: Problem,
    completion: Completion,
    prompt_tokens: int,
    tokenizer: ArithmeticTokenizer,
    context: int,
) -> Outcome:
    """Verify one completion: for evaluation, validation, rewards and the solver alike.

    Args:
        prompt_tokens: length of the prompt.
        context: the most tokens that a training sample could have.
    """
    cut_off = completion.finish_reason == "length"
    text = tokenizer.decode_completion(completion.tokens).strip()
    return Outcome(
        problem=problem,
        text=text,
        verdict=verify(problem.expression, settled(text, cut_off), cut_off),
        tokens=len(completion.tokens),
        cut_off=cut_off,
        beyond_context=prompt_tokens + len(completion.tokens) > context,
        margin=completion.margin,
    )
