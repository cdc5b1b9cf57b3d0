"""Drawing problems and samples of a style from a split: any, or distinct ones spread over depths.

What is drawn is a tree, or the text of an invalid expression. Everything is a function of the
``random.Random`` that it is given.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator
from random import Random
from typing import NamedTuple

from arithmetic_llm.config import STYLES, TREE_STYLES, SampleSpec
from arithmetic_llm.corpus.corruption import corrupt
from arithmetic_llm.corpus.record import Record, Sample, record_of, rewriting, solved
from arithmetic_llm.corpus.trees import (
    all_flat_sums,
    all_trees,
    cancelling,
    chain,
    count_flat_sums,
    count_trees,
    exact_tree,
    flat_sum,
    widened,
    write,
)
from arithmetic_llm.runtime import UserError
from arithmetic_llm.task.expression import Postfix, apply, parse, spell, tree_depth
from arithmetic_llm.task.problem import Drawn, split_of_drawn
from arithmetic_llm.task.solution import Solution, solve_canonical

# Of rewritings, beside those that are so by chance; they alone show that problems may be so deep.
_FIRST_STEPS = 0.3
_MAX_DRAWS = 20_000  # a split without a hit in so many draws (0.95 ** 20,000) has no such problem


# -------------------------------------------------------------------------------- samples


def draw_samples(
    spec: SampleSpec, num_samples: int, seed: int, split: str = "train"
) -> Iterator[Sample]:
    """Draw exactly ``num_samples`` samples of a split, with replacement and in constant memory.

    Raises:
        UserError: the split holds no problem of a style.
    """
    rng = Random(seed)
    for style in shuffled(spec.style_counts(num_samples), rng):
        yield _sample(draw_any(spec, style, split, rng), style, spec, rng)


def distinct_samples(
    spec: SampleSpec,
    num_samples: int,
    seed: int,
    split: str = "test",
) -> list[Sample]:
    """Draw distinct problems of a split, as many of each depth (and length of flat sum) as of any.

    No tree occurs twice, in whatever styles: a flat sum or a drill can be a tree that another style
    has, so trees are drawn first, then flat sums, chains and drills, each from what is left.

    Where a depth has fewer problems than its share, all are used, and deeper ones take up the
    rest; so a style has fewer samples than its rate asks for only when all its depths or lengths
    are exhausted.

    Raises:
        UserError: a depth has no problem in the split at all; it is named.
    """
    rng = Random(seed)
    counts = spec.style_counts(num_samples)
    samples: list[Sample] = []
    taken: set[Drawn] = set()
    for styles in (TREE_STYLES, *((style,) for style in STYLES if style not in TREE_STYLES)):
        order = [*shuffled({style: counts[style] for style in styles}, rng)]
        problems = draw_distinct(spec, styles[0], len(order), split, rng, taken)
        taken.update(problems)
        samples += [
            _sample(problem, style, spec, rng)
            for problem, style in zip(problems, order, strict=False)
        ]
    rng.shuffle(samples)
    return samples


def _sample(problem: Drawn, style: str, spec: SampleSpec, rng: Random) -> Sample:
    if isinstance(problem, str):
        return Sample(solved(problem), style, None, None)
    expression = write(problem, style, rng)
    solution = solve_canonical(expression)
    if style == "rewrite":
        record = _some_steps(expression, solution, spec, rng)
    else:
        record = record_of(expression, solution)
    return Sample(record, style, tree_depth(problem), len(problem) // 2 + 1)


def _some_steps(expression: str, solution: Solution, spec: SampleSpec, rng: Random) -> Record:
    """Steps in a row that begin with expressions deeper than trees are solved in training."""
    before = [expression, *(step.expression for step in solution.steps)]
    # No step makes an expression deeper, so those that are too deep come first.
    deep = bisect_left(before, True, key=lambda text: parse(text).depth <= spec.max_depth)
    start = 0 if rng.random() < _FIRST_STEPS else rng.randrange(deep)
    return rewriting(expression, solution, start + 1, min(start + spec.rewrite_steps, deep))


def shuffled(counts: dict[str, int], rng: Random) -> Iterator[str]:
    """Each key as often as counted, in uniformly random order, without holding the order."""
    left = dict(counts)
    for total in range(sum(counts.values()), 0, -1):
        key = _key_at(left, rng.randrange(total))
        left[key] -= 1
        yield key


def _key_at(counts: dict[str, int], place: int) -> str:
    for key, count in counts.items():
        if place < count:
            return key
        place -= count
    raise IndexError(place)


# ------------------------------------------------------------------------------- problems


def draw(spec: SampleSpec, style: str, rng: Random) -> Postfix | str:
    """A tree to be written in a style; for ``"invalid"``, the text of an invalid expression."""
    if style == "chain":
        numbers, depth = rng.randint(3, spec.chain_numbers), max(1, spec.max_depth - 1)
        return chain(numbers, depth, spec.num_range, rng)
    if style == "flat":
        tree = flat_sum(rng.randint(2, spec.flat_terms), spec.num_range, rng)
    elif style == "drill":
        # Steps meet results, of either sign and with a digit more than the numbers of a problem.
        reach = 10 * max(map(abs, spec.wide_range)) + 9
        if spec.cancel_rate and rng.random() < spec.cancel_rate:
            return cancelling((-reach, reach), rng)
        return _maybe_widened(drill(spec, rng), spec, rng, (-reach, reach))
    elif style == "rewrite":
        depth = rng.randint(spec.max_depth + 1, spec.rewrite_depth)
        leaves = _between(spec.rewrite_leaf_probability, rng)
        tree = exact_tree(depth, spec.num_range, rng, leaves)
    else:
        tree = exact_tree(rng.randint(spec.min_depth, spec.max_depth), spec.num_range, rng)
    tree = _maybe_widened(tree, spec, rng)
    return corrupt(spell(tree), rng) if style == "invalid" else tree


def _between(ends: tuple[float, float], rng: Random) -> float:
    """A number of a range; nothing is drawn where there is one: other draws stay what they were."""
    low, high = ends
    return rng.uniform(low, high) if low < high else low


def _maybe_widened(
    tree: Postfix, spec: SampleSpec, rng: Random, wide_range: tuple[int, int] | None = None
) -> Postfix:
    """The tree, or with `wide_rate` for a chance one with wide numbers."""
    wide = spec.wide_rate and rng.random() < spec.wide_rate
    return widened(tree, wide_range or spec.wide_range, rng) if wide else tree


def drill(spec: SampleSpec, rng: Random) -> Postfix:
    """One operation on two numbers, picked among the steps that solve a tree of ``max_depth``.

    So drills have just the numbers, large and negative ones included, that traces meet, as often.
    """
    tree = exact_tree(spec.max_depth, spec.num_range, rng)
    return _operation(tree, rng.randrange(len(tree) // 2))


def _operation(tree: Postfix, place: int) -> Postfix:
    """The operation that is carried out at a place, from 0, with the numbers that it meets."""
    values: list[int] = []  # of what waits for its operation
    for symbol in tree:
        if isinstance(symbol, int):
            values.append(symbol)
            continue
        right, left = values.pop(), values.pop()
        if place == 0:
            return (left, right, symbol)
        place -= 1
        values.append(apply(left, symbol, right))
    raise IndexError(place)


def draw_any(spec: SampleSpec, style: str, split: str, rng: Random) -> Drawn:
    """One problem of a style and a split, whether it has been drawn before or not.

    Raises:
        UserError: the split has none.
    """
    for _ in range(_MAX_DRAWS):
        problem = draw(spec, style, rng)
        if split_of_drawn(problem) == split:
            return problem
    raise _no_problem(f"{style} style", spec.num_range, split)


def draw_distinct(
    spec: SampleSpec,
    style: str,
    wanted: int,
    split: str,
    rng: Random,
    taken: Collection[Drawn] = (),
) -> list[Drawn]:
    """Draw different problems, in random order and spread evenly over depths or lengths.

    What a depth with few problems lacks falls to deeper ones; fewer than ``wanted`` come back only
    when all are exhausted.

    Args:
        taken: problems that are not to be drawn again.

    Raises:
        UserError: a depth, a length of flat sum or a style has no problem in the split.
    """
    strata = _strata(spec, style)
    found: list[Drawn] = []
    for place, stratum in enumerate(strata):
        share = (wanted - len(found)) // (len(strata) - place)
        if share:
            found += _distinct(stratum, share, split, rng, taken)
    rng.shuffle(found)
    return found


class _Stratum(NamedTuple):
    """Problems that are to be drawn equally often; ``every`` lists them if there are few."""

    name: str
    num_range: tuple[int, int]
    draw: Callable[[Random], Drawn]
    size: int | None = None  # None: too many to list
    every: Callable[[], Iterator[Drawn]] = lambda: iter(())


def _strata(spec: SampleSpec, style: str) -> list[_Stratum]:
    if style == "flat":
        return [_flat_stratum(terms, spec) for terms in range(2, spec.flat_terms + 1)]
    if style not in TREE_STYLES:
        return [_Stratum(f"{style} style", spec.num_range, lambda rng: draw(spec, style, rng))]
    return [_depth_stratum(depth, spec) for depth in range(spec.min_depth, spec.max_depth + 1)]


def _depth_stratum(depth: int, spec: SampleSpec) -> _Stratum:
    return _Stratum(
        f"depth {depth}",
        spec.num_range,
        lambda rng: _maybe_widened(exact_tree(depth, spec.num_range, rng), spec, rng),
        None if spec.wide_rate else count_trees(depth, spec.num_range),
        lambda: all_trees(depth, spec.num_range),
    )


def _flat_stratum(terms: int, spec: SampleSpec) -> _Stratum:
    return _Stratum(
        f"{terms} numbers in a flat sum",
        spec.num_range,
        lambda rng: _maybe_widened(flat_sum(terms, spec.num_range, rng), spec, rng),
        None if spec.wide_rate else count_flat_sums(terms, spec.num_range),
        lambda: all_flat_sums(terms, spec.num_range),
    )


def _distinct(
    stratum: _Stratum, wanted: int, split: str, rng: Random, taken: Collection[Drawn]
) -> list[Drawn]:
    """Draw different problems, or all there are; small strata are listed, not searched."""
    if stratum.size is not None and stratum.size <= 100 * wanted:
        met = [problem for problem in stratum.every() if split_of_drawn(problem) == split]
        free = [problem for problem in met if problem not in taken]
        found = rng.sample(free, min(wanted, len(free)))
    else:
        met = _search(stratum, wanted, split, rng, taken)
        found = [problem for problem in met if problem not in taken]
    if not met:  # a stratum whose problems are all taken has at least been met
        raise _no_problem(stratum.name, stratum.num_range, split)
    return found


def _search(
    stratum: _Stratum, wanted: int, split: str, rng: Random, taken: Collection[Drawn]
) -> list[Drawn]:
    """Problems of the split in the order in which they turned up, ``wanted`` of them not taken."""
    met: dict[Drawn, None] = {}  # a set that keeps its order
    misses = 0
    while wanted and misses < _MAX_DRAWS:
        problem = stratum.draw(rng)
        if problem in met or split_of_drawn(problem) != split:
            misses += 1
            continue
        met[problem] = None
        if problem in taken:
            misses += 1
        else:
            wanted, misses = wanted - 1, 0
    return list(met)


def _no_problem(what: str, num_range: tuple[int, int], split: str) -> UserError:
    low, high = num_range
    return UserError(
        f"the {split} split has no problem of {what} with numbers {low} to {high}; "
        "widen --num-range (that of the corpus, if it comes from one) or choose other depths"
    )
