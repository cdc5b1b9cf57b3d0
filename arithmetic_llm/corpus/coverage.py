"""What a corpus covers, and so what a model trained on it has seen."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from arithmetic_llm.config import (
    LARGEST_NUMBER,
    MAX_CHAIN_NUMBERS,
    MAX_DEPTH,
    MAX_FLAT_TERMS,
    STYLES,
    TREE_STYLES,
    SampleSpec,
)
from arithmetic_llm.corpus.files import NO_PROBLEM, read_corpus
from arithmetic_llm.corpus.record import Record
from arithmetic_llm.runtime import UserError, checked, sha256_file
from arithmetic_llm.task.expression import Expression, ExpressionError, count_numbers, parse, spell
from arithmetic_llm.task.problem import Problem, split_of_drawn


@dataclass(frozen=True)
class Coverage:
    """The kinds of problems in a corpus.

    Attributes:
        styles: style to number of samples (nested, typed, padded, flat, chain, drill, rewrite,
            invalid).
        depths: exact depths of its trees, ascending.
        flat_terms: how many numbers its flat sums have, ascending.
        num_range: smallest and largest number, drills not counted.
        splits: split to number of samples, rewritings not counted.
        wide_range: smallest and largest number of the samples that are not limited to
            ``num_range``, if there are any.
        chain_numbers: most numbers in its chains; 0 if it has none.
    """

    styles: dict[str, int]
    depths: tuple[int, ...]
    flat_terms: tuple[int, ...]
    num_range: tuple[int, int]
    splits: dict[str, int]
    wide_range: tuple[int, int] | None = None
    chain_numbers: int = 0

    @property
    def all_numbers(self) -> tuple[int, int]:
        """Smallest and largest number, drills not counted."""
        return _union(self.num_range, self.wide_range)

    def covers(self, problem: Problem) -> bool:
        """Whether there are problems of this one's kind: its row, its numbers and its style."""
        if problem.row.kind == "invalid":
            return "invalid" in self.styles
        in_style = problem.style is None or problem.style in self.styles
        in_row = self._has_row(problem) or self._has_chain(problem)
        ranges = (self.num_range, self.wide_range or self.num_range)
        return in_style and in_row and any(_holds(numbers, problem) for numbers in ranges)

    @property
    def sums(self) -> tuple[int, ...]:
        """How many numbers its sums without parentheses have, ascending.

        1 + 2 + 3 is a flat sum, but also (1 + 2) + 3 as people type it.
        """
        typed = {depth + 1 for depth in self.depths} if "typed" in self.styles else set()
        return tuple(sorted({*self.flat_terms, *typed}))

    def _has_row(self, problem: Problem) -> bool:
        return problem.depth in self.depths if problem.terms is None else problem.terms in self.sums

    def _has_chain(self, problem: Problem) -> bool:
        """Whether there are chains as long, whose parentheses nest as deep."""
        text = problem.expression
        nesting = accumulate((symbol == "(") - (symbol == ")") for symbol in text)
        long_enough = count_numbers(text) <= self.chain_numbers
        return long_enough and problem.terms is None and max(nesting) < max(self.depths, default=0)

    def merge(self, later: Coverage) -> Coverage:
        """Union with a later stage: all that a model has seen after both."""
        wide = self.wide_range or later.wide_range
        return Coverage(
            styles=dict(Counter(self.styles) + Counter(later.styles)),
            depths=tuple(sorted({*self.depths, *later.depths})),
            flat_terms=tuple(sorted({*self.flat_terms, *later.flat_terms})),
            num_range=_union(self.num_range, later.num_range),
            splits=dict(Counter(self.splits) + Counter(later.splits)),
            wide_range=wide and _union(wide, later.wide_range),
            chain_numbers=max(self.chain_numbers, later.chain_numbers),
        )

    def limited_to(self, expressions: Iterable[str]) -> Coverage:
        """The same without the depths, and the lengths of sums, that no expression has.

        A sum that may be a flat one or a typed tree speaks for its length alone.
        """
        depths, terms = set(), set()
        for text in expressions:
            with contextlib.suppress(ExpressionError):
                tree = parse(text)
                if "(" in tree.canonical or tree.terms == 2:
                    depths.add(tree.depth)
                if "(" not in tree.canonical:
                    terms.add(tree.terms)
        return replace(
            self,
            depths=tuple(depth for depth in self.depths if depth in depths),
            flat_terms=tuple(count for count in self.sums if count in terms),
        )

    @property
    def exceeds_sampler(self) -> bool:
        """Whether `held_out_spec` falls short of the corpus: the sampler has limits."""
        spec = self.held_out_spec()
        return (
            min(self.depths, default=1) < spec.min_depth
            or max(self.depths, default=1) > spec.max_depth
            or max(self.flat_terms, default=2) > spec.flat_terms
            or self.num_range != spec.num_range
        )

    def held_out_spec(self) -> SampleSpec:
        """Settings to draw problems like the corpus's own: trees if it has any, else the rest.

        What lies beyond the sampler's limits is replaced by the limit.
        """
        only, kinds = {}, ("flat", "chain", "drill")
        if not self.depths:
            only = {next((style for style in kinds if style in self.styles), "invalid"): 1.0}
        rates = {f"{style}_rate": only.get(style, 0.0) for style in (*kinds, "invalid")}
        return SampleSpec(
            num_range=tuple(_within(-LARGEST_NUMBER, n, LARGEST_NUMBER) for n in self.num_range),
            min_depth=_within(1, min(self.depths, default=1), MAX_DEPTH),
            max_depth=_within(1, max(self.depths, default=1), MAX_DEPTH),
            flat_terms=_within(2, max(self.flat_terms, default=2), MAX_FLAT_TERMS),
            typed_rate=0.0,
            padded_rate=0.0,
            chain_numbers=_within(3, self.chain_numbers or 3, MAX_CHAIN_NUMBERS),
            wide_rate=0.5 if self.wide_range else 0.0,
            wide_range=self.wide_range or SampleSpec().wide_range,
            **rates,
        )


