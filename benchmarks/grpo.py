"""GRPO: a step of 16 prompts x 8 attempts, beside TRL's GRPOTrainer on the same weights.

    python benchmarks/grpo.py

Once on prompts as they come, where groups whose attempts are all right or all wrong teach nothing
and cost us no training, and once on prompts that the model solves about half the time. Ours is the
script, its steps after the first; TRL is measured from a step's begin to its end, in parts of 32
attempts, without gradient checkpoints, at the best attention and precision. Both sample at
temperature 1 up to the same limit, go by the same verifier, and have no reference model.
"""

import contextlib
import io
import json
import statistics
import tempfile
from functools import cache, partial
from pathlib import Path

import torch
from common import (
    ATTENTIONS,
    RECIPE,
    Materials,
    compare,
    main_of,
    need,
    of_transformers,
    ratio_row,
    run,
    step_clock,
)

from arithmetic_llm.cli import run_main
from arithmetic_llm.corpus.files import json_line
from arithmetic_llm.corpus.record import solved
from arithmetic_llm.evaluation.judge import judge
from arithmetic_llm.model.decode import Completion, SamplingParams, generate
from arithmetic_llm.model.load import load_model
from arithmetic_llm.model.tokenizer import EOS
from arithmetic_llm.runtime import atomic_write_text
from arithmetic_llm.task.problem import problem_from

DEPTH, ATTEMPTS, PART = 4, 8, 32


def measure(config):
    """Both rows."""
    bench = Bench(config)
    expressions = bench.materials.problems(DEPTH, 3 * bench.prompts, "train")
    even = bench.half_solved(expressions)[: bench.prompts]
    return [
        row("GRPO step, prompts as they come", bench, expressions[: bench.prompts], 8),
        row("GRPO step, where groups have signal", bench, even, 2),
    ]


class Bench:
    """The policy, and what both sides are given."""

    def __init__(self, config):
        self.config, self.materials = config, Materials(config)
        self.prompts, self.limit = config.size(16, 4), config.size(560, 16)
        checkpoint = load_model(self.materials.model, torch.device("cpu"), "")
        self.model, self.tokenizer = checkpoint.model, checkpoint.tokenizer

    def reward(self, expression, tokens):
        """1.0 if the tokens after the prompt end with the right result."""
        ended = "eos" if tokens and tokens[-1] == EOS else "length"
        written, context = Completion(list(tokens), finish_reason=ended), 10**6
        return float(judge(problem_from(expression), written, 0, self.tokenizer, context).correct)

    def half_solved(self, expressions):
        """Expressions in order of how near to one half their pass rate is."""
        prompts = [self.tokenizer.prompt_ids(e) for e in expressions for _ in range(ATTEMPTS)]
        sampling = SamplingParams(temperature=1.0, seed=1)
        written = iter(generate(self.model, prompts, self.limit, sampling, 256))
        rates = {
            e: statistics.fmean(self.reward(e, next(written).tokens) for _ in range(ATTEMPTS))
            for e in expressions
        }
        return sorted(rates, key=lambda expression: abs(rates[expression] - 0.5))


def row(subject, bench, expressions, bar):
    """Our steps a second over TRL's."""
    signal = []  # of each of our runs, the share of groups that have one
    ways = {
        f"{attention}, {precision}": partial(theirs, bench, expressions, attention, precision)
        for attention in ATTENTIONS
        for precision in ("fp32", "bf16")
    }
    turns = max(1, bench.config.repetitions - 1)
    found = compare(partial(ours, bench, expressions, signal), {"TRL": ways}, turns)
    facts = {"limit": bench.limit, "groups_with_signal": signal}
    return ratio_row(subject, found, "TRL", bar, seconds_a_step, **facts)


def seconds_a_step(rate):
    """``0.25`` -> ``4 s``."""
    return f"{1 / rate:.3g} s"


# ------------------------------------------------------------------------------------------ ours


def ours(bench, expressions, signal):
    """Steps a second of the script, the first step left out."""
    with tempfile.TemporaryDirectory() as folder:
        run(command(bench, expressions, Path(folder)))
        (log,) = Path(folder).glob("grpo_*/metrics.jsonl")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [line for line in lines if "seconds_generating" in line][1:]
    signal.append(1 - statistics.fmean(step["frac_reward_zero_std"] for step in steps))
    return 1 / statistics.median(s["seconds_generating"] + s["seconds_training"] for s in steps)


def command(bench, expressions, folder):
    """Three steps on the prompts; every step has all of them."""
    corpus = folder / "prompts.jsonl"
    atomic_write_text(corpus, "".join(json_line(solved(e)) for e in expressions))
    given = bench.materials
    return [
        *("run_grpo_training.py", "--config", RECIPE / "grpo.json", "--data-mode", "instruction"),
        *("--instruction-corpus", corpus, "--tokenizer", given.tokenizer),
        *("--sft-checkpoint", given.model, "--output-dir", folder, "--device", "cpu"),
        *("--num-samples", len(expressions), "--batch-size", len(expressions)),
        *("--num-candidates", ATTEMPTS),
        *("--max-gen-length", bench.limit, "--temperature", 1, "--log-every", 1),
        *("--max-steps", 3, "--eval-every", 3, "--eval-samples", 4),
    ]


# ------------------------------------------------------------------------------------------- TRL


def theirs(bench, expressions, attention, precision, brief):
    """Steps a second of TRL's trainer, one step; a quarter of the limit, if brief."""
    clock = step_clock()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        limit, attempts = bench.limit // 4 if brief else bench.limit, len(expressions) * ATTEMPTS
        settings = settings_of(folder, attempts, limit, precision)
        trainer_of(bench, expressions, attention, settings, clock).train()
    return 1 / clock.seconds


def settings_of(folder, attempts, limit, precision):
    """TRL's settings for the same step."""
    return need("trl").GRPOConfig(
        folder,
        max_steps=1,
        per_device_train_batch_size=PART,
        gradient_accumulation_steps=attempts // PART,
        num_generations=ATTEMPTS,
        max_completion_length=limit,
        temperature=1.0,
        beta=0.0,
        bf16=precision == "bf16",
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )


def trainer_of(bench, expressions, attention, settings, clock):
    """TRL's trainer on the same weights, prompts and rewards."""

    def reward(completion_ids, expression, **_):
        return [bench.reward(*pair) for pair in zip(expression, completion_ids, strict=True)]

    rows = [{"prompt": text, "expression": e} for e, text in prompt_texts(bench, expressions)]
    return need("trl").GRPOTrainer(
        of_transformers(bench.model, attention),
        reward_funcs=reward,
        args=settings,
        train_dataset=need("datasets").Dataset.from_list(rows),
        processing_class=tokenizer_of_transformers(bench.tokenizer.serialized),
        callbacks=[clock],
    )


def prompt_texts(bench, expressions):
    """Each expression with its prompt as text, special tokens and all."""
    for expression in expressions:
        yield expression, bench.tokenizer.decode(bench.tokenizer.prompt_ids(expression))


@cache
def tokenizer_of_transformers(serialized):
    """The same tokenizer as transformers has it."""
    content = need("tokenizers").Tokenizer.from_str(serialized)
    return need("transformers").PreTrainedTokenizerFast(
        tokenizer_object=content,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
    )


main = main_of("grpo", measure, __doc__)

if __name__ == "__main__":
    run_main(main)
