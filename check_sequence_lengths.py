"""Token lengths of a corpus by depth: percentiles, what exceeds a context, and a recommended one.

    python check_sequence_lengths.py --corpus-path data/instruction_corpus.txt \\
        --tokenizer-path data/tokenizer
"""

from collections import defaultdict

from arithmetic_llm.cli import parse, run_main
from arithmetic_llm.config import SequenceLengthsConfig

PERCENTILES = (50, 90, 99, 100)


def main(argv=None):
    config = parse(SequenceLengthsConfig, argv, __doc__)
    lengths = lengths_by_depth(config.corpus_path, config.tokenizer_path)
    print(table(lengths, config.max_seq_length))
    longest = max(max(row) for row in lengths.values())
    print(f"\nthe longest sample has {longest}; recommended: --max-seq-length {recommend(longest)}")


def lengths_by_depth(corpus_path, tokenizer_path):
    """Depth (or "invalid", "rewrite") -> token counts, ``<bos>`` and ``<eos>`` included."""
    from arithmetic_llm.corpus.files import read_corpus
    from arithmetic_llm.model.tokenizer import ArithmeticTokenizer

    tokenizer = ArithmeticTokenizer.load(tokenizer_path)
    lengths = defaultdict(list)
    for record in read_corpus(corpus_path):
        tokens = len(tokenizer.encode(record.sequence))
        if record.is_problem:
            lengths[row_name(record.expression)].append(tokens + 2)
        else:
            lengths["rewrite"].append(tokens + 1)  # nothing ends with it
    return lengths


def row_name(expression):
    """What a sample is counted under; a flat sum's depth is only its number of terms less one."""
    from arithmetic_llm.task.expression import ExpressionError, parse

    try:
        tree = parse(expression)
    except ExpressionError:
        return "invalid"
    return "flat" if tree.is_flat else str(tree.depth)


def table(lengths, context):
    """One row a depth: samples, percentiles of the length, and how many exceed the context."""
    import numpy as np

    heads = ["depth", "samples", *(f"p{p}" for p in PERCENTILES), f"> {context}"]
    rows = [heads]
    for name in sorted(lengths, key=lambda name: (not name.isdigit(), len(name), name)):
        values = np.array(lengths[name])
        ranks = np.percentile(values, PERCENTILES, method="higher")
        rows.append([name, len(values), *ranks, int((values > context).sum())])
    return "\n".join("".join(f"{cell!s:>10}" for cell in row) for row in rows)


def recommend(longest):
    """The next multiple of 64: room for the longest sample and little more."""
    return -(-longest // 64) * 64


if __name__ == "__main__":
    run_main(main)
