"""What a corpus covers, and so what a model trained on it has seen."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from arithmetic_llm.corpus import Record, read_corpus
from arithmetic_llm.drawing import split_of
from arithmetic_llm.expression import ExpressionError, parse
from arithmetic_llm.runtime import sha256_file
from arithmetic_llm.sampling import TREE_STYLES, SampleSpec


@dataclass(frozen=True)
class Coverage:
    """The kinds of problems in a corpus.

    Attributes:
        styles: style to number of samples (nested, typed, padded, flat, drill, invalid).
        depths: exact depths of its trees, ascending.
        flat_terms: how many numbers its flat sums have, ascending.
        num_range: smallest and largest number, drills not counted.
        splits: split to number of samples.
    """

    styles: dict[str, int]
    depths: tuple[int, ...]
    flat_terms: tuple[int, ...]
    num_range: tuple[int, int]
    splits: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, as a checkpoint stores them in ``trained_on``."""
        return json.loads(json.dumps(asdict(self)))

    def held_out_spec(self) -> SampleSpec:
        """How to draw problems like the corpus's own: trees if it has any, else what it has."""
        only = {}
        if not self.depths:
            only = {next((s for s in ("flat", "drill") if s in self.styles), "invalid"): 1.0}
        rates = {f"{style}_rate": only.get(style, 0.0) for style in ("flat", "drill", "invalid")}
        return SampleSpec(
            num_range=self.num_range,
            min_depth=min(self.depths, default=1),
            max_depth=max(self.depths, default=1),
            flat_terms=max(self.flat_terms, default=2),
            typed_rate=0.0,
            padded_rate=0.0,
            **rates,
        )


def coverage(corpus_path: str | Path) -> Coverage:
    """From the corpus's sidecar if that describes this very file, else by reading all of it."""
    sidecar = Path(f"{corpus_path}.meta.json")
    if sidecar.is_file():
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # damaged
            meta = json.loads(sidecar.read_text(encoding="utf-8"))
            if meta["sha256"] == sha256_file(corpus_path):
                return _from_sidecar(meta)
        print(f"{sidecar}: does not describe {corpus_path}; reading the corpus instead")
    return survey(read_corpus(corpus_path))


def merge(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """What a model has seen after two stages; both as `Coverage.as_dict` gives them."""
    if not earlier:
        return later
    lows, highs = zip(earlier["num_range"], later["num_range"], strict=True)
    return {
        "styles": dict(Counter(earlier["styles"]) + Counter(later["styles"])),
        "depths": sorted({*earlier["depths"], *later["depths"]}),
        "flat_terms": sorted({*earlier["flat_terms"], *later["flat_terms"]}),
        "num_range": [min(lows), max(highs)],
        "splits": dict(Counter(earlier["splits"]) + Counter(later["splits"])),
    }


def survey(records: Iterable[Record]) -> Coverage:
    """Coverage by parsing every expression; a drill cannot be told from a tree of depth 1."""
    styles, splits = Counter(), Counter()
    depths, flat_terms, numbers = set(), set(), set()
    for record in records:
        splits[split_of(record.expression)] += 1
        try:
            tree = parse(record.expression)
        except ExpressionError:
            styles["invalid"] += 1
            continue
        styles["flat" if tree.is_flat else "nested"] += 1
        (flat_terms if tree.is_flat else depths).add(tree.terms if tree.is_flat else tree.depth)
        numbers.update(symbol for symbol in tree.postfix if isinstance(symbol, int))
    return Coverage(
        dict(styles),
        tuple(sorted(depths)),
        tuple(sorted(flat_terms)),
        (min(numbers, default=0), max(numbers, default=0)),
        dict(splits),
    )


def _from_sidecar(meta: dict[str, Any]) -> Coverage:
    styles = meta["by_style"]
    has_trees = any(style in styles for style in TREE_STYLES)
    return Coverage(
        styles,
        tuple(int(depth) for depth in meta["by_depth"]) if has_trees else (),
        tuple(int(terms) for terms in meta["flat_by_terms"]),
        tuple(meta["settings"]["num_range"]),
        {meta["settings"]["split"]: meta["samples"]},
    )
