"""What the benchmarks share: runs of scripts, turns, materials, peers, machine facts, the table.

A figure is always a rate, so more is better. Ours and each peer are measured in turn (A B C A B C),
and what counts is the ratio of the medians. A peer that has several settings tries each of them
briefly, and takes its turns with the one that was best for it.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # tests/helpers.py has transformers' own model

from arithmetic_llm.cli import build, opt, parse, read_json  # noqa: E402
from arithmetic_llm.config import ModelConfig, SampleSpec  # noqa: E402
from arithmetic_llm.corpus.draw import distinct_samples  # noqa: E402
from arithmetic_llm.runtime import (  # noqa: E402
    UserError,
    atomic_write_text,
    bf16_pays,
    processor,
    resolve_precision,
    versions,
)

RECIPE = ROOT / "configs" / "narrow"  # the CPU recipe's model on whole samples, as peers learn
PEERS = ("transformers", "trl", "peft", "accelerate")
GIB = 2**30
Rate = Callable[[], float]  # measures once
Trial = Callable[[bool], float]  # measures once; briefly, if True


@dataclass(frozen=True)
class BenchConfig:
    """Benchmark."""

    model_path: str = opt(
        "", "a model to decode and evaluate with; left empty, a small one is trained, once"
    )
    repetitions: int = opt(3, "turns of each side", at_least=1)
    output_dir: str = opt("results", "folder of the JSON files, of corpora and of the small model")
    miniature: bool = opt(False, "all of it in seconds, to see that it runs; figures mean nothing")

    def size(self, full: int, small: int) -> int:
        """A number of steps, samples or tokens, as large as time allows."""
        return small if self.miniature else full


# ------------------------------------------------------------------------------ runs of scripts


# A process begins with its parent's peak memory, so that one too small to matter stands between.
LAUNCH = """
import os, sys
process = os.spawnv(os.P_NOWAIT, sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(process, 0)
sys.stdout.write(f"\\n{usage.ru_maxrss}")
sys.exit(os.waitstatus_to_exitcode(status))
"""


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    seconds: float
    peak_gib: float  # resident memory, the largest of the process and its children
    out: str


def run(command: str | Sequence[str], folder: Path | None = None) -> Ended:
    """Run a script of the repository in a process of its own, to its end.

    Raises:
        UserError: it failed; its last words are in the message.
    """
    words = shlex.split(command) if isinstance(command, str) else [str(word) for word in command]
    started = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, "-ISc", LAUNCH, sys.executable, str(ROOT / words[0]), *words[1:]],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seconds = time.perf_counter() - started
    out, _, peak = ended.stdout.rpartition("\n")
    if ended.returncode:
        raise UserError(f"{shlex.join(words)} ended with {ended.returncode}: {out[-600:]}")
    return Ended(seconds, int(peak) * (1 if sys.platform == "darwin" else 1024) / GIB, out)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a piece of work takes, and what it returns."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def need(name: str) -> ModuleType:
    """Import a package that only tests and benchmarks need.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{name} cannot be imported ({error}); python -m pip install -r requirements-test.txt"
        ) from None


# ------------------------------------------------------------------------------------- in turn


def in_turn(sides: Mapping[str, Rate], repetitions: int) -> dict[str, list[float]]:
    """The rates of every side, measured A B C A B C."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repetitions):
        for name, measure in sides.items():
            rates[name].append(measure())
    return rates


@dataclass(frozen=True)
class Comparison:
    """Rates of our side and of each peer at its best setting."""

    rates: dict[str, list[float]]  # in turn; "ours" is one of them
    settings: dict[str, str]  # what was best for each peer
    tried: dict[str, float] = field(default_factory=dict)  # one rate of each setting of each peer

    def median(self, side: str = "ours") -> float:
        """Median rate of a side."""
        return statistics.median(self.rates[side])

    def ratio(self, peer: str) -> float:
        """Our median over the peer's: 2 is twice as fast."""
        return self.median() / self.median(peer)


def compare(ours: Rate, peers: Mapping[str, Mapping[str, Trial]], repetitions: int) -> Comparison:
    """Measure ours and the peers in turn, each peer at the setting that a brief trial finds best.

    Args:
        peers: for each peer, its settings by name.
    """
    tried: dict[str, float] = {}
    settings, sides = {}, {"ours": ours}
    for peer, ways in peers.items():
        rates = {way: measure(True) for way, measure in ways.items()} if len(ways) > 1 else {}
        settings[peer] = max(rates, key=rates.get) if rates else next(iter(ways))
        sides[peer] = partial(ways[settings[peer]], False)
        tried |= {f"{peer}: {way}": rate for way, rate in rates.items()}
    return Comparison(in_turn(sides, repetitions), settings, tried)


