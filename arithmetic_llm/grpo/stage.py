"""The GRPO stage: from a config to a finished run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from arithmetic_llm.config import GRPOConfig
from arithmetic_llm.corpus.coverage import Coverage
from arithmetic_llm.evaluation.length import rooms_to_answer, warn_if_too_short
from arithmetic_llm.folders import resolve_paths
from arithmetic_llm.grpo.prompts import PassRates, PromptSource, nested
from arithmetic_llm.grpo.rewards import parse_rewards
from arithmetic_llm.grpo.solutions import tokenised_solutions
from arithmetic_llm.grpo.task import GRPOTask
from arithmetic_llm.model.checkpoint import Checkpoint
from arithmetic_llm.model.lora import parameter_summary
from arithmetic_llm.runtime import prepare_training
from arithmetic_llm.task.problem import problem_from
from arithmetic_llm.training.loop import fit
from arithmetic_llm.training.run import MetricsLog, Run, open_run
from arithmetic_llm.training.start import Sources, begin, held_out_records
from arithmetic_llm.training.supervised import report_dropped

PROMPTS_TO_MEASURE = 500  # how many right solutions tell how much room a completion needs


def train_grpo(config: GRPOConfig) -> Path:
    """Improve a policy by its own attempts; returns the run folder."""
    prepare_training(config.threads, config.seed)
    _check(config)
    config = resolve_paths(config)
    source = PromptSource(config, PassRates())
    beginning = begin(config, _sources(config), drawn=_drawn(config, source), lora=_lora(config))
    checkpoint = beginning.checkpoint
    validation = _validation_prompts(config, beginning.covered)
    config = _with_room(config, source, validation, checkpoint)
    task = GRPOTask(checkpoint.model, checkpoint.tokenizer, config, source, validation)
    run = open_run(config, checkpoint, **beginning.hashes)
    task.precision, task.monitor.folder = run.precision, run.folder
    _describe(run, task)
    fit(run, task, _more_files)
    print(f"done: models in {run.folder}")
    return run.folder


def _check(config: GRPOConfig) -> None:
    """Refuse what only shows when it is used, before anything is loaded."""
    parse_rewards(config.rewards)
    nested(config)


def _sources(config: GRPOConfig) -> Sources:
    corpus = config.instruction_corpus if config.data_mode == "instruction" else ""
    return Sources(config.tokenizer, corpus, config.sft_checkpoint, config.base_checkpoint)


def _lora(config: GRPOConfig) -> GRPOConfig | None:
    """The settings of the adapter to train, if one is."""
    return config if config.lora_rank else None


def _drawn(config: GRPOConfig, source: PromptSource) -> Coverage:
    """Generated prompts as problems seen."""
    return Coverage(
        styles={"nested": source.total_prompts},
        depths=tuple(range(config.min_depth, config.max_depth + 1)),
        flat_terms=(),
        num_range=config.num_range,
        splits={"train": source.total_prompts},
    )


def _validation_prompts(config: GRPOConfig, covered: Coverage | None) -> list[str]:
    """Held-out problems like the prompts."""
    spec = covered.held_out_spec() if covered else nested(config)
    return [record.expression for record in held_out_records(spec, config)]


def _with_room(
    config: GRPOConfig, source: PromptSource, validation: Sequence[str], checkpoint: Checkpoint
) -> GRPOConfig:
    """The config with a length limit, measured on some prompts unless it has one.

    A limit that cuts right solutions off leaves their depth without reward.
    """
    tried = source.others(PROMPTS_TO_MEASURE, 0, 1)
    if config.learn_from == "solutions" or config.sft_replay_coef:
        _report_too_long(tried, checkpoint)
    expressions = [*validation, *tried]
    problems = [problem_from(expression) for expression in expressions]
    if config.max_gen_length:
        warn_if_too_short(config.max_gen_length, problems, checkpoint.tokenizer)
        return config
    context = checkpoint.model.config.max_seq_length
    most = max(rooms_to_answer(problems, checkpoint.tokenizer, context))
    return replace(config, max_gen_length=most)


def _report_too_long(prompts: Sequence[str], checkpoint: Checkpoint) -> None:
    """Say which of some prompts have solutions that are too long to learn from.

    Raises:
        UserError: all of them have.
    """
    context = checkpoint.model.config.max_seq_length
    solutions = tokenised_solutions(prompts, checkpoint.tokenizer, context)
    name = f"correct solutions of {len(prompts)} prompts drawn"
    report_dropped(solutions, name, context, "will be left out", "ask for shallower problems")


def _more_files(run: Run) -> None:
    """Write what a GRPO run has beyond the common files."""
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
