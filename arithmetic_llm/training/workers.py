"""Workers: copies of a model that train side by side, each on batches of its own.

Threads or processes that share out a batch wait for one another several times a step; workers do
not. How they come together again is `local_sgd` or, where they have one set of weights, `turns`. A
run is a function of the number of workers; whether a thread or a process computes one changes
nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from statistics import fmean

from arithmetic_llm.config import TrainingConfig
from arithmetic_llm.distributed import gather_shares
from arithmetic_llm.runtime import UserError
from arithmetic_llm.threads import map_at_once, map_on_cores, setting_on_error
from arithmetic_llm.training.gradients import threads_side_by_side
from arithmetic_llm.training.local_sgd import meet
from arithmetic_llm.training.run import Run
from arithmetic_llm.training.step import StepResult, Task, train_step
from arithmetic_llm.training.turns import Stopped, Turns

AT_A_TIME = 20  # steps: so long does a request to stop wait, and then one worker for another


def require_a_worker_each(config: TrainingConfig, processes: int) -> None:
    """Refuse processes that would have no worker or, where workers take turns, several.

    Raises:
        UserError: there are fewer workers than processes, or more that take turns.
    """
    workers = config.workers
    if min(workers, processes) == 1 or workers == processes:
        return
    if take_turns(config):
        raise UserError(
            f"--workers {workers}: take turns (--local-steps 0), and that in one process or one "
            f"each; start 1 or {workers}, not {processes}"
        )
    if workers < processes:
        raise UserError(
            f"--workers {workers}: is fewer than the {processes} processes; start at most "
            f"{workers}, or have --workers {processes}, or 1, which share out each batch"
        )


def train_workers(run: Run, task: Task, show: Callable[[StepResult], None]) -> list[StepResult]:
    """Some steps of every worker, after which the run's model is what they have come to together.

    On a CPU a worker is computed on one core, wherever it is.

    Args:
        show: is given the result of each step of this process's workers, by any thread.

    Returns:
        Of each step the mean loss and gradient norm of all workers, and their tokens together.
    """
    end, stopped = end_of_round(run, task), threading.Event()
    turns = Turns(run, end, stopped) if take_turns(run.config) else None

    @setting_on_error(stopped)
    def steps_of(worker: Run) -> list[StepResult]:
        own, results = task.of_worker(worker.number), []
        turn = partial(turns.of, worker) if turns else nullcontext
        with suppress(Stopped):
            while worker.step < end and not stopped.is_set():
                results.append(train_step(worker, own, turn))
                show(results[-1])
        return results

    side_by_side = map_on_cores if run.model.device.type == "cpu" else map_at_once
    with setting_on_error(stopped):  # Ctrl-C comes to this thread alone
        results = [*side_by_side(steps_of, run.workers, workers_at_once(run))]
    run.step = end
    if turns:
        turns.close()
    else:
        meet(run)
    return [over_workers(step) for step in zip(*gather_shares(results), strict=True)]


def take_turns(config: TrainingConfig) -> bool:
    """Whether the workers have one set of weights."""
    return config.local_steps == 0


def workers_at_once(run: Run) -> int:
    """How many of this process's workers are computed side by side.

    Who takes turns is either all at work, on however few cores, or one after the other.
    """
    threads = threads_side_by_side(run.model)
    return len(run.workers) if take_turns(run.config) and threads > 1 else threads


def end_of_round(run: Run, task: Task) -> int:
    """The next step at which something is done for all workers together.

    One after the other, those who take turns have one step each.
    """
    config = run.config
    one_by_one = take_turns(run.config) and workers_at_once(run) < len(run.workers)
    at_most = 1 if one_by_one else AT_A_TIME
    due = (config.local_steps, config.eval_every, config.save_every, config.log_every)
    multiples = [
        (run.step // every + 1) * every for every in (at_most, *due, task.steps_per_epoch) if every
    ]
    return min(task.total_steps, *multiples)


def over_workers(results: Sequence[StepResult]) -> StepResult:
    """The metrics of a step of several workers."""
    return StepResult(
        fmean(result.loss for result in results),
        sum(result.tokens for result in results),
        results[0].rates,
        fmean(result.gradient_norm for result in results),
    )