_FORM = {  # of what a file says of a coverage
    "styles": dict[str, int],
    "depths": list[int],
    "flat_terms": list[int],
    "num_range": tuple[int, int],
    "splits": dict[str, int],
}
_MAY_BE_LEFT_OUT = {"wide_range": tuple[int, int], "chain_numbers": int}  # older files know neither


def to_dict(coverage: Coverage | None) -> dict[str, Any]:
    """Plain lists and numbers for a file, which calls them ``trained_on``; empty if unknown."""
    if coverage is None:
        return {}
    said = {key: value for key, value in asdict(coverage).items() if key in _FORM or value}
    return json.loads(json.dumps(said))


def from_dict(said: dict[str, Any]) -> Coverage | None:
    """The coverage that a file states; None if the file knows nothing.

    Raises:
        KeyError, ValueError: a part is missing, or of another form.
    """
    if not said:
        return None
    form = _FORM | {key: kind for key, kind in _MAY_BE_LEFT_OUT.items() if key in said}
    parts = {key: checked(kind, said[key], f"trained_on {key}") for key, kind in form.items()}
    plain = {key: tuple(part) if isinstance(part, list) else part for key, part in parts.items()}
    return Coverage(**plain)


def coverage_of(corpus_path: str | Path) -> Coverage:
    """Coverage by the corpus's sidecar if that describes this very file, else by reading all of it.

    Prints a line if the text has to do, and one if held-out problems cannot be like all of it.
    """
    records = read_corpus(corpus_path)  # refuses what is no file
    covered = _told_by_sidecar(corpus_path) or survey(records)
    if {*covered.styles} == {"rewrite"}:
        raise UserError(f"{corpus_path}: {NO_PROBLEM}")
    if covered.exceeds_sampler:
        print(
            f"{corpus_path}: has problems that the sampler does not draw; held-out problems have "
            f"depths 1 to {MAX_DEPTH}, flat sums up to {MAX_FLAT_TERMS} numbers"
        )
    return covered


def _told_by_sidecar(corpus_path: str | Path) -> Coverage | None:
    """Coverage by the sidecar; None, and a printed line, unless it describes this very file."""
    sidecar, state = Path(f"{corpus_path}.meta.json"), "is missing"
    if sidecar.is_file():
        state = f"does not describe {corpus_path}"
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # damaged
            meta = json.loads(sidecar.read_text(encoding="utf-8"))
            if meta["sha256"] == sha256_file(corpus_path):
                return _from_sidecar(meta)
    print(
        f"{sidecar}: {state}; depths, styles and numbers are read from the text itself, where a "
        "drill with small numbers is a problem of depth 1"
    )
    return None


def _holds(numbers: tuple[int, int], problem: Problem) -> bool:
    return numbers[0] <= problem.low and problem.high <= numbers[1]


def _union(one: tuple[int, int], other: tuple[int, int] | None) -> tuple[int, int]:
    """The smallest range that has both."""
    return (min(one[0], other[0]), max(one[1], other[1])) if other else one


def _within(least: int, value: int, most: int) -> int:
    return max(least, min(value, most))


def survey(records: Iterable[Record]) -> Coverage:
    """Coverage by parsing every expression, see `_Texts` for what its text cannot tell."""
    texts = _Texts()
    for record in records:
        if record.is_problem:
            texts.add(record.expression)
        else:
            texts.styles["rewrite"] += 1  # most do not tell which split their tree is of
    return texts.coverage()


