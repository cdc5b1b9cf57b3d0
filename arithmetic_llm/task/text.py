"""Every word that the model reads or writes, and the patterns that read them back.

    <bos> Evaluate: 5 + 7 <think>
    Step 1: 5 + 7 = 12 Expression now: 12 </think> Final Result: 12 <eos>

What stands up to ``<think>`` is the prompt, what follows it the completion. A solution is stored in
several lines and goes to the model in one.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Literal

from arithmetic_llm.task.expression import MAX_DIGITS

SPECIAL_TOKENS = ("<pad>", "<unk>", "<bos>", "<eos>", "<think>", "</think>")
*_FRAME, CLOSE = SPECIAL_TOKENS
*_, END, OPEN = _FRAME
PROBLEM = "Evaluate:"
STEP = "Step"
NEW_EXPRESSION = "Expression now:"
REFUSAL = "Error:"
FINAL_RESULT = "Final Result:"

ERROR: Literal["ERROR"] = "ERROR"  # the answer to an invalid expression
Answer = int | Literal["ERROR"]

NEXT_STEP = re.compile(rf"(?={STEP}\s+[0-9]+:)")
BEFORE_LINE = re.compile(rf"(?= (?:{STEP} [0-9]+:|{NEW_EXPRESSION}) )")  # in a solution on one line
EQUATION = re.compile(rf"{STEP} ([0-9]+): (-?[0-9]+ [+-] -?[0-9]+) = (-?[0-9]+)")
_STEP_NUMBER = re.compile(rf" {STEP} ([0-9]+):")
_BEGUN = re.compile(rf"{OPEN}\s+")
_NUMBER_AT_END = re.compile(rf"{NEW_EXPRESSION}\s+-?[0-9]+\s*\Z")
FOREIGN = re.compile("|".join([PROBLEM, *_FRAME]))  # what no completion holds
_RESULT = re.compile(FINAL_RESULT.replace(" ", r"\s+"))
_ANSWER = re.compile(rf"\s+(-?(?:0|[1-9][0-9]{{0,{MAX_DIGITS - 1}}})|{ERROR})\s*")


def problem_text(expression: str) -> str:
    """``Evaluate: E``, the problem as a corpus stores it."""
    return f"{PROBLEM} {expression}"


def prompt_text(expression: str) -> str:
    """``Evaluate: E <think>``, the problem as it is put to the model."""
    return f"{problem_text(expression)} {OPEN}"


def sequence_text(problem: str, solution: str) -> str:
    """``Evaluate: E <think> Step 1: ... </think> Final Result: N``: a whole sample, on one line.

    Args:
        problem, solution: as a corpus stores them; the solution's ``<think>`` is the prompt's.
    """
    return f"{problem} {one_line(solution)}"


def step_label(number: int) -> str:
    """``Step k``."""
    return f"{STEP} {number}"


def expression_text(expression: str) -> str:
    """``Expression now: E``."""
    return f"{NEW_EXPRESSION} {expression}"


def step_text(number: int, operation: str, result: int, expression: str) -> str:
    """The two lines that state a step."""
    return f"{STEP} {number}: {operation} = {result}\n{NEW_EXPRESSION} {expression}"


def refusal_text(reason: str) -> str:
    """``Error: <reason>``, which stands for the steps where an expression is invalid."""
    return f"{REFUSAL} {reason}"


def result_text(answer: Answer | str) -> str:
    """``Final Result: N``."""
    return f"{FINAL_RESULT} {answer}"


def solution_text(trace: list[str], answer: Answer) -> str:
    """A solution as it is stored: the trace between ``<think>`` and ``</think>``, the result."""
    return "\n".join([begun(*trace), CLOSE, result_text(answer)])


def begun(*trace: str) -> str:
    """The beginning of a solution as it is stored, to the last line of a trace."""
    return "\n".join([OPEN, *trace])


def is_solution(text: str) -> bool:
    """Whether a text begins and closes a trace, as every stored solution does."""
    return text.startswith(OPEN) and CLOSE in text


def read_answer(text: str) -> Answer | None:
    """The result of a text that ends with ``Final Result: N``; None if it does not.

    The mark occurs once in the whole text, and nothing but white space follows the number; which
    white space makes no difference.
    """
    _, *stated = _RESULT.split(text)
    answer = _ANSWER.fullmatch(stated[0]) if len(stated) == 1 else None
    if answer is None:
        return None
    return ERROR if answer[1] == ERROR else int(answer[1])


def in_turn(lines: list[str]) -> bool:
    """Whether the lines of a trace, cut by `BEFORE_LINE`, are a step, its expression, and so on."""
    steps, expressions = lines[::2], lines[1::2]
    return len(steps) == len(expressions) > 0 and all(
        step.startswith(f" {STEP}") and expression.startswith(f" {NEW_EXPRESSION}")
        for step, expression in zip(steps, expressions, strict=True)
    )


def are_next_steps(step: str, following: str) -> bool:
    """Whether a text is a step with the expression after it, and another the steps after that."""
    numbers, more = _step_numbers(step), _step_numbers(following)
    return len(numbers) == 1 and bool(more) and _count_up([*numbers, *more])


def are_first_steps(solution: str) -> bool:
    """Whether a text begins a solution, with some of its steps, and leaves others to be done."""
    begins = _BEGUN.match(solution)
    ends = _NUMBER_AT_END.search(solution)  # nothing is left to do: it has lost its end
    numbers = _step_numbers(solution[begins.end() :]) if begins and not ends else []
    return bool(numbers) and _count_up([0, *numbers])


def _step_numbers(text: str) -> list[int]:
    """The numbers of a text's steps if it is steps alone, with the expression after each."""
    before, *lines = BEFORE_LINE.split(f" {one_line(text)}")
    if before or not in_turn(lines) or CLOSE in text or FOREIGN.search(text):
        return []
    return [int(_STEP_NUMBER.match(line)[1]) for line in lines[::2]]


def _count_up(numbers: list[int]) -> bool:
    return all(b == a + 1 for a, b in pairwise(numbers))


def settled(text: str, cut_off: bool) -> str:
    """A text that was cut off without the digits at its end: they may be part of any number."""
    return text.rstrip("0123456789") if cut_off else text


def one_spaced(text: str) -> str:
    """The words of a text, one space apart."""
    return " ".join(text.split())


def one_line(text: str) -> str:
    """A solution on one line, as the plain-text corpus and the model have it."""
    return text.replace("\n", " ")
