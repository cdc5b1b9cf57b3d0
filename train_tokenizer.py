"""Train the BPE tokenizer on a corpus.

python train_tokenizer.py --corpus-path data/foundational_corpus.txt
"""

from arithmetic_llm.cli import parse, run_main
from arithmetic_llm.config import TokenizerConfig


def main(argv=None):
    config = parse(TokenizerConfig, argv, __doc__)
    from arithmetic_llm.corpus.files import read_corpus
    from arithmetic_llm.model.tokenizer import ArithmeticTokenizer

    texts = (record.sequence for record in read_corpus(config.corpus_path))
    tokenizer = ArithmeticTokenizer.train(texts, config.vocab_size, config.digits)
    path = tokenizer.save(config.output_dir)
    print(f"{tokenizer.vocab_size} tokens (at most {config.vocab_size} were allowed) in {path}")


if __name__ == "__main__":
    run_main(main)
