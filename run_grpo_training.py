"""Group relative policy optimization: the model learns from its own attempts.

    python run_grpo_training.py --tokenizer data/tokenizer \\
        --sft-checkpoint models/instruction_YYYYMMDD_HHMMSS/best_model.pt \\
        --data-mode generated --num-samples 1024 --num-candidates 8 --batch-size 16
"""

from arithmetic_llm.cli import run_main
from arithmetic_llm.config import GRPOConfig
from arithmetic_llm.distributed import launch, to_launch
from arithmetic_llm.folders import parse_run


def main(argv=None):
    (config,) = parse_run({"config": GRPOConfig}, argv, __doc__)
    if to_launch(config.processes, bool(config.resume)):
        return launch(config.processes, __file__, argv)
    from arithmetic_llm.grpo.stage import train_grpo

    train_grpo(config)


if __name__ == "__main__":
    run_main(main, parallel=True)
