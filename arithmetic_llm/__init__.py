"""The whole life of a language model, small enough for a laptop: arithmetic, step by step.

    from arithmetic_llm import ArithmeticSolver

Importing the package imports nothing else; torch comes with the first name that needs it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arithmetic_llm.evaluation.solver import ArithmeticSolver

__all__ = ["ArithmeticSolver"]


def __getattr__(name: str) -> Any:
    if name == "ArithmeticSolver":
        from arithmetic_llm.evaluation.solver import ArithmeticSolver

        return ArithmeticSolver
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
