"""Run the numbered stages on the CPU recipe, one after the other; end with a table and a report.

    make quickstart                                      (sets up a virtual environment first)
    python quickstart.py                                 (inside one)
    python quickstart.py --processes 2                   as README.md has its figures
    python quickstart.py --recipe configs/gpu
    python quickstart.py --resume                        go on after Ctrl-C

Each stage is one command, printed before it runs; paste it to run that stage alone.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from arithmetic_llm.cli import parse, read_json, run_main
from arithmetic_llm.config import QuickstartConfig, TrainingConfig
from arithmetic_llm.distributed import cores
from arithmetic_llm.folders import FACTS, FINISHED, step_checkpoints
from arithmetic_llm.runtime import UserError, atomic_write_text, pasted, quoted, resolve_device

TEST = "--tokenizer-path data/tokenizer --test-file data/instruction_corpus_test.txt"
FOUNDATIONAL = "models/foundational_YYYYMMDD_HHMMSS/best_model.pt"
INSTRUCTION = "models/instruction_YYYYMMDD_HHMMSS/best_model.pt"
LORA = "models/instruction_lora_YYYYMMDD_HHMMSS/lora_adapter.pt"
GRPO = "models/grpo/grpo_YYYYMMDD_HHMMSS/final_model.pt"
REPORT = "evaluation_results/report.html"
TRAINED = ("foundational", "instruction", "lora")  # by a corpus
PROGRESS = Path("models/quickstart.json")  # what --resume goes by
ROOM = 20 * 2**30  # bytes of a card that has room for the caches of many long texts


def evaluation(stage, model, name):
    """The stage that evaluates a model; ``name`` says whose the results are."""
    folder = f"evaluation_results/quickstart_{name}"
    return stage, f"run_evaluation.py --model-path {model} {TEST} --output-dir {folder}", folder


# name, command, and where its evaluation lands if it is one; {recipe} is the folder of configs,
# put in when the command has been cut into words, so that it may hold spaces and backslashes
STAGES = (
    (
        "1 foundational corpus",
        "generate_foundational_plaintext.py --config {recipe}/foundational_corpus.json "
        "--output-txt data/foundational_corpus.txt",
        None,
    ),
    (
        "1 instruction corpus",
        "generate_instruction_corpus_mixed.py --config {recipe}/instruction_corpus.json "
        "--output-mixed data/instruction_corpus.txt",
        None,
    ),
    (
        "1 test corpus",
        "generate_corpus.py --instruction-only --split test --config {recipe}/test_corpus.json "
        "--output-instruction data/instruction_corpus_test.txt",
        None,
    ),
    (
        "2 tokenizer",
        "train_tokenizer.py --config {recipe}/tokenizer.json "
        "--corpus-path data/foundational_corpus.txt --output-dir data/tokenizer",
        None,
    ),
    (
        "3 foundational model",
        "run_foundational_training.py --config {recipe}/foundational.json "
        "--model-config {recipe}/model.json --corpus-path data/foundational_corpus.txt "
        "--tokenizer-path data/tokenizer",
        None,
    ),
    evaluation("3.1 its evaluation", FOUNDATIONAL, "foundational"),
    (
        "4 instruction model",
        "run_instruction_training.py --config {recipe}/instruction.json "
        "--instruction-corpus-path data/instruction_corpus.txt --tokenizer-path data/tokenizer "
        f"--foundational-checkpoint {FOUNDATIONAL}",
        None,
    ),
    evaluation("4.1 its evaluation", INSTRUCTION, "instruction"),
    (
        "5 LoRA adapter",
        "run_instruction_training_lora.py --config {recipe}/lora.json "
        "--instruction-corpus-path data/instruction_corpus.txt --tokenizer-path data/tokenizer "
        f"--foundational-checkpoint {FOUNDATIONAL}",
        None,
    ),
    evaluation("5.1 its evaluation", LORA, "lora"),
    (
        "6 GRPO model",
        "run_grpo_training.py --config {recipe}/grpo.json --tokenizer data/tokenizer "
        f"--sft-checkpoint {INSTRUCTION}",
        None,
    ),
    evaluation("6.1 its evaluation", GRPO, "grpo"),
)


@dataclass(frozen=True)
class Settings(QuickstartConfig):
    """The flags, and what the trial has found."""

    for_workers: int = 0  # processes at most of a stage that has workers; 0 = as all others


def main(argv=None):
    config = Settings(**vars(parse(QuickstartConfig, argv, __doc__)))
    config, seconds = progress() if config.resume else (config, [])
    for stage in TRAINED if config.processes > 1 and not config.for_workers else ():
        if why := refusal(Path(config.recipe) / f"{stage}.json", config.processes):
            raise UserError(why)
    try:
        config = run_stages(config, seconds)
    except (KeyboardInterrupt, UserError):
        go_on = f"{quoted([sys.executable])} quickstart.py --resume"
        print(f"\ngo on with\n  {go_on}", file=sys.stderr)
        raise
    done = [
        (name, pasted(words(command, config)), taken, results and newest_metrics(results))
        for (name, command, results), taken in zip(STAGES, seconds, strict=True)
    ]
    finish(done, config)


def run_stages(config, seconds):
    """Run the stages that are not done yet, and keep count of them and of their ``seconds``."""
    for name, command, _ in STAGES[len(seconds) :]:
        if command.startswith("run_") and not config.processes:
            processes, most = fastest(config.recipe)
            config = replace(config, processes=processes, for_workers=most)
        keep_progress(config, seconds)
        arguments = words(command, config)
        seconds.append(run(name, going_on(arguments) if config.resume else arguments))
        config = replace(config, resume=False)  # the others have not begun
    keep_progress(config, seconds)
    return config


def finish(done, config):
    """Print the table of all stages and write the report; ``done`` is a StageRecord's values."""
    from arithmetic_llm.evaluation.html_report import StageRecord, missing_pictures, write_report
    from arithmetic_llm.evaluation.report import stage_table

    stages = [StageRecord(*values) for values in done]
    print("\n" + stage_table([(stage.name, stage.metrics, stage.seconds) for stage in stages]))
    command = ["quickstart.py", "--recipe", config.recipe, "--processes", str(config.processes)]
    write_report(stages, pasted(command), config.recipe, REPORT)
    if why := missing_pictures():
        print(f"note: the report has no pictures: {why}", file=sys.stderr)
    print(f"\nAll of it with pictures and the worst errors, in a browser: {REPORT}")
    print("Type expressions into the solver:")
    print(f"  {quoted([sys.executable])} run_interactive.py --model-path {INSTRUCTION}")


