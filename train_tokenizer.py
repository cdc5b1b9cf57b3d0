"""Train the BPE tokenizer on a corpus.

python train_tokenizer.py --corpus-path data/foundational_corpus.txt
"""

from dataclasses import dataclass

from arithmetic_llm.cli import opt, parse, run_main


@dataclass(frozen=True)
class Config:
    """Tokenizer training."""

    corpus_path: str = opt("", "corpus to learn merges from (either format)", required=True)
    vocab_size: int = opt(1000, "upper bound on the number of tokens", at_least=1)
    output_dir: str = opt("data/tokenizer", "directory for tokenizer.json")


def main(argv=None):
    config = parse(Config, argv, __doc__)
    from arithmetic_llm.corpus.files import read_corpus
    from arithmetic_llm.model.tokenizer import ArithmeticTokenizer
    from arithmetic_llm.training.batches import sequence_text

    texts = (sequence_text(record) for record in read_corpus(config.corpus_path))
    tokenizer = ArithmeticTokenizer.train(texts, config.vocab_size)
    path = tokenizer.save(config.output_dir)
    print(f"{tokenizer.vocab_size} tokens (at most {config.vocab_size} were allowed) in {path}")


if __name__ == "__main__":
    run_main(main)
