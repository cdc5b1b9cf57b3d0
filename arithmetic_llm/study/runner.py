"""Running stages as processes, several at a time, so that a kill at any moment loses little.

A stage's folder has a lock that its process inherits: it is held while the process lives, whatever
became of the study that started it. So no stage is ever run twice at once, neither by a second
study that shares it nor by one that was killed and started again. Windows has no such locks.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

from arithmetic_llm.folders import FINISHED, METRICS, read_lines
from arithmetic_llm.runtime import (
    Progress,
    atomic_write,
    atomic_write_text,
    when_asked_to_stop,
)
from arithmetic_llm.study.kinds import ROOT
from arithmetic_llm.study.stages import DONE, Stage

LOG, LOCK = "log.txt", "lock"
SECONDS_BETWEEN_LOOKS, SECONDS_BETWEEN_SHOWS = 0.2, 2.0
SECONDS_TO_SAVE = 120  # a training run ends its step and saves when it is interrupted
# What a stage may take on one core, in seconds: a start, and each step of training or problem. The
# bar goes by it; how fast this machine is, it finds out by itself.
START = 4
A_STEP = {"foundational": 0.2, "instruction": 0.2, "lora": 0.15, "grpo": 8.0}
A_SAMPLE = {"foundational_corpus": 2e-4, "instruction_corpus": 2e-4, "evaluation": 0.02}


class Failure(NamedTuple):
    """A stage that ended with an error."""

    stage: Stage
    code: int
    why: str  # the last line of its log


@dataclass
class Running:
    """A process at work on a stage."""

    stage: Stage
    process: subprocess.Popen
    lock: IO[bytes]
    started: float = field(default_factory=time.monotonic)


def run_stages(stages: Sequence[Stage], jobs: int, title: str) -> list[Failure]:
    """Run what is not done yet, at most so many stages at a time; returns those that failed.

    Args:
        stages: each behind those that it needs.

    Raises:
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after every process has saved and ended.
    """
    expected = {stage.hash: expected_seconds(stage) for stage in stages}
    before = sum(expected[stage.hash] for stage in stages if stage.done)
    total = sum(expected.values())
    with Progress(total, title, "s of work", before) as bar, when_asked_to_stop(interrupt):
        runner = Runner(stages, jobs, bar, expected, counted=before)
        runner.run()
    return runner.failures


@dataclass
class Runner:
    """What there is to do, and what is being done."""

    stages: Sequence[Stage]
    jobs: int
    bar: Progress
    expected: dict[str, int]  # seconds by the stage's hash
    counted: int  # of them, what the bar has
    left: list[Stage] = field(default_factory=list)
    running: list[Running] = field(default_factory=list)
    last_shown: float = 0.0  # by the monotonic clock
    failures: list[Failure] = field(default_factory=list)

    def run(self) -> None:
        """Run all that can be run; what needs a failed stage is dropped."""
        self.left = [stage for stage in self.stages if not stage.done]
        try:
            while self.left or self.running:
                self.start_what_is_ready()
                time.sleep(SECONDS_BETWEEN_LOOKS)
                self.collect()
                if time.monotonic() - self.last_shown > SECONDS_BETWEEN_SHOWS:
                    self.show()
        except BaseException:
            self.interrupt()
            raise
        self.show()

    def start_what_is_ready(self) -> None:
        """Start stages, in order, on the cores that are free."""
        for stage in [s for s in self.left if all(each.done for each in s.inputs.values())]:
            if len(self.running) >= self.jobs:
                return
            lock = locked(stage.folder)
            if lock is None:  # another study, or a killed one's process, is at work on it
                continue
            self.left.remove(stage)
            if is_done_now(stage):
                lock.close()
            else:
                self.running.append(Running(stage, start(stage, lock), lock))

    def collect(self) -> None:
        """Take note of processes that have ended."""
        for job in [job for job in self.running if job.process.poll() is not None]:
            self.running.remove(job)
            if job.process.returncode == 0 and Path(job.stage.product).is_file():
                mark_done(job.stage, time.monotonic() - job.started)
            else:
                self.fail(job)
            job.lock.close()

    def fail(self, job: Running) -> None:
        """Report a failure, and drop what cannot be done without the stage."""
        failure = Failure(job.stage, job.process.returncode, last_words(job.stage))
        self.failures.append(failure)
        self.left = [s for s in self.left if job.stage not in s.with_inputs()]
        log = job.stage.folder / LOG
        self.bar.note(f"failed: {job.stage.name}: {failure.why} (exit code {failure.code}; {log})")

    def show(self) -> None:
        """Bring the bar up to date."""
        self.last_shown = time.monotonic()
        gone = sum(self.expected[stage.hash] for stage in self.stages if stage.done)
        gone += sum(int(self.expected[j.stage.hash] * share_done(j.stage)) for j in self.running)
        names = ", ".join(job.stage.name for job in self.running) or "-"
        self.bar.update(max(0, gone - self.counted), now=names)
        self.counted = max(gone, self.counted)

    def interrupt(self) -> None:
        """Have every process save and end; kill what does not, or all on a second Ctrl-C."""
        for job in self.running:
            if os.name != "nt":  # there the console has told it already, and this would kill it
                job.process.send_signal(signal.SIGINT)
        self.bar.note("saving; the same command goes on from here")
        until = time.monotonic() + SECONDS_TO_SAVE
        try:
            for job in self.running:
                job.process.wait(max(0.0, until - time.monotonic()))
        except (KeyboardInterrupt, subprocess.TimeoutExpired):
            for job in self.running:
                job.process.kill()


def interrupt(signum: int, frame: object) -> None:
    """What a request to stop does."""
    raise KeyboardInterrupt


# ------------------------------------------------------------------------------------ one stage


def locked(folder: Path) -> IO[bytes] | None:
    """The lock of a stage's folder, which is made if need be; None if a process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / LOCK, "ab")  # noqa: SIM115  held on to
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        pass
    except BlockingIOError:
        lock.close()
        return None
    return lock


