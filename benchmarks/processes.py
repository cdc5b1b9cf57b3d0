"""Training by several processes on this machine, beside one: tokens a second, efficiency.

    python benchmarks/processes.py

The quickstart's model and corpus. Efficiency is the speed as a share of so many times that of one
process of one thread. Processes share a batch, so that all sides learn the same; workers have a
batch each (local SGD).
"""

from functools import partial

from common import Comparison, Materials, Row, in_turn, main_of, thousands
from training import ours, quickstart_case

from arithmetic_llm.cli import run_main
from arithmetic_llm.distributed import cores

ONE = "1 process of 1 thread"


def measure(config):
    """A row for each way to use 1, 2 and 4 cores, as far as there are as many."""
    case = quickstart_case(Materials(config))
    rates = in_turn({name: partial(rate, case, *way) for name, way in ways()}, config.repetitions)
    return [row(rates, name, *way) for name, way in ways()]


def ways():
    """Processes and threads of each by name: each number of cores by threads, and by processes."""
    yield ONE, (1, 1)
    for count in (2, 4):
        if count <= cores():
            yield f"1 process of {count} threads", (1, count)
            yield f"{count} processes of 1 thread", (count, 1)
            workers = ("--workers", count, "--local-steps", 5)
            yield f"{count} workers, a process of 1 thread each", (count, 1, *workers)


def rate(case, processes, threads, *more):
    """Tokens a second of the script."""
    return ours(case, "--processes", processes, "--threads", threads, *more).rate


def row(rates, name, processes, threads, *_):
    """The row of a way beside one process of one thread."""
    found = Comparison({"ours": rates[name], ONE: rates[ONE]}, {})
    used = processes * threads
    peer = f"{ONE}: {thousands(found.median(ONE))}; efficiency {found.ratio(ONE) / used:.0%}"
    facts = {"rates": found.rates, "processes": processes, "threads": threads}
    ours = thousands(found.median())
    return Row(f"training, {name}", ours, peer, found.ratio(ONE), evidence=facts)


main = main_of("processes", measure, __doc__)

if __name__ == "__main__":
    run_main(main)
