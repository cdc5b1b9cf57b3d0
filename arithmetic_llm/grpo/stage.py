"""The GRPO stage: from a config to a finished run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from arithmetic_llm.config import GRPOConfig
from arithmetic_llm.corpus.coverage import Coverage, coverage, merge
from arithmetic_llm.corpus.draw import distinct_samples
from arithmetic_llm.evaluation.length import room_to_answer, warn_if_too_short
from arithmetic_llm.folders import resolve_paths
from arithmetic_llm.grpo.prompts import PassRates, PromptSource, nested
from arithmetic_llm.grpo.rewards import parse_rewards
from arithmetic_llm.grpo.task import GRPOTask
from arithmetic_llm.model.checkpoint import Checkpoint, weights_hash
from arithmetic_llm.model.load import check_tokenizer, load_model
from arithmetic_llm.model.lora import parameter_summary
from arithmetic_llm.runtime import prepare_training, resolve_device, sha256_file
from arithmetic_llm.task.problem import problem_from
from arithmetic_llm.training.adapters import keep_base, save_adapter_files, with_adapter
from arithmetic_llm.training.loop import fit
from arithmetic_llm.training.run import MetricsLog, Run, open_run
from arithmetic_llm.training.supervised import warn_of_other_splits

PROMPTS_TO_MEASURE = 500  # how many right solutions tell how much room a completion needs


def train_grpo(config: GRPOConfig) -> Path:
    """Improve a policy by its own attempts; returns the run folder."""
    prepare_training(config.threads, config.seed)
    _check(config)
    config = resolve_paths(config)
    base, covered = _start(config), _covered(config)
    source = PromptSource(config, PassRates())
    # Hashed before an adapter is added: that changes the names of the weights.
    sources = {"start_hash": weights_hash(base.model), **_corpus_hash(config)}
    checkpoint = _policy(base, _seen(base, covered, config, source), config)
    validation = _validation_prompts(config, covered)
    config = _with_room(config, source, validation, checkpoint)
    task = GRPOTask(checkpoint.model, checkpoint.tokenizer, config, source, validation)
    run = open_run(config, checkpoint, **sources)
    if config.lora_rank:
        keep_base(run)
    task.precision, task.monitor.folder = run.precision, run.folder
    _describe(run, task)
    fit(run, task, _more_files)
    print(f"done: models in {run.folder}")
    return run.folder


def _check(config: GRPOConfig) -> None:
    """Refuse what only shows when it is used, before anything is loaded."""
    parse_rewards(config.rewards)
    nested(config)


def _start(config: GRPOConfig) -> Checkpoint:
    """The model to start from, if its tokenizer is the one that the config names."""
    path = config.sft_checkpoint
    base = load_model(path, resolve_device(config.device), config.base_checkpoint)
    check_tokenizer(base, config.tokenizer, path)
    return base


def _covered(config: GRPOConfig) -> Coverage | None:
    """Coverage of the corpus of prompts; None if prompts are generated."""
    if config.data_mode == "generated":
        return None
    covered = coverage(config.instruction_corpus)
    warn_of_other_splits(covered, config.instruction_corpus)
    return covered


def _corpus_hash(config: GRPOConfig) -> dict[str, str]:
    """Hash of the corpus of prompts, which a resumed run must find unchanged."""
    if config.data_mode == "generated":
        return {}
    return {"corpus_sha256": sha256_file(config.instruction_corpus)}


def _seen(
    base: Checkpoint, covered: Coverage | None, config: GRPOConfig, source: PromptSource
) -> dict[str, Any]:
    """Coverage of the policy after the run: prompts count as problems seen."""
    if covered:
        return merge(base.trained_on, covered.as_dict())
    per_epoch = source.prompts_per_epoch
    prompts = config.max_steps * source.prompts_per_step or config.num_epochs * per_epoch
    generated = {
        "styles": {"nested": prompts},
        "depths": list(range(config.min_depth, config.max_depth + 1)),
        "flat_terms": [],
        "num_range": list(config.num_range),
        "splits": {"train": prompts},
    }
    return merge(base.trained_on, generated)


def _policy(base: Checkpoint, seen: dict[str, Any], config: GRPOConfig) -> Checkpoint:
    """The start as the checkpoint to train, with an adapter if the config has a rank."""
    checkpoint = Checkpoint(base.model, base.tokenizer, "grpo", seen)
    return (
        with_adapter(checkpoint, config, config.sft_checkpoint) if config.lora_rank else checkpoint
    )


def _validation_prompts(config: GRPOConfig, covered: Coverage | None) -> list[str]:
    """Held-out problems like the prompts."""
    spec = covered.held_out_spec() if covered else nested(config)
    samples = distinct_samples(spec, config.eval_samples, config.seed, "validation")
    return [sample.record.expression for sample in samples]


def _with_room(
    config: GRPOConfig, source: PromptSource, validation: Sequence[str], checkpoint: Checkpoint
) -> GRPOConfig:
    """The config with a length limit, measured on some prompts unless it has one.

    A limit that cuts right solutions off leaves their depth without reward.
    """
    expressions = [*validation, *source.others(PROMPTS_TO_MEASURE, 0, 1)]
    problems = [problem_from(expression) for expression in expressions]
    if config.max_gen_length:
        warn_if_too_short(config.max_gen_length, problems, checkpoint.tokenizer)
        return config
    context = checkpoint.model.config.max_seq_length
    return replace(config, max_gen_length=room_to_answer(problems, checkpoint.tokenizer, context))


def _more_files(run: Run) -> None:
    """Write what a GRPO run has beyond the common files."""
    if run.checkpoint.adapter:
        save_adapter_files(run, run.config)
    run.write_json("grpo_training_log.json", MetricsLog(run.folder).read())


def _describe(run: Run, task: GRPOTask) -> None:
    """Say on two lines what is trained, on what, and where the files go."""
    config = run.config
    print(
        f"grpo: {parameter_summary(run.model)} on {run.model.device}, "
        f"{task.source.prompts_per_step} prompts x {config.num_candidates} completions of at most "
        f"{config.max_gen_length} tokens a step, {task.total_steps:,} steps, "
        f"rewards {config.rewards}, seed {config.seed}\nrun folder {run.folder}"
    )