# -------------------------------------------------------------------------------- rows, reports


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    subject: str
    ours: str
    peer: str
    value: float  # what the bar is for
    unit: str = "x"
    bar: float | None = None
    at_most: bool = False  # the bar is an upper limit
    evidence: dict[str, Any] = field(default_factory=dict)  # raw rates, settings, commands

    @property
    def met(self) -> str:
        """``yes``, ``no``, or nothing where there is no bar."""
        if self.bar is None:
            return ""
        return "yes" if (self.value <= self.bar) == self.at_most or self.value == self.bar else "no"

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        sign = "at most " if self.at_most else ""
        bar = "" if self.bar is None else f"{sign}{self.bar:g} {self.unit}"
        return self.subject, self.ours, self.peer, f"{self.value:.3g} {self.unit}", bar, self.met


def ratio_row(
    subject: str,
    found: Comparison,
    peer: str,
    bar: float | None,
    shown: Callable[[float], str],
    **evidence: Any,
) -> Row:
    """The row of our speed beside a peer's."""
    theirs = f"{peer}, {found.settings[peer]}: {shown(found.median(peer))}"
    facts = {"rates": {side: found.rates[side] for side in ("ours", peer)}, "tried": found.tried}
    ours = shown(found.median())
    return Row(subject, ours, theirs, found.ratio(peer), "x", bar, evidence=facts | evidence)


def thousands(rate: float) -> str:
    """``13,512`` -> ``13.5 k tokens/s``."""
    return f"{rate / 1000:.3g} k tokens/s"


HEADINGS = ("subject", "ours", "peer, at its best setting", "measured", "bar", "met")


def table(rows: Iterable[Row]) -> str:
    """Rows as a Markdown table."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
    lines += ["| " + " | ".join(row.cells) + " |" for row in rows]
    return "\n".join(lines)


def report(name: str, config: BenchConfig, measure: Callable[[BenchConfig], list[Row]]) -> None:
    """Measure a subject, print its table and write ``bench_<name>.json``."""
    seconds, rows = timed(lambda: measure(config))
    content = {
        "subject": name,
        "command": sys.argv,
        "date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        "seconds": round(seconds, 1),
        "machine": machine(),
        "settings": asdict(config),
        "rows": [asdict(row) for row in rows],
    }
    atomic_write_text(json_path(config, name), json.dumps(content, indent=2) + "\n")
    print(table(rows))


def json_path(config: BenchConfig, name: str) -> Path:
    """Where the figures of a subject go."""
    return Path(config.output_dir) / f"bench_{name}.json"


def main_of(name: str, measure: Callable[[BenchConfig], list[Row]], doc: str) -> Callable:
    """The ``main`` of a subject's script."""
    return lambda argv=None: report(name, parse(BenchConfig, argv, doc), measure)


def machine() -> dict[str, Any]:
    """Facts that a speed depends on, its limits measured among them."""
    import torch

    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "bf16_pays": bf16_pays(torch.device("cpu")),
        "torch_threads": torch.get_num_threads(),
        "copy_gb_per_second": round(copy_rate() / 1e9, 1),
        "load_average": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "versions": versions() | {name: _version(name) for name in PEERS},
    }


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


# ------------------------------------------------------------------------- limits of the machine


def copy_rate(mib: int = 128) -> float:
    """Bytes a second read and written by a copy too large for the caches."""
    import torch

    source = torch.ones(mib * 2**18)
    target = torch.empty_like(source)
    seconds = [timed(lambda: target.copy_(source))[0] for _ in range(5)]
    return 2 * source.numel() * 4 / statistics.median(seconds)


def product_rate(
    shapes: Sequence[tuple[int, int]], rows: int, repetitions: int = 10, device: str = "cpu"
) -> float:
    """Operations a second of products (rows, in) @ (in, out), over all the shapes (out, in).

    The limit of a training step, whose products are these and, backward, as large ones. In bf16 or
    fp32, whichever is faster on the device.
    """
    import torch

    precision = resolve_precision("auto", torch.device(device))

    def product(x: torch.Tensor, w: torch.Tensor) -> None:
        x @ w.T
        if device != "cpu":
            torch.accelerator.synchronize()

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=precision)

    products = [partial(product, random(rows, n), random(m, n)) for m, n in shapes]
    seconds = [
        statistics.median(timed(product)[0] for _ in range(repetitions)) for product in products
    ]
    return sum(2 * rows * m * n for m, n in shapes) / sum(seconds)


# --------------------------------------------------------------------------- materials and peers


