"""Solve expressions that you type, step by step, each step checked.

python run_interactive.py --model-path models/instruction_YYYYMMDD_HHMMSS/best_model.pt
"""

from dataclasses import dataclass

from arithmetic_llm.cli import opt, parse, run_main


@dataclass(frozen=True)
class Config:
    """Interactive solver."""

    model_path: str = opt("", "checkpoint of any stage, adapters included", required=True)
    base_checkpoint: str = opt("", "where the base is, if model_path is an adapter")
    tokenizer_path: str = opt(
        "", "tokenizer directory; not needed, but if given it must be the checkpoint's own"
    )
    max_gen_length: int = opt(
        0, "most new tokens of a solution; 0 = enough for a right one and some more", at_least=0
    )
    device: str = opt("auto", "cpu, cuda, cuda:N, mps or auto")


def main(argv=None):
    config = parse(Config, argv, __doc__)
    from arithmetic_llm.evaluation import interactive
    from arithmetic_llm.evaluation.solver import ArithmeticSolver

    solver = ArithmeticSolver.from_checkpoint(
        config.model_path,
        config.device,
        config.tokenizer_path,
        config.base_checkpoint,
        max_new_tokens=config.max_gen_length,
    )
    interactive.run(solver)


if __name__ == "__main__":
    run_main(main)