class _Texts:
    """Survey of a corpus's texts; sums and pairs can be told apart only when all are seen.

    - A sum of three or more numbers without parentheses is a typed tree if the corpus has other
      typed trees and trees of its depth, else a flat sum.
    - A pair, ``31 - -12``, is a drill if its numbers leave the range of all other expressions and
      are in reach of their results, or have a digit more where there are negative numbers. A
      drill within that range counts as a tree of depth 1.
    - A sum of two numbers is a flat sum if the corpus has flat sums and no trees but pairs.
    - What lacks parentheses, but not all, and is deeper than every nested tree, is a chain.
    """

    def __init__(self) -> None:
        self.styles: Counter[str] = Counter()
        self.splits: Counter[str] = Counter()
        self.depths: set[int] = set()
        self.typed: Counter[tuple[int, int]] = Counter()  # with parentheses, by depth and terms
        self.sums: Counter[int] = Counter()  # by terms
        self.pairs: Counter[tuple[int, int]] = Counter()  # by numbers, the smaller first
        self.numbers: set[int] = set()  # of all but the pairs

    def add(self, text: str) -> None:
        """Take in one expression, valid or not."""
        try:
            tree = parse(text)
        except ExpressionError:
            self.styles["invalid"] += 1
            self.splits[split_of_drawn(text)] += 1
            return
        self.splits[split_of_drawn(tree.postfix)] += 1
        numbers = sorted(symbol for symbol in tree.postfix if isinstance(symbol, int))
        if tree.depth == 1 and "(" not in tree.canonical:
            self.pairs[numbers[0], numbers[1]] += 1
            return
        self.numbers.update(numbers)
        if tree.is_flat:
            self.sums[tree.terms] += 1
        elif (style := _style(tree)) == "typed":
            self.typed[tree.depth, tree.terms] += 1
        else:
            self.styles[style] += 1
            self.depths.add(tree.depth)

    def coverage(self) -> Coverage:
        """Coverage of all that was added; sums and pairs get the style that fits the rest."""
        styles, depths, flat_terms = self.styles.copy(), {*self.depths}, set()
        deepest, chain_numbers = self._deepest(), 0
        for (depth, terms), count in self.typed.items():
            styles["typed" if depth <= deepest else "chain"] += count
            depths |= {depth} if depth <= deepest else set()
            chain_numbers = max(chain_numbers, terms if depth > deepest else 0)
        for terms, count in self.sums.items():
            typed = "typed" in styles and terms - 1 in depths
            styles["typed" if typed else "flat"] += count
            flat_terms |= set() if typed else {terms}
        num_range = self._num_range()
        drills = self._beyond(num_range)
        if pairs := self.pairs.total() - drills:
            flat = bool(flat_terms) and not depths
            styles["flat" if flat else "nested"] += pairs
            (flat_terms if flat else depths).add(2 if flat else 1)
        styles["drill"] += drills
        return Coverage(
            {style: styles[style] for style in STYLES if styles[style]},
            tuple(sorted(depths)),
            tuple(sorted(flat_terms)),
            num_range,
            dict(self.splits),
            chain_numbers=chain_numbers,
        )

    def _deepest(self) -> int:
        """The greatest depth of a nested tree, which only chains pass; of typed ones if none is."""
        return max(self.depths, default=max((depth for depth, _ in self.typed), default=0))

    def _num_range(self) -> tuple[int, int]:
        """Smallest and largest number of all but the drills."""
        deepest = max(self._deepest(), *(terms - 1 for terms in self.sums), 0)
        largest = max(map(abs, self.numbers), default=0)
        # The steps of a tree of depth 1 are that tree: no drills can be told from it.
        reach = largest * 2 ** (deepest - 1) if deepest > 1 else -1
        if deepest > 1 and min(self.numbers) < 0:  # perhaps wide: then drills have a digit more
            reach = max(reach, 10 ** (len(str(largest)) + 1) - 1)
        out_of_reach = (pair for pair in self.pairs if max(map(abs, pair)) > reach)
        numbers = self.numbers.union(*out_of_reach)
        return min(numbers, default=0), max(numbers, default=0)

    def _beyond(self, num_range: tuple[int, int]) -> int:
        """Count the pairs that have a number outside of a range."""
        low, high = num_range
        return sum(n for (least, most), n in self.pairs.items() if least < low or most > high)


def _style(tree: Expression) -> str:
    """Style of a tree with parentheses; where two styles spell it alike it is nested."""
    if tree.canonical == spell(tree.postfix):
        return "nested"
    return "typed" if _lacks_parentheses(tree.canonical) else "padded"


def _lacks_parentheses(canonical: str) -> bool:
    """Whether two operators share a pair of parentheses, or stand outside of all."""
    operators = [0]
    for piece in re.findall(r"[()]| [+-] ", canonical):
        if piece == "(":
            operators.append(0)
        elif piece == ")":
            operators.pop()
        else:
            operators[-1] += 1
            if operators[-1] > 1:
                return True
    return False


def _from_sidecar(meta: dict[str, Any]) -> Coverage:
    styles = meta["by_style"]
    has_trees = any(style in styles for style in TREE_STYLES)
    return Coverage(
        styles,
        tuple(int(depth) for depth in meta["by_depth"]) if has_trees else (),
        tuple(int(terms) for terms in meta["flat_by_terms"]),
        tuple(meta["settings"]["num_range"]),
        {meta["settings"]["split"]: meta["samples"] - styles.get("rewrite", 0)},
        tuple(meta["settings"]["wide_range"]) if meta["settings"].get("wide_rate") else None,
        meta["settings"]["chain_numbers"] if "chain" in styles else 0,
    )
