"""A stand-in for a model that knows every answer, decoded like a real one.

What it is to write is a function of the expression, so a test can have it be wrong in one place
and right everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from arithmetic_llm.config import ModelConfig
from arithmetic_llm.model.tokenizer import EOS, PAD, THINK, ArithmeticTokenizer
from arithmetic_llm.task.solution import solve
from arithmetic_llm.task.text import one_line


def right_answer(expression: str) -> str:
    """What a perfect model writes after ``<think>``."""
    return one_line(solve(expression).text).removeprefix("<think>")


def with_result(expression: str, result: object) -> str:
    """The right steps, but another final result."""
    steps, _, _ = right_answer(expression).rpartition("Final Result:")
    return f"{steps}Final Result: {result}"


class _Memory:
    """In place of a KV cache: the tokens of each row, of which ``lengths`` count."""

    def __init__(self, rows: int):
        self.rows: list[list[int]] = [[] for _ in range(rows)]
        self.lengths = torch.zeros(rows, dtype=torch.long)

    def read(self, ids: Tensor) -> None:
        """Put new tokens behind those that count."""
        known = zip(self.rows, self.lengths.tolist(), ids.tolist(), strict=True)
        self.rows = [row[:length] + new for row, length, new in known]

    def keep(self, rows: Tensor) -> None:
        self.rows = [self.rows[row] for row in rows.tolist()]
        self.lengths = self.lengths[rows]

    def remove(self, row: int) -> None:
        self.rows[row], self.lengths[row] = self.rows[-1], self.lengths[-1]
        self.rows, self.lengths = self.rows[:-1], self.lengths[:-1]


class Oracle(nn.Module):
    """Has all of `ArithmeticModel` that the decoder uses; its hidden states are its logits."""

    def __init__(
        self,
        tokenizer: ArithmeticTokenizer,
        answer: Callable[[str], str] = right_answer,
        context: int = 1024,
    ):
        super().__init__()
        self.config = ModelConfig(max_seq_length=context)
        self.tokenizer, self.answer = tokenizer, answer
        self.scripts: dict[tuple[int, ...], list[int]] = {}
        self.lm_head = nn.Identity()
        self.lm_head.weight = nn.Parameter(torch.zeros(1))
        self.device = torch.device("cpu")

    def new_cache(self, rows: int) -> _Memory:
        return _Memory(rows)

    def hidden_states(self, ids: Tensor, memory: _Memory, lengths: Tensor) -> Tensor:
        memory.read(ids)
        logits = torch.zeros(*ids.shape, self.tokenizer.vocab_size)
        for row, (tokens, start) in enumerate(
            zip(memory.rows, memory.lengths.tolist(), strict=True)
        ):
            for place in range(ids.shape[1]):
                logits[row, place, self._next(tokens[: start + place + 1])] = 10.0
        memory.lengths = memory.lengths + lengths
        return logits

    def _next(self, tokens: list[int]) -> int:
        if THINK not in tokens:
            return PAD  # within the prompt nobody asks
        prompt_end = tokens.index(THINK) + 1
        prompt = tuple(tokens[: prompt_end - 1])
        script = self.scripts.get(prompt) or self.scripts.setdefault(prompt, self._script(prompt))
        written = len(tokens) - prompt_end
        return script[min(written, len(script) - 1)]  # a finished row may still be asked

    def _script(self, prompt: tuple[int, ...]) -> list[int]:
        text = self.tokenizer.decode(prompt[1:])  # without <bos>
        answer = self.answer(text.removeprefix("Evaluate: ").rstrip())
        return [*self.tokenizer.encode(answer), EOS]
