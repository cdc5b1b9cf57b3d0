"""Training: the whole loop beside a plain loop and Trainer over transformers' model of its shape.

    python benchmarks/training.py

Ours is the script itself, one epoch over a corpus, in a process of its own; its speed is that of
the steps after the first fifth. The peers get the same samples: the plain loop in batches cut as
ours, ready-made, without clipping or a schedule, with fused AdamW; Trainer as it comes, but silent
and without checkpoints. Tokens are those of the samples, padding left out.
"""

import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import (
    ATTENTIONS,
    RECIPE,
    Ended,
    Materials,
    Row,
    compare,
    main_of,
    need,
    of_transformers,
    product_rate,
    ratio_row,
    run,
    shape_flags,
    step_clock,
    thousands,
)

from arithmetic_llm.cli import read_json, run_main
from arithmetic_llm.config import LoRAConfig, ModelConfig
from arithmetic_llm.corpus.files import read_corpus
from arithmetic_llm.distributed import cores
from arithmetic_llm.model.load import load_model
from arithmetic_llm.model.lora import target_names
from arithmetic_llm.model.tokenizer import PAD, ArithmeticTokenizer
from arithmetic_llm.model.transformer import ArithmeticModel, initialise
from arithmetic_llm.training.batches import LossWeights, TokenisedSamples, plan_epoch

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
SKIPPED = 1 / 5  # share of a run's steps that warm up
BUSY = "while True: pass"


def measure(config):
    """All rows."""
    materials = Materials(config)
    quickstart, default = quickstart_case(materials), default_case(materials)
    return [
        *speed_rows(quickstart, config, bars=(2, 3, 0.5)),
        memory_row(quickstart, quickstart.runs, 0.8),
        *workers_rows(quickstart, config),
        *speed_rows(default, config, bars=(1.5, 3, 0.6)),
        memory_row(default, [ours(default, "--batch-tokens", 0, "--batch-size", 32)], 1.5),
        busy_row(quickstart, config),
        lora_row(materials, config),
    ]


# ------------------------------------------------------------------------------------ the cases


@dataclass(frozen=True)
class Case:
    """A model's shape, the corpus it learns from, and the script that trains it."""

    name: str
    shape: ModelConfig
    words: tuple[str, ...]  # the script and its flags
    corpus: Path
    tokenizer_path: Path
    batch_tokens: int  # of a batch, padding included
    weights: LossWeights
    script: str = "run_foundational_training.py"
    corpus_flag: str = "--corpus-path"
    runs: list = field(default_factory=list)  # of the script, so far

    @cached_property
    def tokenizer(self):
        return ArithmeticTokenizer.load(self.tokenizer_path)

    @cached_property
    def samples(self):
        """The tokenised corpus."""
        context = self.shape.max_seq_length
        return TokenisedSamples(read_corpus(self.corpus), self.tokenizer, context, self.weights)

    @property
    def tokens(self):
        """Tokens that an epoch predicts."""
        return int(self.samples.lengths.sum()) - len(self.samples)

    def batches(self):
        """Batches of an epoch as tensors: inputs, targets, weights of the targets' losses."""
        rng = np.random.default_rng(0)
        plan = plan_epoch(self.samples.lengths, 0, self.batch_tokens, rng)
        return [padded(self.samples, indices) for indices in plan]