@dataclass(frozen=True)
class Materials:
    """Corpora, tokenizer and model that the benchmarks work on, made once in a folder."""

    config: BenchConfig

    @property
    def folder(self) -> Path:
        """Where they are kept."""
        name = "bench_miniature" if self.config.miniature else "bench_materials"
        return (Path(self.config.output_dir) / name).resolve()

    def problems(self, depth: int, count: int, split: str = "test") -> list[str]:
        """Distinct expressions of a split, all of one depth, with numbers that the model knows."""
        styles = {"invalid_rate": 0.0, "typed_rate": 0.0}
        spec = SampleSpec(min_depth=depth, max_depth=depth, num_range=self.num_range, **styles)
        samples = distinct_samples(spec, count, 1, split)
        return [sample.record.expression for sample in samples]

    @property
    def num_range(self) -> tuple[int, int]:
        """Numbers of the problems: our own small model learns a part of the recipe's, in time."""
        return (1, 20) if self.config.model_path else (1, 5)

    @property
    def corpus(self) -> Path:
        """The recipe's foundational corpus."""
        return self._made("corpus.txt", self.corpus_command)

    @property
    def corpus_command(self) -> list[str]:
        """How `corpus` is made, but for its output."""
        return [
            "generate_foundational_plaintext.py",
            *("--config", str(RECIPE / "foundational_corpus.json")),
            *(("--num-samples", "300", "--max-depth", "2") if self.config.miniature else ()),
            "--output-txt",
        ]

    @property
    def tokenizer(self) -> Path:
        """The named model's tokenizer; if none is named, one of that corpus."""
        if self.config.model_path:
            from arithmetic_llm.model.checkpoint import read_checkpoint

            tokenizer = read_checkpoint(self.config.model_path).tokenizer
            return tokenizer.save(self.folder / "tokenizer_of_the_model").parent
        words = ["train_tokenizer.py", "--config", str(RECIPE / "tokenizer.json")]
        words += ["--corpus-path", str(self.corpus), "--output-dir"]
        return self._made("tokenizer", words)

    def part(self, name: str, script: str, *settings: object) -> Path:
        """A small corpus, made by a script whose last setting names the file."""
        return self._made(name, [script, *map(str, settings)])

    @property
    def model(self) -> Path:
        """The model of ``--model-path``; if none is named, one of some minutes of training."""
        if self.config.model_path:
            return Path(self.config.model_path).resolve()
        return self._made("foundational.pt", self._training(), self._train)

    @property
    def shape(self) -> ModelConfig:
        """The recipe's shape of a model; a tiny one in miniature."""
        tiny = {"d_model": 32, "nhead": 2, "num_layers": 2, "dim_feedforward": 48}
        values = read_json(RECIPE / "model.json")
        return build(ModelConfig, values | (tiny if self.config.miniature else {}), {})

    def _training(self) -> list[str]:
        """The recipe's foundational stage, a tenth of it: small numbers, long expressions."""
        steps = self.config.size(700, 3)
        few = ("--num-samples", self.config.size(20_000, 200), "--num-range", *self.num_range)
        hard = ("--min-depth", 2, "--drill-rate", 0.1)
        words = (*self.corpus_command[:3], *few, *hard, "--output-txt")
        return [
            *("run_foundational_training.py", "--config", str(RECIPE / "foundational.json")),
            *map(str, shape_flags(self.shape)),
            *("--corpus-path", str(self.part("small_numbers.txt", *words))),
            *("--tokenizer-path", str(self.tokenizer)),
            *("--max-steps", str(steps), "--eval-every", str(steps), "--eval-samples", "100"),
        ]

    def _train(self, words: Sequence[str], path: Path) -> None:
        """Train in the materials' folder and put the last model at the path."""
        run([*words, "--output-dir", self.folder / "models"])
        newest = max((self.folder / "models").glob("foundational_*/final_model.pt"))
        newest.replace(path)

    def _made(
        self,
        name: str,
        words: Sequence[str],
        make: Callable[[Sequence[str], Path], Any] = lambda words, path: run([*words, path]),
    ) -> Path:
        """The path of what a command makes, run now unless it is there."""
        path = self.folder / name
        if not path.exists():
            print(f"making {path}", file=sys.stderr, flush=True)
            make(words, path)
        return path


def shape_flags(shape: ModelConfig) -> Iterator[Any]:
    """The flags of a model's shape, for what is not as it would be anyway."""
    for name, value in vars(shape).items():
        if value != getattr(ModelConfig(), name):
            flag = f"--{name.replace('_', '-')}"
            yield from (flag,) if value is True else (flag, value)


ATTENTIONS = ("eager", "sdpa")


def of_transformers(model: Any, attention: str) -> Any:
    """The same weights in transformers' Qwen3, with one of its ways to compute attention."""
    need("transformers").logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="transformers")
    from helpers import of_transformers as convert

    from arithmetic_llm.model.tokenizer import EOS, PAD

    theirs = convert(model)
    theirs.set_attn_implementation(attention)
    theirs.generation_config.pad_token_id, theirs.generation_config.eos_token_id = PAD, EOS
    return theirs


def step_clock() -> Any:
    """A callback of transformers' trainers; its ``seconds`` are those of all steps."""
    callback = need("transformers").TrainerCallback

    class StepClock(callback):
        begun = ended = 0.0

        def on_step_begin(self, *_: object, **__: object) -> None:
            self.begun = self.begun or time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            self.ended = time.perf_counter()

        @property
        def seconds(self) -> float:
            return self.ended - self.begun

    return StepClock()
