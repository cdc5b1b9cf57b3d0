"""Solving with a trained model, and checking it: the same thing for a program and for a person.

solver = ArithmeticSolver.from_checkpoint("models/instruction_.../best_model.pt")
outcome = solver.solve("5 + (10 - 3)")
outcome.result, outcome.value, outcome.correct  # the model's, the exact one, whether they agree
for step in outcome.steps:
    print(step.text, step.ok)
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, overload

from arithmetic_llm.config import InteractiveConfig
from arithmetic_llm.corpus.coverage import Coverage
from arithmetic_llm.evaluation.draft import right_continuations
from arithmetic_llm.evaluation.judge import Outcome, judge
from arithmetic_llm.evaluation.length import MOST_NUMBERS, rooms_to_answer
from arithmetic_llm.folders import resolve_stamp
from arithmetic_llm.model.decode import GREEDY, Completion, SamplingParams, decode, generate
from arithmetic_llm.model.load import check_tokenizer, load_model
from arithmetic_llm.model.tokenizer import ArithmeticTokenizer
from arithmetic_llm.model.transformer import ArithmeticModel
from arithmetic_llm.runtime import UserError, resolve_device
from arithmetic_llm.task.expression import count_numbers
from arithmetic_llm.task.problem import Problem, problem_from


class ArithmeticSolver:
    """A model with its tokenizer, ready to solve.

    Args:
        trained_on: what the checkpoint says of its training; decides what `warnings` says.
        max_new_tokens: most tokens to write; 0 = enough for a right answer and some more.
    """

    def __init__(
        self,
        model: ArithmeticModel,
        tokenizer: ArithmeticTokenizer,
        trained_on: Coverage | None = None,
        max_new_tokens: int = 0,
        sampling: SamplingParams = GREEDY,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.trained_on = trained_on
        self.max_new_tokens, self.sampling = max_new_tokens, sampling

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        device: str = "auto",
        tokenizer_path: str = "",
        base_checkpoint: str = "",
        **options: Any,
    ) -> ArithmeticSolver:
        """Load a checkpoint of any stage, an adapter included.

        Args:
            tokenizer_path: if given, must be the tokenizer that the checkpoint was trained with.
            base_checkpoint: where an adapter's base is, if it has moved.
            options: ``max_new_tokens``, ``sampling``.

        Raises:
            UserError: no checkpoint there, a damaged one, another tokenizer, no such device.
        """
        path = resolve_stamp(str(path))
        base = resolve_stamp(base_checkpoint)
        checkpoint = load_model(path, resolve_device(device), base)
        check_tokenizer(checkpoint, tokenizer_path, path)
        return cls(checkpoint.model, checkpoint.tokenizer, checkpoint.trained_on, **options)

    @classmethod
    def from_config(cls, config: InteractiveConfig) -> ArithmeticSolver:
        """The solver that a script's flags ask for; raises as `from_checkpoint` does."""
        return cls.from_checkpoint(
            config.model_path,
            config.device,
            config.tokenizer_path,
            config.base_checkpoint,
            max_new_tokens=config.max_gen_length,
        )

    @property
    def context(self) -> int:
        """Tokens that the model is made for, prompt and solution together."""
        return self.model.config.max_seq_length

    @overload
    def solve(self, expressions: str, batch_size: int = 64) -> Outcome: ...
    @overload
    def solve(self, expressions: Sequence[str], batch_size: int = 64) -> list[Outcome]: ...

    def solve(self, expressions, batch_size=64):
        """Solve one expression, or several as one batch.

        Each is put to the model in canonical spelling, an invalid one as it stands. Whether the
        answer is right is in ``correct`` and ``steps``.

        Raises:
            UserError: an expression that alone is longer than the model's context.
        """
        if isinstance(expressions, str):
            return self.solve([expressions], batch_size)[0]
        problems = [problem_from(expression) for expression in expressions]
        prompts = [self.prompt(problem.expression) for problem in problems]
        limits = self._limits(problems)
        guess = right_continuations(problems, self.tokenizer)
        written = generate(self.model, prompts, limits, self.sampling, batch_size, guess=guess)
        return [self._judge(*row) for row in zip(problems, prompts, written, strict=True)]

    def stream(self, expression: str) -> Generator[str, None, Outcome]:
        """Solve one expression, giving the text in pieces as they are written.

        The generator's return value is what `solve` returns; the pieces joined and stripped are its
        ``text``.

        Raises:
            UserError: as `solve`.
        """
        problem = problem_from(expression)
        prompt, limits = self.prompt(problem.expression), self._limits([problem])
        written, guess = Completion(), right_continuations([problem], self.tokenizer)
        shown = 0
        for emission in decode(self.model, [prompt], limits, self.sampling, guess=guess):
            written.add(emission)
            settled = self.tokenizer.settled(written.tokens)
            yield self.tokenizer.decode_completion(written.tokens[shown:settled])
            shown = settled
        yield self.tokenizer.decode_completion(written.tokens[shown:])
        return self._judge(problem, prompt, written)

    def attempt(self, expression: str) -> tuple[list[int], list[int], Outcome]:
        """Solve one expression; returns the tokens of the prompt, those written, and the outcome.

        Raises:
            UserError: as `solve`.
        """
        problem = problem_from(expression)
        prompt, limits = self.prompt(problem.expression), self._limits([problem])
        guess = right_continuations([problem], self.tokenizer)
        (written,) = generate(self.model, [prompt], limits, self.sampling, guess=guess)
        return prompt, written.tokens, self._judge(problem, prompt, written)

    def prompt(self, expression: str) -> list[int]:
        """Token ids of the prompt.

        Raises:
            UserError: it leaves no room for an answer within the context.
        """
        numbers = count_numbers(expression)
        if len(expression) <= 20 * self.context and numbers <= MOST_NUMBERS:  # else not worth it
            ids = self.tokenizer.prompt_ids(expression)
            if len(ids) < self.context:
                return ids
        raise UserError(
            f"an expression of {len(expression):,} characters is too long: with its solution it "
            f"must fit into this model's {self.context:,} tokens"
        )

    def warnings(self, expression: str) -> list[str]:
        """Differences of the expression from all that the model was trained on."""
        problem, seen = problem_from(expression), self.trained_on
        if seen is None or seen.covers(problem) or problem.row.kind == "invalid":
            return []
        found = []
        if problem.depth is not None and problem.depth not in seen.depths:
            found.append(f"depth {problem.depth}; trained on depth {_span(seen.depths)}")
        elif problem.terms is not None and problem.terms not in seen.sums:
            found.append(f"a sum of {problem.terms} numbers; trained on {_span(seen.sums)}")
        low, high = seen.all_numbers
        if problem.low < low or problem.high > high:
            found.append(f"numbers {problem.low} to {problem.high}; trained on {low} to {high}")
        return found

    def _limits(self, problems: Sequence[Problem]) -> list[int]:
        return rooms_to_answer(problems, self.tokenizer, self.context, self.max_new_tokens)

    def _judge(self, problem: Problem, prompt: list[int], written: Completion) -> Outcome:
        return judge(problem, written, len(prompt), self.tokenizer, self.context)


def _span(numbers: Sequence[int]) -> str:
    """``1 to 4``, ``3``, or ``none``."""
    if not numbers:
        return "none"
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
