"""Solve expressions that you type, step by step, each step checked.

python run_interactive.py --model-path models/instruction_YYYYMMDD_HHMMSS/best_model.pt
"""

from arithmetic_llm.cli import parse, run_main
from arithmetic_llm.config import InteractiveConfig


def main(argv=None):
    config = parse(InteractiveConfig, argv, __doc__)
    from arithmetic_llm.evaluation import interactive
    from arithmetic_llm.evaluation.solver import ArithmeticSolver

    interactive.run(ArithmeticSolver.from_config(config))


if __name__ == "__main__":
    run_main(main)
