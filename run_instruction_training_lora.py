"""Fine-tune low-rank adapters on a frozen foundational model.

    python run_instruction_training_lora.py --instruction-corpus-path data/instruction_corpus.txt \\
        --tokenizer-path data/tokenizer \\
        --foundational-checkpoint models/foundational_YYYYMMDD_HHMMSS/best_model.pt \\
        --lora-rank 8 --lora-alpha 16 --lora-target-modules attention --save-merged-model
"""

from arithmetic_llm.cli import run_main
from arithmetic_llm.config import LoRAInstructionConfig
from arithmetic_llm.distributed import launch, to_launch
from arithmetic_llm.folders import parse_run


def main(argv=None):
    (config,) = parse_run({"config": LoRAInstructionConfig}, argv, __doc__)
    if to_launch(config.processes, bool(config.resume)):
        return launch(config.processes, __file__, argv)
    from arithmetic_llm.training.supervised import train_instruction_lora

    train_instruction_lora(config)


if __name__ == "__main__":
    run_main(main, parallel=True)
