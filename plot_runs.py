"""Draw the curves of training runs: losses, held-out figures, and what GRPO tells of its rollouts.

    python plot_runs.py models/foundational_YYYYMMDD_HHMMSS --output run.png

Runs that differ only in the seed become one line, their mean, in a band from the least of them to
the greatest.
"""

import sys

from arithmetic_llm.cli import parse, run_main
from arithmetic_llm.config import PlotRunsConfig


def main(argv=None):
    config = parse(PlotRunsConfig, argv, __doc__)
    from arithmetic_llm.evaluation.panels import group_names, grouped, read_run, run_panels
    from arithmetic_llm.evaluation.plots import draw_runs, require_picture, save_picture
    from arithmetic_llm.folders import resolve_stamp

    output = require_picture(resolve_stamp(config.output))
    runs = [read_run(resolve_stamp(run)) for run in config.runs]
    if silent := [run.name for run in runs if not run.has_time]:
        why = "its metrics.jsonl, of an earlier version, tells no seconds, so neither tokens nor"
        print(f"note: {silent[0]}: {why} minutes are known; steps are shown", file=sys.stderr)
    groups = grouped(runs)
    save_picture(draw_runs(run_panels(groups), group_names(groups), config.width), output)
    print(f"picture in {output}")


if __name__ == "__main__":
    run_main(main)
