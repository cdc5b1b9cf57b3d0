"""Make an instruction corpus of valid and invalid expressions: JSON Lines, one sample a line.

    python generate_instruction_corpus_mixed.py --num-samples 20000 --max-depth 4 \\
        --invalid-rate 0 --output-mixed data/instruction_corpus.txt
"""

from arithmetic_llm.cli import parse, run_main
from arithmetic_llm.config import MixedCorpusConfig
from arithmetic_llm.corpus.files import json_line, make_corpus


def main(argv=None):
    config = parse(MixedCorpusConfig, argv, __doc__)
    make_corpus(config, config.output_mixed, json_line)


if __name__ == "__main__":
    run_main(main)