def words(command, config):
    """The arguments of a stage's command, whatever characters the recipe's path has."""
    script, *flags = (word.format(recipe=config.recipe) for word in command.split())
    if script == "run_evaluation.py":
        flags += on_gpu(resolve_device("auto"))
    return [script, *flags, *(in_processes(config, flags) if script.startswith("run_") else [])]


def on_gpu(device):
    """The flags of an evaluation on a GPU, where a pass takes as long for many as for one."""
    if device.type != "cuda":
        return []
    from torch.cuda import get_device_properties

    rows = 1024 if get_device_properties(device).total_memory > ROOM else 64
    return ["--device", "cuda", "--batch-size", str(rows)]


def in_processes(config, flags):
    """The flag of training and evaluation, if they are to have several.

    Workers are a little faster with a process each than as threads, whatever the trial has found of
    a stage without.
    """
    file = flags[flags.index("--config") + 1] if "--config" in flags else None
    if config.for_workers and file and workers_of(file):
        count = fitting(file, config.for_workers)
    else:
        count = config.processes
    return ["--processes", str(count)] if count > 1 else []


# ------------------------------------------------------------------- going on after Ctrl-C


def keep_progress(config, seconds):
    """Write down what is done, with what is the same for all stages."""
    PROGRESS.parent.mkdir(exist_ok=True)
    said = {name: getattr(config, name) for name in ("recipe", "processes", "for_workers")}
    atomic_write_text(PROGRESS, json.dumps({**said, "seconds": seconds}) + "\n")


def progress():
    """The config of the last quickstart here, and the seconds of its stages that were done."""
    if not PROGRESS.exists():
        raise UserError(f"--resume: no quickstart has begun here ({PROGRESS}); leave it out")
    said = read_json(PROGRESS)
    try:
        config = Settings(said["recipe"], said["processes"], True, said["for_workers"])
        return config, said["seconds"][: len(STAGES)]
    except (KeyError, TypeError):
        raise UserError(f"{PROGRESS}: not of a quickstart; leave --resume out") from None


