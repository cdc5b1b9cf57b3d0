"""Draw evaluations side by side: accuracy by depth with 95 % intervals, and kinds of errors.

python plot_evaluation.py evaluation_results/evaluation_metrics_*.json --output models.png
"""

from arithmetic_llm.cli import parse, run_main
from arithmetic_llm.config import PlotEvaluationConfig


def main(argv=None):
    config = parse(PlotEvaluationConfig, argv, __doc__)
    from arithmetic_llm.evaluation import panels
    from arithmetic_llm.evaluation.plots import draw_evaluations, require_picture, save_picture
    from arithmetic_llm.folders import resolve_stamp

    output = require_picture(resolve_stamp(config.output))
    files = [resolve_stamp(file) for file in config.metrics]
    found = [panels.read_evaluation(file) for file in files]
    names = panels.evaluation_names(found, files)
    data = panels.accuracies(found), panels.error_shares(found)
    save_picture(draw_evaluations(*data, names, config.width), output)
    print(f"picture in {output}")


if __name__ == "__main__":
    run_main(main)
