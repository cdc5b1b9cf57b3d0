"""Evaluate a checkpoint on problems that it has not seen.

    python run_evaluation.py --model-path models/instruction_YYYYMMDD_HHMMSS/best_model.pt \\
        --num-samples 1000 --max-depth 4
"""

from arithmetic_llm.cli import parse, run_main
from arithmetic_llm.config import EvaluationConfig
from arithmetic_llm.distributed import is_main, launch, to_launch


def main(argv=None):
    config = parse(EvaluationConfig, argv, __doc__)
    if to_launch(config.processes):
        return launch(config.processes, __file__, argv)
    from arithmetic_llm.evaluation.evaluate import evaluate_checkpoint, prepare_folder, save
    from arithmetic_llm.evaluation.report import summary_text
    from arithmetic_llm.folders import resolve_stamp

    folder = prepare_folder(resolve_stamp(config.output_dir))
    result = evaluate_checkpoint(config)
    if not is_main():
        return
    summary = summary_text(result.metrics)
    paths = save(result, summary, folder)
    print(summary)
    for what, path in paths.items():
        print(f"{what:<8} {path}")


if __name__ == "__main__":
    run_main(main, parallel=True)
