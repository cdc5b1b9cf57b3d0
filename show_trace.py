"""Show one solution from the inside: each token's probability, and where each head looked.

    python show_trace.py --model-path models/instruction_YYYYMMDD_HHMMSS/best_model.pt \\
        "5 + (10 - 3)"

The page is one file, which any browser opens without a network.
"""

from arithmetic_llm.cli import parse, run_main
from arithmetic_llm.config import ShowTraceConfig


def main(argv=None):
    config = parse(ShowTraceConfig, argv, __doc__)
    from arithmetic_llm.evaluation.solver import ArithmeticSolver
    from arithmetic_llm.evaluation.trace import record_trace
    from arithmetic_llm.evaluation.trace_page import trace_page
    from arithmetic_llm.folders import resolve_paths
    from arithmetic_llm.runtime import atomic_write_text

    config = resolve_paths(config)
    solver = ArithmeticSolver.from_config(config)
    expression = config.expression.strip()
    trace = record_trace(solver, expression)
    notes = [f"Note: {warning}." for warning in solver.warnings(expression)]
    if solver.tokenizer.units_first:
        notes.append("The model reads and writes the units of a number first: its 3 2 7 is 723.")
    atomic_write_text(config.output, trace_page(trace, config.model_path, notes))
    print(f"trace in {config.output}")


if __name__ == "__main__":
    run_main(main)