def going_on(arguments):
    """The command of a stage, or that which goes on with the run that it has begun."""
    runs = [
        facts.parent
        for facts in Path("models").glob(f"**/{FACTS}")
        if read_json(facts).get("command", [])[1:] == arguments[1:]
    ]
    newest = max(runs, key=lambda folder: folder.name, default=None)
    if newest is None or (newest / FINISHED).exists() or not step_checkpoints(newest):
        return arguments
    return [arguments[0], "--resume", str(newest)]


# --------------------------------------------------------------- how many processes are faster

MOST = 4  # a batch of 2,304 tokens has few rows to share out
PAYS = 1.05  # times as fast: one process has fewer ways to fail
SAMPLE = (
    "generate_foundational_plaintext.py --config {recipe}/foundational_corpus.json "
    "--num-samples 3000 --output-txt {folder}/corpus.txt"
)
TRIAL = (
    "run_foundational_training.py --config {recipe}/foundational.json "
    "--model-config {recipe}/model.json --corpus-path {folder}/corpus.txt "
    "--tokenizer-path data/tokenizer --output-dir {folder}/{count} --processes {count} "
    "--max-steps 20 --log-every 10 --eval-every 20 --eval-samples 4"
)


def fastest(recipe):
    """One process, or one for each core, if that trains faster on this machine as it is now.

    Where processes share batches, their number decides the last bits of the weights; so it is
    printed, and each run and the report store it. A GPU is one process's.

    Returns:
        That count, and how many can be started.
    """
    most = fitting(Path(recipe) / "foundational.json", min(cores(), MOST))
    if most == 1 or resolve_device("auto").type != "cpu":
        return 1, 1
    print(f"\n== processes\ntrying 1 and {most} for some steps each ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        quietly(SAMPLE, recipe=recipe, folder=folder)
        rates = {n: rate(recipe=recipe, folder=folder, count=n) for n in (1, most)}
    chosen = most if rates[most] > PAYS * rates[1] else 1
    tried = ", ".join(f"{count}: {speed:,.0f} tokens/s" for count, speed in rates.items())
    print(f"{tried}; --processes {chosen} from here on, or one for each worker", flush=True)
    return chosen, most if rates[most] else 1


def workers_of(file):
    """What a training stage's config says of workers; empty if there is one."""
    said = read_json(Path(file)) if Path(file).exists() else {}
    if said.get("workers", 1) == 1:
        return {}
    return {key: said[key] for key in ("workers", "local_steps") if key in said}


def fitting(file, most):
    """The most processes that a stage takes, up to so many."""
    return next(count for count in range(most, 0, -1) if not refusal(file, count))


def refusal(file, processes):
    """What a training stage would say of so many processes; None if it takes them."""
    from arithmetic_llm.training.workers import require_a_worker_each

    try:
        require_a_worker_each(TrainingConfig(**workers_of(file)), processes)
    except UserError as error:
        return f"{file}: {error}"
    return None


def rate(**values):
    """Tokens a second at the end of a short training; 0 if it fails."""
    if quietly(TRIAL, **values):
        return 0.0
    (metrics,) = Path(values["folder"], str(values["count"])).glob("*/metrics.jsonl")
    lines = map(json.loads, metrics.read_text(encoding="utf-8").splitlines())
    return [line["tokens_per_second"] for line in lines if "tokens_per_second" in line][-1]


def quietly(command, **values):
    """Run a command without its lines; returns the exit code."""
    arguments = [word.format(**values) for word in command.split()]
    return subprocess.run(as_process(arguments), capture_output=True).returncode


# -------------------------------------------------------------------------------- a stage


def run(name, arguments):
    """One stage as a process of its own; returns its seconds."""
    print(f"\n== {name}\n$ {pasted(arguments)}", flush=True)
    started = time.monotonic()
    code = exit_code(subprocess.Popen(as_process(arguments)))
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise UserError(f"stage '{name}' ended with exit code {code}; its message is above")
    return time.monotonic() - started


def as_process(arguments):
    """A script of this folder and its arguments, as this Python runs them."""
    script, *flags = arguments
    return [sys.executable, str(Path(__file__).resolve().parent / script), *flags]


def exit_code(process):
    """The exit code of a stage. The terminal tells it of Ctrl-C, too, and it has time to save."""
    try:
        return process.wait()
    except KeyboardInterrupt:
        exit_code(process)
        return 130


def newest_metrics(folder):
    """The file of metrics that an evaluation has just written."""
    return max(Path(folder).glob("evaluation_metrics_*.json"))


if __name__ == "__main__":
    run_main(main)
