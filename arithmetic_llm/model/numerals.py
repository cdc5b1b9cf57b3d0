"""How the digits of a number are spelled for a model: which comes first, and what place it has.

Text has ``723``. A model may be given, and may write,

* ``reversed``: ``3 2₁ 7₂``, the units first, each digit with the mark of its place. A sum is
  written the way it is carried: each digit follows from two digits and the ones before it, and
  where the number ends is asked last (a known aid: Lee et al., 2023, arXiv:2307.03381);
* ``places``: ``7₂ 2₁ 3``, as people write. The first digit then depends on all carries behind it,
  and how many digits follow has to be known before any is written.

Both are rules for the ``tokenizers`` library, which go into the tokenizer's file, so that whoever
loads it spells numbers alike; and both are functions, which do the same in less time.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

DIGITS = "0123456789"
MARKS = "₁₂₃₄"  # tens, hundreds, thousands, and all places beyond
_TURNED = len(MARKS) + 1  # so many digits of a number are turned; what is before them stays there
_MARK = f"[{MARKS}]"
UNMARKED = str.maketrans("", "", MARKS)
_STRANGE = str.maketrans(dict.fromkeys(MARKS, "\N{REPLACEMENT CHARACTER}"))
_NUMBER = re.compile("[0-9]{2,}")
PLACED = [(digit, mark) for mark in MARKS for digit in DIGITS]

Rule = tuple[str, str]  # a regular expression, and what is put in the place of a match


@lru_cache(maxsize=100_000)
def _as_written(number: str) -> str:
    """``723`` as ``7₂2₁3``."""
    marks = MARKS[-1] * (len(number) - _TURNED) + MARKS[::-1][-len(number) + 1 :]
    return "".join(map("".join, zip(number, marks, strict=False))) + number[-1]


@lru_cache(maxsize=100_000)
def _units_first(number: str) -> str:
    """``723`` as ``32₁7₂``."""
    far = "".join(digit + MARKS[-1] for digit in number[:-_TURNED])
    units, *others = number[-_TURNED:][::-1]
    return far + units + "".join(map("".join, zip(others, MARKS, strict=False)))


def _turned_back(number: str) -> str:
    """``327`` as ``723``."""
    return number[:-_TURNED] + number[-_TURNED:][::-1]


def _mark_places() -> list[Rule]:
    """Where each mark goes is told by the one before."""
    right = {"₁": "[0-9](?![0-9])", "₂": "[0-9]₁", "₃": "[0-9]₂", "₄": "[0-9]+₃"}
    return [(f"(?<=[0-9])(?={what})", mark) for mark, what in right.items()]


def _turn() -> list[Rule]:
    """A rule cannot move what it finds. So each digit is put behind the number, the highest first,
    and then taken away where it stood."""
    end = f"(?!{_MARK}|[0-9](?!{_MARK}))"  # no mark comes next, and no digit that has none
    copies = [
        (f"(?<={digit}[0-9]{{{place}}}){end}", digit + MARKS[place - 1])
        for place in range(len(MARKS), 0, -1)
        for digit in DIGITS
    ]
    far = ("(?<=[0-9])(?=[0-9]" + f"(?!{_MARK}))", MARKS[-1])
    return [*copies, (f"[0-9](?=[0-9]{{1,{len(MARKS)}}}{end})", ""), far]


class Spelling(NamedTuple):
    """One way to spell numbers, as rules of the library and as what they come to."""

    marking: list[Rule]  # of a text without marks
    reading: list[Rule]  # of a text that the marks have been taken out of
    spelled: Callable[[str], str]
    read: Callable[[str], str]

    def encoded(self, text: str) -> str:
        """A text with its numbers spelled; a mark that it has itself becomes another character."""
        return _NUMBER.sub(lambda found: self.spelled(found[0]), text.translate(_STRANGE))

    def decoded(self, text: str) -> str:
        """The text of what a model wrote, its tokens joined."""
        text = text.translate(UNMARKED)
        return _NUMBER.sub(lambda found: self.read(found[0]), text) if self.reading else text

    def normalizer(self) -> dict:
        """`encoded` as the ``tokenizers`` library's file has it."""
        strange = (_MARK, "\N{REPLACEMENT CHARACTER}")
        return {
            "type": "Sequence",
            "normalizers": [_replace(rule) for rule in [strange, *self.marking]],
        }

    def decoder(self) -> dict:
        """`decoded` in the same way. Rules that turn leave marks, which go in the end."""
        unmark, fuse = _replace((_MARK, "")), {"type": "Fuse"}
        turned = [*map(_replace, self.reading), unmark] if self.reading else []
        return {"type": "Sequence", "decoders": [unmark, fuse, *turned]}


def _replace(rule: Rule) -> dict:
    pattern, content = rule
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


SPELLINGS = {
    "reversed": Spelling(_turn(), _turn(), _units_first, _turned_back),  # turned twice is as before
    "places": Spelling(_mark_places(), [], _as_written, str),
}