def is_done_now(stage: Stage) -> bool:
    """Whether nothing is left to run, after doing what needs no process."""
    if stage.done:  # by another study
        return True
    if stage.kind is None:
        join(stage)
        return True
    if stage.run_folder and (stage.run_folder / FINISHED).is_file():  # killed before the mark
        mark_done(stage)
        return True
    return False


def start(stage: Stage, lock: IO[bytes]) -> subprocess.Popen:
    """The process of a stage, on one core; a training run that was interrupted goes on."""
    script, *arguments = stage.words
    if stage.run_folder:
        arguments = ["--resume", str(stage.run_folder)]
    elif stage.kind.trains:  # a folder that was killed while it was made
        for folder in stage.folder.glob(stage.kind.runs):
            shutil.rmtree(folder)
    with open(stage.folder / LOG, "ab") as log:
        log.write(f"$ python {shlex.join([script, *arguments])}\n".encode())
        log.flush()
        return launch([sys.executable, str(ROOT / script), *arguments], log, lock)


def launch(command: Sequence[str], log: IO[bytes], lock: IO[bytes]) -> subprocess.Popen:
    """A process in a session of its own: Ctrl-C reaches it once, through the study."""
    held = {} if os.name == "nt" else {"pass_fds": [lock.fileno()], "start_new_session": True}
    one_core = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, **one_core},
        **held,
    )


def mark_done(stage: Stage, seconds: float | None = None) -> None:
    """Write what marks a stage as finished."""
    facts = {"command": stage.words, "seconds": seconds and round(seconds, 1)}
    atomic_write_text(stage.folder / DONE, json.dumps(facts, indent=2) + "\n")


def join(stage: Stage) -> None:
    """Write corpora one behind the other."""
    with atomic_write(stage.product) as file:
        for part in stage.inputs.values():
            file.write(Path(part.product).read_bytes())
    atomic_write_text(stage.folder / DONE, "{}\n")


def last_words(stage: Stage) -> str:
    """The last line of a stage's log, which is its error if it had one."""
    lines = (stage.folder / LOG).read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")


def share_done(stage: Stage) -> float:
    """The share of a training run's steps that its metrics tell of."""
    steps = stage.effective.get("max_steps")
    if not (steps and stage.run_folder and (stage.run_folder / METRICS).is_file()):
        return 0.0
    lines = read_lines(stage.run_folder / METRICS)
    return min(1.0, lines[-1]["step"] / steps) if lines else 0.0


def expected_seconds(stage: Stage) -> int:
    """Seconds of work that a stage may be, on one core."""
    if stage.given or stage.kind is None:
        return 0
    values = stage.effective
    if stage.kind.trains:
        cheap = values.get("learn_from") == "solutions"
        work = (values.get("max_steps") or 1000) * A_STEP[stage.name] * (0.2 if cheap else 1.0)
    else:
        corpus = stage.inputs.get("test_file", stage)
        samples = corpus.effective.get("num_samples") or values.get("num_samples") or 1000
        work = samples * A_SAMPLE.get(stage.name, 2e-4)
    return round(START + work)
