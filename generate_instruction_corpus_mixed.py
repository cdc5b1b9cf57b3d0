"""Make an instruction corpus of valid and invalid expressions: JSON Lines, one sample a line.

    python generate_instruction_corpus_mixed.py --num-samples 20000 --max-depth 4 \\
        --invalid-rate 0 --output-mixed data/instruction_corpus.txt
"""

from dataclasses import dataclass

from arithmetic_llm.cli import opt, parse, run_main
from arithmetic_llm.corpus.files import CorpusConfig, json_line, make_corpus


@dataclass(frozen=True, kw_only=True)
class Config(CorpusConfig):
    """Instruction corpus."""

    output_mixed: str = opt("data/instruction_corpus.txt", "the corpus file to write")


def main(argv=None):
    config = parse(Config, argv, __doc__)
    make_corpus(config, config.output_mixed, json_line)


if __name__ == "__main__":
    run_main(main)
