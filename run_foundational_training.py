"""Train the foundational model.

    python run_foundational_training.py --corpus-path data/foundational_corpus.txt \\
        --tokenizer-path data/tokenizer
"""

from arithmetic_llm.cli import run_main
from arithmetic_llm.config import FoundationalConfig, ModelConfig
from arithmetic_llm.distributed import launch, to_launch
from arithmetic_llm.folders import parse_run


def main(argv=None):
    sections = {"config": FoundationalConfig, "model_config": ModelConfig}
    config, shape = parse_run(sections, argv, __doc__)
    if to_launch(config.processes, bool(config.resume)):
        return launch(config.processes, __file__, argv)
    from arithmetic_llm.training.supervised import train_foundational

    train_foundational(config, shape)


if __name__ == "__main__":
    run_main(main, parallel=True)
