"""Print the vocabulary as CSV: id, token, kind, and the count in a corpus if one is given.

python print_token_table.py --tokenizer-path data/tokenizer > tokens.csv
"""

import csv
import sys
from collections import Counter

from arithmetic_llm.cli import parse, run_main
from arithmetic_llm.config import TokenTableConfig


def main(argv=None):
    config = parse(TokenTableConfig, argv, __doc__)
    from arithmetic_llm.model.tokenizer import ArithmeticTokenizer

    tokenizer = ArithmeticTokenizer.load(config.tokenizer_path)
    counts = count_tokens(tokenizer, config.corpus_path) if config.corpus_path else None
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["id", "token", "kind"] + ([] if counts is None else ["count"]))
    for token_id in range(tokenizer.vocab_size):
        row = [token_id, tokenizer.name(token_id), tokenizer.kind(token_id)]
        table.writerow(row if counts is None else [*row, counts[token_id]])


def count_tokens(tokenizer, corpus_path):
    from arithmetic_llm.corpus.files import read_corpus

    counts = Counter()
    for record in read_corpus(corpus_path):
        counts.update(tokenizer.encode(record.sequence))
    return counts


if __name__ == "__main__":
    run_main(main)
