"""Make a foundational corpus (plain text), an instruction corpus (JSON Lines), or both.

    python generate_corpus.py --instruction-only --split test --num-samples 1000 --max-depth 4 \\
        --invalid-rate 0 --output-instruction data/instruction_corpus_test.txt

A flag that is given holds for both corpora.
"""

from arithmetic_llm.cli import parse, run_main
from arithmetic_llm.config import BothCorporaConfig, CorpusConfig, FoundationalCorpusConfig
from arithmetic_llm.corpus.files import json_line, make_corpus, plain_lines


def main(argv=None):
    config = parse(BothCorporaConfig, argv, __doc__)
    if not config.instruction_only:
        make_corpus(config.of(FoundationalCorpusConfig), config.output_foundational, plain_lines)
    if not config.foundational_only:
        make_corpus(config.of(CorpusConfig), config.output_instruction, json_line)


if __name__ == "__main__":
    run_main(main)
