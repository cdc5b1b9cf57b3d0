"""Fine-tune a foundational model to answer prompts with reasoning.

    python run_instruction_training.py --instruction-corpus-path data/instruction_corpus.txt \\
        --tokenizer-path data/tokenizer \\
        --foundational-checkpoint models/foundational_YYYYMMDD_HHMMSS/best_model.pt
"""

from arithmetic_llm.cli import run_main
from arithmetic_llm.config import InstructionConfig
from arithmetic_llm.distributed import launch, to_launch
from arithmetic_llm.folders import parse_run


def main(argv=None):
    (config,) = parse_run({"config": InstructionConfig}, argv, __doc__)
    if to_launch(config.processes, bool(config.resume)):
        return launch(config.processes, __file__, argv)
    from arithmetic_llm.training.supervised import train_instruction

    train_instruction(config)


if __name__ == "__main__":
    run_main(main, parallel=True)
