"""Mutation testing: wrong edits of the package, each of which the suite must notice.

    python tests/mutants.py            all of them, two at a time; prints the survivors
    python tests/mutants.py KL loss    those whose name holds one of the words

An edit is applied to a copy of the checkout, the tests that should notice are run there, and the
edit is undone. A survivor is a hole in the suite. The edits are chosen by hand, one for each
decision that a stage makes: a tool that makes every possible edit of an operator needs hours, since
each edit of a stage costs seconds of training.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "arithmetic_llm"
SECONDS = 300  # a mutant that never ends is noticed, too
JOBS = 2


@dataclass(frozen=True)
class Mutant:
    """A wrong edit: ``old``, which occurs once in the package, becomes ``new``."""

    name: str  # what is wrong then
    old: str
    new: str
    tests: str  # arguments of pytest: who should notice


def source_of(mutant: Mutant, root: Path = ROOT) -> Path:
    """The one file of the package that holds the mutant's old text.

    Raises:
        ValueError: none does, or the text occurs more than once.
    """
    holders = [
        (path, path.read_text(encoding="utf-8").count(mutant.old))
        for path in sorted((root / PACKAGE).rglob("*"))
        if path.suffix in (".py", ".c")
    ]
    found = [(path, count) for path, count in holders if count]
    if [count for _, count in found] != [1]:
        raise ValueError(f"{mutant.name}: {mutant.old!r} occurs {sum(c for _, c in found)} times")
    return found[0][0]


def is_noticed(mutant: Mutant, copy: Path) -> bool:
    """Whether the tests fail in ``copy`` with the edit; the copy is left as it was."""
    path = source_of(mutant, copy)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        return run_tests(mutant.tests, copy) != 0
    finally:
        path.write_text(text, encoding="utf-8")


def run_tests(arguments: str, copy: Path, seconds: int = SECONDS) -> int:
    """Exit code of pytest: 0 = passed, 1 = failed; longer than ``seconds`` counts as failed.

    Raises:
        RuntimeError: the tests could not be run at all.
    """
    pytest = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
    words = [f"tests/{word}" if ".py" in word else word for word in arguments.split()]
    # Without byte code: an edit of the same length within a second would leave the old one valid.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        ended = subprocess.run(
            [sys.executable, *pytest, *words],
            cwd=copy,
            env={name: v for name, v in environment.items() if not name.startswith("PYTEST_")},
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return 1
    if ended.returncode not in (0, 1):
        raise RuntimeError(f"pytest {arguments}: {ended.stdout[-2000:]}{ended.stderr[-2000:]}")
    return ended.returncode


def copy_of_the_checkout(folder: Path) -> Path:
    """All that the tests need, without what git ignores."""
    skipped = shutil.ignore_patterns(".*", "__pycache__", "models", "evaluation_results", "results")
    return Path(shutil.copytree(ROOT, folder / "copy", ignore=skipped))


def require_green(mutants: Sequence[Mutant], copies: Sequence[Path], pool: Executor) -> None:
    """Run what should notice without any edit: tests that fail anyway notice nothing.

    Raises:
        RuntimeError: some fail.
    """
    files = sorted({mutant.tests.split()[0] for mutant in mutants})
    parts = [files[job :: len(copies)] for job in range(min(len(copies), len(files)))]

    def passed(part: list[str], copy: Path) -> bool:
        return run_tests(" ".join(part), copy, seconds=len(part) * SECONDS) == 0

    for part, green in zip(parts, pool.map(passed, parts, copies), strict=True):
        if not green:
            raise RuntimeError(f"some of these tests fail without any edit: {', '.join(part)}")


def survivors(mutants: Sequence[Mutant]) -> list[Mutant]:
    """The mutants that no test notices, in order; prints each verdict as it falls."""
    copies: Queue[Path] = Queue()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(JOBS) as pool:
        made = [copy_of_the_checkout(Path(folder, str(job))) for job in range(JOBS)]
        print("without any edit ...", flush=True)
        require_green(mutants, made, pool)
        for copy in made:
            copies.put(copy)

        def judge(mutant: Mutant) -> bool:
            copy, started = copies.get(), time.monotonic()
            try:
                noticed = is_noticed(mutant, copy)
            finally:
                copies.put(copy)
            word = "noticed " if noticed else "SURVIVED"
            print(f"{word} {time.monotonic() - started:6.1f} s  {mutant.name}", flush=True)
            return noticed

        verdicts = list(pool.map(judge, mutants))
    return [mutant for mutant, noticed in zip(mutants, verdicts, strict=True) if not noticed]


def main(words: Sequence[str]) -> int:
    """Exit code 0 if every chosen mutant is noticed, else 1."""
    from mutant_list import MUTANTS

    chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    started = time.monotonic()
    left = survivors(chosen)
    minutes = (time.monotonic() - started) / 60
    print(f"{len(chosen) - len(left)} of {len(chosen)} noticed in {minutes:.1f} minutes")
    for mutant in left:
        print(f"survivor: {mutant.name}: {mutant.old!r} -> {mutant.new!r} ({mutant.tests})")
    return bool(left)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
