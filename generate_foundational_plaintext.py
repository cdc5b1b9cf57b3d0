"""Make the foundational corpus: two plain lines a sample, the problem and then its solution.

    python generate_foundational_plaintext.py --num-samples 100000 --max-depth 4 \\
        --output-txt data/foundational_corpus.txt
"""

from dataclasses import dataclass

from arithmetic_llm.cli import opt, parse, run_main
from arithmetic_llm.corpus.files import FoundationalCorpusConfig, make_corpus, plain_lines


@dataclass(frozen=True, kw_only=True)
class Config(FoundationalCorpusConfig):
    """Foundational corpus."""

    output_txt: str = opt("data/foundational_corpus.txt", "the corpus file to write")


def main(argv=None):
    config = parse(Config, argv, __doc__)
    make_corpus(config, config.output_txt, plain_lines)


if __name__ == "__main__":
    run_main(main)
