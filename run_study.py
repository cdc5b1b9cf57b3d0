"""Run a study: arms that differ in what its file says, with several seeds, and compare them.

    python run_study.py studies/lora_rank.json --quick

Stages that arms have in common are run once; what is finished is not run again, and what was
interrupted goes on. Ends with results.csv, results.md and pictures in results/studies/NAME.
"""

from arithmetic_llm.cli import parse, run_main
from arithmetic_llm.config import StudyConfig


def main(argv=None):
    config = parse(StudyConfig, argv, __doc__)
    from arithmetic_llm.study.study import study_from

    return study_from(config)


if __name__ == "__main__":
    run_main(main)
