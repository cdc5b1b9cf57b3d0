"""A training run as files: its folder, its checkpoints, its metrics, and how to go on with it."""

from __future__ import annotations

import copy
import json
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arithmetic_llm.cli import read_json, to_json
from arithmetic_llm.config import RunConfig
from arithmetic_llm.distributed import (
    from_main,
    gather_shares,
    is_main,
    job_name,
    require_same,
    share,
    world_size,
)
from arithmetic_llm.folders import (
    BEST,
    FACTS,
    FINISHED,
    METRICS,
    SETTINGS,
    new_run_folder,
    read_lines,
    step_checkpoints,
)
from arithmetic_llm.model import kernels
from arithmetic_llm.model.checkpoint import (
    Checkpoint,
    CheckpointData,
    read_checkpoint,
    save_checkpoint,
    weights_hash,
)
from arithmetic_llm.model.load import load_weights
from arithmetic_llm.model.tensors import import_safetensors
from arithmetic_llm.model.transformer import ArithmeticModel
from arithmetic_llm.runtime import (
    UserError,
    atomic_write_text,
    checked,
    reason,
    resolve_precision,
    versions,
)
from arithmetic_llm.training.adapters import keep_base
from arithmetic_llm.training.batches import most_at_once
from arithmetic_llm.training.optim import MuonAdamW, build_optimizer

ROLLOUTS = "rollouts.jsonl"
TRAINING = {  # the form of what a resumable checkpoint holds beside its weights
    "optimizer": dict,
    "best": float,
    "task": dict,
    "rng": Tensor,
    "cuda_rng": list[Tensor],
    "threads": int,
    "processes": int,
    "precision": str,
    "kernels": str,
    "workers": list[dict],
}
OF_BEFORE = {"kernels": "torch", "workers": []}  # what earlier versions' checkpoints do not say