def padded(samples, indices):
    """Samples padded on the right, to a multiple of 8: inputs, targets and loss weights (B, T)."""
    width = -(-(int(samples.lengths[indices].max()) - 1) // 8) * 8 + 1
    ids = torch.full((len(indices), width), PAD)
    weights = torch.zeros(len(indices), width)
    for row, index in enumerate(indices):
        place = slice(samples.starts[index], samples.starts[index + 1])
        length = place.stop - place.start
        ids[row, :length] = torch.from_numpy(samples.ids[place]).long()
        weights[row, :length] = torch.from_numpy(samples.weights[place])
    return ids[:, :-1], ids[:, 1:], weights[:, 1:]


def quickstart_case(materials):
    """The recipe: its model on its mix of samples, some seconds' worth of them."""
    samples = materials.config.size(1500, 100)
    command = (*materials.corpus_command[:3], "--num-samples", samples, "--output-txt")
    recipe = read_json(RECIPE / "foundational.json")
    weights = LossWeights(recipe["prompt_loss_weight"], recipe["result_loss_weight"])
    shape = materials.shape
    words = ("--config", RECIPE / "foundational.json", *shape_flags(shape))
    corpus, tokenizer = materials.part(f"mix_{samples}.txt", *command), materials.tokenizer
    return Case(
        "quickstart model", shape, words, corpus, tokenizer, recipe["batch_tokens"], weights
    )


def default_case(materials):
    """The default model on samples of the manual's corpus, in batches of about 32."""
    samples, tokens = materials.config.size(128, 8), materials.config.size(12_288, 1024)
    command = (
        *("generate_foundational_plaintext.py", "--max-depth", 4, "--num-range", 1, 20),
        *("--invalid-rate", 0.05, "--num-samples", samples, "--output-txt"),
    )
    shape = materials.shape if materials.config.miniature else ModelConfig()
    words = ("--batch-tokens", tokens, *shape_flags(shape))
    corpus, tokenizer = materials.part(f"manual_{samples}.txt", *command), materials.tokenizer
    return Case("default model", shape, words, corpus, tokenizer, tokens, LossWeights(1.0, 1.0))


# ------------------------------------------------------------------------------------------ ours


@dataclass(frozen=True)
class Run:
    """A finished run of a training script."""

    ended: Ended
    rate: float  # tokens a second


def ours(case, *more):
    """Train for an epoch and read the speed from the run's own files."""
    with tempfile.TemporaryDirectory() as folder:
        words = [case.script, *case.words, case.corpus_flag, case.corpus, "--device", "cpu"]
        words += ["--tokenizer-path", case.tokenizer_path, "--output-dir", folder]
        words += ["--num-epochs", 1, "--max-steps", 0, "--log-every", 1]
        ended = run([*words, "--eval-samples", 8, "--eval-every", 10**6, *more])
        (made,) = Path(folder).iterdir()
        case.runs.append(Run(ended, rate_of(made, case.tokens)))
    return case.runs[-1]


def rate_of(folder, tokens):
    """Tokens a second of a run's steady part: the harmonic mean over its steps, all alike in size.

    A line may tell of several steps.

    The script counts positions, padding included; the corpus has ``tokens``.
    """
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    lines = [line for line in lines if "loss" in line]
    speeds = [line["tokens_per_second"] for line in lines]
    steps = [line["steps"] for line in lines]
    positions = sum(line["tokens_per_second"] * line["seconds"] * line["steps"] for line in lines)
    first = warm_up(len(lines))
    steady = statistics.harmonic_mean(speeds[first:], weights=steps[first:])
    return steady * min(1.0, tokens / positions)


def warm_up(steps):
    """How many of the steps are not counted."""
    return max(1, int(SKIPPED * steps)) if steps > 1 else 0


# ----------------------------------------------------------------------------------------- peers


def plain_loops(case):
    """A plain loop at each attention and precision."""
    batches = case.batches()
    return {
        f"{attention} attention, {name}": partial(plain_loop, case, batches, attention, precision)
        for attention in ATTENTIONS
        for name, precision in PRECISIONS.items()
    }


def plain_loop(case, batches, attention, precision, brief):
    """Tokens a second of forward, backward and AdamW."""
    model = of_transformers(fresh_model(case), attention).train()
    return loop_rate(model, part_of(batches, brief), precision)


def part_of(items, brief):
    """All of them, or a few."""
    return items[: max(2, len(items) // 4)] if brief else items


def loop_rate(model, batches, precision):
    """Tokens a second of a loop over batches, for the weights that have gradients."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    started, tokens = time.perf_counter(), 0
    for step, (inputs, targets, weights) in enumerate(batches):
        if step == warm_up(len(batches)):
            started, tokens = time.perf_counter(), 0
        with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
            logits = model(input_ids=inputs, use_cache=False).logits
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        optimizer.zero_grad()
        ((losses * weights.flatten()).sum() / weights.sum()).backward()
        optimizer.step()
        tokens += int((targets != PAD).sum())
    return tokens / (time.perf_counter() - started)


def fresh_model(case):
    """A model of the case's shape with random weights."""
    torch.manual_seed(0)
    return initialise(ArithmeticModel(case.shape, case.tokenizer.vocab_size))


def trainer(case, brief):
    """Tokens a second of transformers' Trainer with its defaults, over a part of the samples."""
    transformers = need("transformers")
    need("accelerate")
    rows = [
        {"input_ids": case.samples.ids[start:end].astype(int)}
        for start, end in zip(case.samples.starts, case.samples.starts[1:], strict=False)
    ]
    rows = rows[: len(rows) // 3]
    model = of_transformers(fresh_model(case), "sdpa")  # what transformers chooses
    clock = step_clock()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        silent_trainer(transformers, model, folder, rows, clock).train()
    return sum(len(row["input_ids"]) - 1 for row in rows) / clock.seconds


def silent_trainer(transformers, model, folder, rows, clock):
    """A Trainer with its defaults that writes and prints nothing."""
    settings = transformers.TrainingArguments(
        folder,
        num_train_epochs=1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    return transformers.Trainer(model, settings, collate, rows, callbacks=[clock])


def collate(rows):
    """Samples padded on the right, with labels, as Trainer's collators make them."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[place, :length] = torch.from_numpy(row["input_ids"])
        mask[place, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


# ------------------------------------------------------------------------------------------ rows


def speed_rows(case, config, bars):
    """Speed beside both peers, and as a share of the machine's limit.

    Args:
        bars: of the plain loop's ratio, of Trainer's, and of the share.
    """
    peers = {
        "plain loop": plain_loops(case),
        "Trainer": {"its defaults (sdpa, fp32, batch 8)": partial(trainer, case)},
    }
    found = compare(lambda: ours(case).rate, peers, config.repetitions)
    subject = f"training, {case.name}"
    return [
        ratio_row(subject, found, "plain loop", bars[0], thousands, command=command_of(case)),
        ratio_row(subject, found, "Trainer", bars[1], thousands),
        limit_row(case, found, bars[2]),
    ]


def workers_rows(case, config):
    """Two workers, which `configs/cpu` has, too, beside one model on the same batches."""
    processes = min(2, cores())
    flags = ("--workers", 2, "--local-steps", 5, "--processes", processes)
    workers = replace(case, words=(*case.words, *flags), runs=[])
    peers = {
        "plain loop": plain_loops(case),
        "one model": {"on all threads": lambda brief: ours(case).rate},
    }
    found = compare(lambda: ours(workers).rate, peers, config.repetitions)
    subject, command = f"training, {case.name}, two workers", command_of(workers)
    return [
        ratio_row(subject, found, "plain loop", 2, thousands, command=command),
        ratio_row(subject, found, "one model", 1.4, thousands),
    ]


def command_of(case):
    """What was run, without the flags that say where files are."""
    return " ".join(map(str, (case.script, *case.words)))


def limit_row(case, found, bar):
    """Share of the rate at which the machine multiplies matrices of the model's shapes."""
    model = fresh_model(case)
    shapes = matrix_shapes(model)
    limit = product_rate(shapes, rows=2048)
    used = found.median() * operations(case, shapes)
    facts = {"operations_a_token": operations(case, shapes), "limit": limit}
    return Row(
        f"share of the product rate, {case.name}",
        f"{used / 1e9:.3g} GFLOP/s",
        f"the machine: {limit / 1e9:.3g} GFLOP/s",
        used / limit,
        bar=bar,
        evidence=facts,
    )


def matrix_shapes(model):
    """(out, in) of every matrix that a token is multiplied by, the head included."""
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    return [tuple(module.weight.shape) for module in linear]


def operations(case, shapes):
    """Additions and multiplications of a training step for one token, that no step can do without.

    Forward and backward: six for each weight; and the causal half of the attention, where a token
    at place t has scores and a weighted sum over t tokens.
    """
    lengths = case.samples.lengths.astype(float)
    seen = (lengths**2).sum() / lengths.sum() / 2
    attention = 3 * 4 * case.shape.d_model * case.shape.num_layers * seen
    return 6 * sum(m * n for m, n in shapes) + attention


def memory_row(case, runs, bar):
    """Peak memory of a training process."""
    peak = max(run.ended.peak_gib for run in runs)
    subject = f"peak memory of training, {case.name}"
    return Row(subject, f"{peak:.2f} GiB", "", peak, "GiB", bar, at_most=True)


def busy_row(case, config):
    """Our speed beside another process that keeps a core busy, as a share of the idle speed."""
    alone = {"idle machine": {"alone": lambda brief: ours(case).rate}}
    found = compare(partial(beside_another, case), alone, max(1, config.repetitions - 2))
    subject = "training beside a busy process, as a share"
    return ratio_row(subject, found, "idle machine", 0.45, thousands)


def beside_another(case):
    """Our speed while another process computes."""
    with subprocess.Popen([sys.executable, "-c", BUSY]) as other:
        try:
            return ours(case).rate
        finally:
            other.kill()


# ------------------------------------------------------------------------------------------ LoRA


def lora_row(materials, config):
    """The LoRA stage of the recipe beside PEFT's adapter on transformers' model."""
    case = lora_case(materials)
    base = load_model(materials.model, torch.device("cpu"), "").model
    batches, spec = case.batches(), lora_spec()
    ways = {
        f"{attention} attention, {name}": partial(peft_loop, base, spec, batches, attention, value)
        for attention in ATTENTIONS
        for name, value in PRECISIONS.items()
    }
    found = compare(lambda: ours(case).rate, {"PEFT, plain loop": ways}, config.repetitions)
    return ratio_row("LoRA training, quickstart model", found, "PEFT, plain loop", None, thousands)


def lora_case(materials):
    """The recipe's LoRA stage on samples of its instruction corpus."""
    samples = materials.config.size(500, 50)
    command = (
        *("generate_instruction_corpus_mixed.py", "--config", RECIPE / "instruction_corpus.json"),
        *("--num-samples", samples, "--output-mixed"),
    )
    recipe = read_json(RECIPE / "lora.json")
    words = ("--config", RECIPE / "lora.json", "--foundational-checkpoint", materials.model)
    weights = LossWeights(0.0, recipe["result_loss_weight"])
    return Case(
        "LoRA",
        materials.shape,
        words,
        materials.part(f"instruction_{samples}.txt", *command),
        materials.tokenizer,
        recipe["batch_tokens"],
        weights,
        "run_instruction_training_lora.py",
        "--instruction-corpus-path",
    )


def lora_spec():
    """The adapter of the recipe."""
    recipe = read_json(RECIPE / "lora.json")
    names = LoRAConfig.__dataclass_fields__.keys()
    return LoRAConfig(**{name: value for name, value in recipe.items() if name in names})


def peft_loop(base, spec, batches, attention, precision, brief):
    """Tokens a second of a plain loop that trains PEFT's adapter."""
    peft = need("peft")
    adapter = peft.LoraConfig(
        r=spec.lora_rank,
        lora_alpha=spec.lora_alpha,
        target_modules=list(target_names(spec.lora_target_modules)),
    )
    model = peft.get_peft_model(of_transformers(base, attention), adapter).train()
    return loop_rate(model, part_of(batches, brief), precision)


main = main_of("training", measure, __doc__)

if __name__ == "__main__":
    run_main(main)
