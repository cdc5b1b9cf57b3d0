"""Evaluation: the whole process of run_evaluation.py on 1,000 test problems.

python benchmarks/evaluation.py
"""

import json
import statistics
import tempfile
from pathlib import Path

from common import Materials, Row, main_of, run

from arithmetic_llm.cli import run_main


def measure(config):
    """The one row: seconds from start to end."""
    materials, problems = Materials(config), config.size(1000, 20)
    words = ["run_evaluation.py", "--num-samples", problems, "--max-depth", 4]
    words += ["--num-range", *materials.num_range]
    words += [] if config.model_path else ["--min-depth", 2]  # few small numbers, few of depth 1
    words += ["--max-gen-length", 24] if config.miniature else []
    with tempfile.TemporaryDirectory() as folder:
        words += ["--output-dir", folder, "--model-path", materials.model]
        seconds = [run(words).seconds for _ in range(config.repetitions)]
        said = json.loads(next(Path(folder).glob("evaluation_metrics_*.json")).read_text())
    median, right = statistics.median(seconds), said["exact_match_accuracy"]
    subject = f"evaluation of {said['total_samples']:,} problems, whole process"
    facts = {"seconds": seconds, "exact_match_accuracy": right}
    ours = f"{median:.3g} s ({right:.1f} % right)"
    return [Row(subject, ours, "", median, "s", 12, at_most=True, evidence=facts)]


main = main_of("evaluation", measure, __doc__)

if __name__ == "__main__":
    run_main(main)
