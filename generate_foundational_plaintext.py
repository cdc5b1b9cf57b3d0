"""Make the foundational corpus: two plain lines a sample, the problem and then its solution.

    python generate_foundational_plaintext.py --num-samples 100000 --max-depth 4 \\
        --output-txt data/foundational_corpus.txt
"""

from arithmetic_llm.cli import parse, run_main
from arithmetic_llm.config import PlainTextCorpusConfig
from arithmetic_llm.corpus.files import make_corpus, plain_lines


def main(argv=None):
    config = parse(PlainTextCorpusConfig, argv, __doc__)
    make_corpus(config, config.output_txt, plain_lines)


if __name__ == "__main__":
    run_main(main)