@dataclass
class Run:
    """One training run: its folder, what it trains, and how far it is."""

    folder: Path
    config: RunConfig
    checkpoint: Checkpoint  # the model, with what every file saved from it must say
    optimizer: MuonAdamW  # where there are workers, they have their own, and this does no step
    precision: torch.dtype  # of the matrix products
    step: int = 0
    number: int = 0  # of a worker
    workers: list[Run] = field(default_factory=list)  # this process's, see `workers`
    best: float = math.inf  # lowest `selection_loss` so far
    task_state: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def at_start(cls, folder: Path, config: RunConfig, checkpoint: Checkpoint) -> Run:
        """A run before its first step."""
        precision = precision_of(config, checkpoint.model.device)
        optimizer = build_optimizer(checkpoint.model, config, precision)
        run = cls(folder, config, checkpoint, optimizer, precision)
        if workers_of(config) > 1:
            run.workers = [run.worker(number) for number in share(range(workers_of(config)))]
        return run

    def worker(self, number: int) -> Run:
        """A worker at its start: weights of its own, which are the run's, and an optimizer."""
        own = replace(self.checkpoint, model=copy.deepcopy(self.model))
        optimizer = build_optimizer(own.model, self.config, self.precision)
        return replace(self, checkpoint=own, optimizer=optimizer, number=number)

    @property
    def model(self) -> ArithmeticModel:
        """The model that is evaluated and saved: what is trained, or what its workers come to."""
        return self.checkpoint.model

    @property
    def trained(self) -> list[Tensor]:
        """The weights that change, in the optimizer's order."""
        return [weight for group in self.optimizer.param_groups for weight in group["params"]]

    # -- files

    @property
    def step_file(self) -> str:
        """Name of the checkpoint of this step."""
        return f"checkpoint_step_{self.step}.pt"

    def save(self, name: str, resumable: bool = False) -> None:
        """Write a checkpoint of this moment into the run folder; of several processes one does.

        Where it is to be resumable, all of them have to call this.
        """
        training = self._training_state() if resumable else {}
        if not is_main():
            return
        content = replace(self.checkpoint, step=self.step, training=training)
        save_checkpoint(self.folder / name, content)

    def save_step(self) -> None:
        """Write ``checkpoint_step_N.pt`` and drop those that are no longer kept.

        Later ones are damaged, or the run would have gone on from them: they count for nothing.
        """
        self.save(self.step_file, resumable=True)
        if not (is_main() and self.config.keep_checkpoints):
            return
        paths = step_checkpoints(self.folder)
        so_far = paths[: paths.index(self.folder / self.step_file) + 1]
        for old in so_far[: -self.config.keep_checkpoints]:
            old.unlink(missing_ok=True)

    def write_json(self, name: str, value: Any) -> None:
        atomic_write_text(self.folder / name, json.dumps(value, indent=2) + "\n")

    # -- resuming

    def _training_state(self) -> dict[str, Any]:
        # Several processes seed each step anew, and none needs memory on the others' GPUs.
        on_gpus = torch.cuda.is_available() and world_size() == 1
        return {
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "task": self.task_state,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if on_gpus else [],
            "threads": torch.get_num_threads(),
            "processes": world_size(),
            "workers": gather_shares([worker.as_worker() for worker in self.workers]),
            **self._computed_by(),
        }

    def as_worker(self) -> dict[str, Any]:
        """What a worker is between two rounds, on the CPU: another GPU may take it up."""
        weights = [weight.detach().cpu() for weight in self.trained]
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = {
            index: {name: v.cpu() if isinstance(v, Tensor) else v for name, v in state.items()}
            for index, state in optimizer["state"].items()
        }
        return {"weights": weights, "optimizer": optimizer}

    def _computed_by(self) -> dict[str, str]:
        """What the last bits of the weights depend on, beside threads and processes."""
        return {"precision": str(self.precision), "kernels": kernels.in_use(self.model.device)}

    def restore(self, saved: CheckpointData) -> None:
        """Continue from a resumable checkpoint: weights, optimizer, random state, best so far.

        Raises:
            LookupError, RuntimeError, TypeError, ValueError: it is not resumable, damaged, or
                another run's; then nothing of this run has changed.
        """
        state = saved.training and {**OF_BEFORE, **saved.training}
        self._check(state)
        load_weights(self.model, saved.weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.task_state = state["task"]
        self.step, self.best = saved.step, state["best"]
        for worker, its_state in zip(self.workers, share(state["workers"]), strict=True):
            worker.take_up(its_state, self.step)
        torch.set_rng_state(state["rng"])
        if torch.cuda.is_available() and world_size() == 1:  # it may go on with fewer devices
            torch.cuda.set_rng_state_all(state["cuda_rng"][: torch.cuda.device_count()])
        if state["processes"] != world_size():
            if not self.workers:  # whose work is the same in any process
                print(
                    f"warning: this run was computed by {in_words(state['processes'])} before, now "
                    f"by {in_words(world_size())}; its weights will not be bit-identical",
                    file=sys.stderr,
                )
        elif state["threads"] != torch.get_num_threads():
            torch.set_num_threads(state["threads"])
            print(f"using {state['threads']} CPU threads, as this run did before")
        for what, now in self._computed_by().items():
            if state[what] != now:
                print(
                    f"warning: {what} of this run: {state[what]} before, now {now}; "
                    "its weights will not be bit-identical",
                    file=sys.stderr,
                )

    def take_up(self, state: dict[str, Any], step: int) -> None:
        """Make a worker what it was; see `as_worker`."""
        self.step = step
        self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for weight, saved in zip(self.trained, state["weights"], strict=True):
                weight.copy_(saved)

    def _check(self, state: dict[str, Any]) -> None:
        """Refuse a training state that could not be taken up whole."""
        if not state:
            raise ValueError("it holds a model, but not what training goes on with")
        for name, form in TRAINING.items():
            checked(form, state[name], f"training {name}")
        for name in ("threads", "processes"):
            if state[name] < 1:
                raise ValueError(f"training {name} is {state[name]}")
        check_optimizer_state(self.optimizer, state["optimizer"])
        if len(state["workers"]) != (workers_of(self.config) if self.workers else 0):
            raise ValueError(f"training workers are {len(state['workers'])}")
        for saved in state["workers"]:
            check_optimizer_state(self.optimizer, saved["optimizer"])
            weights = checked(list[Tensor], saved["weights"], "worker's weights")
            if [weight.shape for weight in weights] != [weight.shape for weight in self.trained]:
                raise ValueError("a worker's weights are of other shapes")
        if len({str(_keys(saved["optimizer"]["state"])) for saved in state["workers"]}) > 1:
            raise ValueError("its workers' optimizers do not remember the same")
        check_random_state("cpu", state["rng"])
        for rng in state["cuda_rng"] if torch.cuda.is_available() else []:
            check_random_state("cuda", rng)


def workers_of(config: RunConfig) -> int:
    """The workers that a run asks for; only some stages may have several."""
    return getattr(config, "workers", 1)


def in_words(processes: int) -> str:
    """``1 process``, ``2 processes``."""
    return f"{processes} process" + ("es" if processes > 1 else "")


def check_random_state(device: str, state: Tensor) -> None:
    """Try a state on a generator that nothing draws from.

    Raises:
        RuntimeError, TypeError: it is none of such a device.
    """
    torch.Generator(device).set_state(state)


def check_optimizer_state(optimizer: MuonAdamW, saved: dict[str, Any]) -> None:
    """Compare a saved state with the parameters that it is for.

    Raises:
        LookupError, ValueError: other groups of parameters, or tensors of another shape.
    """
    ours = optimizer.state_dict()["param_groups"]
    theirs = checked(list[dict], saved["param_groups"], "optimizer groups")
    if _layout(theirs) != _layout(ours):
        raise ValueError("its optimizer has other groups of parameters")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, state in checked(dict[int, dict], saved["state"], "optimizer state").items():
        for name, value in state.items():
            if name == "step":
                checked(int, value, "optimizer step")
            elif checked(Tensor, value, f"optimizer {name}").shape != parameters[index].shape:
                raise ValueError(f"optimizer state {name} does not fit the weights")


def _keys(state: dict[int, dict]) -> list[tuple[int, list[str]]]:
    """Which values an optimizer remembers of which parameters."""
    return [(index, sorted(values)) for index, values in sorted(state.items())]


def _layout(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parameters of each group, and the types of its settings."""
    return [{k: v if k == "params" else type(v) for k, v in group.items()} for group in groups]


def open_run(config: RunConfig, checkpoint: Checkpoint, **hashes: str) -> Run:
    """A new run, or the one that ``config.resume`` names.

    Args:
        hashes: of what the run learns from; they must be the same on resuming.

    Raises:
        UserError: the run to resume is finished, or learned from something else.
    """
    if world_size() > 1:
        _require_same_start(checkpoint.model, hashes)
    if checkpoint.adapter and config.save_peft_adapter:
        import_safetensors("safetensors")  # or its lack would show when all is learned
    if config.resume:
        _check_unfinished(Path(config.resume), config, checkpoint, hashes)
        run = continue_run(Path(config.resume), config, checkpoint)
    else:
        folder = from_main(lambda: new_run_folder(config.output_dir, checkpoint.stage))
        run = start_run(folder, config, checkpoint, hashes)
    if checkpoint.adapter:
        keep_base(run.folder, checkpoint)
    return run


def _require_same_start(model: ArithmeticModel, hashes: dict[str, str]) -> None:
    """See to it that all processes learn the same, and will cut each batch in the same way.

    Raises:
        UserError: they do not begin alike.
    """
    require_same({**hashes, "weights": weights_hash(model)}, "corpus and start")
    require_same((torch.get_num_threads(), model.device.type), "--threads and kind of --device")
    require_same(most_at_once(model.device), "memory on their GPUs")


def _check_unfinished(
    folder: Path, config: RunConfig, checkpoint: Checkpoint, hashes: dict[str, str]
) -> None:
    if (folder / FINISHED).exists():
        raise UserError(
            f"{folder}: is finished; start a new run with "
            f"{config.START_FLAG} {folder / 'final_model.pt'}"
        )
    before = read_json(folder / FACTS)
    for name, value in {**hashes, "tokenizer_hash": checkpoint.tokenizer.hash}.items():
        if before.get(name) != value:
            raise UserError(f"{folder}: its {name} has changed since; restore that, or start anew")


def precision_of(config: RunConfig, device: torch.device) -> torch.dtype:
    """The precision of a run's products, one for all processes.

    ``auto`` may depend on a trial, so a resumed run keeps what it had on such a device.
    """
    if config.resume and config.precision == "auto":
        before = read_json(Path(config.resume) / FACTS)
        if before.get("device", "").partition(":")[0] == device.type:
            return getattr(torch, before["precision"])
    return from_main(lambda: resolve_precision(config.precision, device))


def start_run(
    folder: Path, config: RunConfig, checkpoint: Checkpoint, hashes: dict[str, str]
) -> Run:
    """A run at step 0, with ``run.json`` and the configs written."""
    run = Run.at_start(folder, config, checkpoint)
    if not is_main():
        return run
    atomic_write_text(folder / SETTINGS["model_config"], to_json(checkpoint.model.config))
    run.write_json(
        FACTS,
        {
            "command": sys.argv,
            "stage": checkpoint.stage,
            "seed": config.seed,
            "device": str(run.model.device),
            "precision": str(run.precision).removeprefix("torch."),
            "kernels": kernels.in_use(run.model.device),
            "threads": torch.get_num_threads(),
            "processes": world_size(),
            **({"job": job} if (job := job_name()) else {}),
            "parameters": run.model.parameter_count(),
            "tokenizer_hash": checkpoint.tokenizer.hash,
            "versions": versions(),
            **hashes,
        },
    )
    # Last: a folder that --resume can read its settings from has all the rest, too.
    atomic_write_text(folder / SETTINGS["config"], to_json(replace(config, resume="")))
    return run


def continue_run(folder: Path, config: RunConfig, checkpoint: Checkpoint) -> Run:
    """The run in ``folder``, at its newest readable checkpoint; at step 0 if there is none."""
    run = Run.at_start(folder, config, checkpoint)
    for half_written in folder.glob(".*.tmp") if is_main() else ():  # what a kill interrupted
        half_written.unlink()
    paths = step_checkpoints(folder)
    if any(restored(run, path) for path in reversed(paths)):
        print(f"resuming {folder} at step {run.step}")
    else:
        none = "none of its checkpoints will do" if paths else "it has no checkpoint yet"
        print(f"resuming {folder}: {none}, so it starts over")
    require_same(run.step, f"checkpoints in {folder}")
    if best_is_lost(run):
        run.best = math.inf
    for name in (METRICS, ROLLOUTS):
        MetricsLog(folder, name).truncate(run.step)
    return run


def best_is_lost(run: Run) -> bool:
    """Whether ``best_model.pt`` cannot stay: unreadable, or of a step that is still to come again.

    Such a step may turn out otherwise, and then no figure of this run would belong to the file.
    """
    try:
        return read_checkpoint(run.folder / BEST).step > run.step
    except UserError:
        return True


def restored(run: Run, path: Path) -> bool:
    """Whether the run now stands at this checkpoint; if it cannot, a warning says why."""
    try:
        run.restore(read_checkpoint(path))
        return True
    except UserError as error:
        why = str(error)
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        why = f"{path}: cannot be resumed from ({reason(error)})"
    print(f"warning: {why}; trying the one before", file=sys.stderr)
    return False


class MetricsLog:
    """One JSON object a line, flushed as it is written, readable at any time."""

    def __init__(self, folder: Path, name: str = METRICS):
        self.path = folder / name

    def append(self, **values: Any) -> None:
        if not is_main():
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All lines so far; one that a kill left unfinished is passed over."""
        return read_lines(self.path) if self.path.exists() else []

    def truncate(self, step: int) -> None:
        """Forget what came after ``step``; a resumed run will write it again, at 0 all of it."""
        if not (is_main() and self.path.exists()):
            return
        kept = [line for line in self.read() if line["step"] <= step and step > 0]
        atomic_write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
