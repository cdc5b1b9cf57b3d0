"""All benchmarks on the CPU, one after the other, and their table.

    python benchmarks/run.py                the set of `make bench`
    python benchmarks/run.py --long         and the whole quickstart
    python benchmarks/run.py --write-docs   and put the table into docs/PERFORMANCE.md

Leave the machine alone meanwhile. The figures, with every raw rate, are in results/bench_*.json.
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass, fields

from common import ROOT, BenchConfig, Materials, Row, json_path, table

from arithmetic_llm.cli import opt, parse, run_main
from arithmetic_llm.runtime import UserError, atomic_write_text

SUBJECTS = ("training", "decoding", "evaluation", "grpo", "corpus", "step_time")
PAGE = ROOT / "docs" / "PERFORMANCE.md"
PICTURE = ROOT / "docs" / "step_time.png"


@dataclass(frozen=True)
class AllConfig(BenchConfig):
    """Benchmarks."""

    long: bool = opt(False, "also the whole quickstart")
    write_docs: bool = opt(False, "put the table into docs/PERFORMANCE.md")


def main(argv=None):
    config = parse(AllConfig, argv, __doc__)
    subjects = SUBJECTS + (("whole_quickstart",) if config.long else ())
    print(f"model: {Materials(config).model}", flush=True)
    for subject in subjects:
        measure(subject, config)
    reports = [json.loads(json_path(config, subject).read_text()) for subject in subjects]
    text = page(reports)
    print("\n" + text)
    if config.write_docs:
        write_docs(text, reports)


def measure(subject, config):
    """Run one benchmark in a process of its own."""
    words = [sys.executable, str(ROOT / "benchmarks" / f"{subject}.py"), *flags(config)]
    print(f"\n== {subject}", flush=True)
    if code := subprocess.run(words).returncode:
        raise UserError(f"the benchmark '{subject}' ended with exit code {code}")


def flags(config):
    """The settings that every benchmark knows, as flags."""
    for field in fields(BenchConfig):
        value, flag = getattr(config, field.name), f"--{field.name.replace('_', '-')}"
        if value is True:
            yield flag
        elif value is not False and value != "":
            yield from (flag, str(value))


# ------------------------------------------------------------------------------------- the page


def page(reports):
    """Machine, settings, the table, and where the time of a step goes."""
    rows = [Row(**row) for report in reports for row in report["rows"]]
    shares = [row for row in rows if row.subject.startswith("step time: ")]
    table_rows = [row for row in rows if row not in shares]
    minutes = sum(report["seconds"] for report in reports) / 60
    command = f"Measured {reports[0]['date']} in {minutes:.0f} minutes by `make bench`"
    return "\n\n".join(
        [f"{command} on {of_machine(reports[0])}.", table(table_rows), step_time(shares)]
    )


def of_machine(report):
    """The machine in a sentence."""
    found = report["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items() if k != "platform")
    faster = "bf16" if found["bf16_pays"] else "fp32"
    return (
        f"{found['cores']} cores of {found['processor']} (products fastest in {faster}), "
        f"{found['memory_gib']:.0f} GiB of memory that copies "
        f"{found['copy_gb_per_second']:.0f} GB/s; {report['settings']['repetitions']} turns; "
        f"{versions}"
    )


def step_time(shares):
    """Bars of characters, one for each kind of operation."""
    lines = ["| where the time of a training step goes | share | |", "|---|---:|---|"]
    for row in shares:
        kind, share = row.subject.removeprefix("step time: "), row.value
        lines.append(f"| {kind} | {share:.0f} % | {'█' * round(share / 2)} |")
    return "\n".join(lines)


def write_docs(text, reports):
    """Replace the last table of docs/PERFORMANCE.md, and draw the picture if that is possible."""
    marks = "(<!-- last table -->\n).*(<!-- end -->)"
    before = PAGE.read_text(encoding="utf-8")
    drawn = "![Where the time of a training step goes](step_time.png)\n\n" if draw(reports) else ""
    after = re.sub(marks, lambda m: f"{m[1]}\n{text}\n\n{drawn}{m[2]}", before, flags=re.DOTALL)
    atomic_write_text(PAGE, after)


def draw(reports):
    """Draw the shares of a step if matplotlib is installed; tells whether it was."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return False
    rows = [row for report in reports for row in report["rows"]]
    shares = [row for row in rows if row["subject"].startswith("step time: ")][::-1]
    names = [row["subject"].removeprefix("step time: ") for row in shares]
    pyplot.figure(figsize=(7, 3))
    pyplot.barh(names, [row["value"] for row in shares])
    pyplot.xlabel("% of a training step")
    pyplot.tight_layout()
    pyplot.savefig(PICTURE)
    return True


if __name__ == "__main__":
    run_main(main)
