"""Make a foundational corpus (plain text), an instruction corpus (JSON Lines), or both.

    python generate_corpus.py --instruction-only --split test --num-samples 1000 --max-depth 4 \\
        --invalid-rate 0 --output-instruction data/instruction_corpus_test.txt

Defaults shown are the instruction corpus's; where the foundational one has others (typed, padded,
flat and drill rates) they are those of generate_foundational_plaintext.py. A rate that is given
holds for both.
"""

from dataclasses import dataclass

from arithmetic_llm.cli import opt, parse, run_main
from arithmetic_llm.corpus import (
    CorpusConfig,
    FoundationalCorpusConfig,
    json_line,
    make_corpus,
    plain_lines,
)
from arithmetic_llm.runtime import UserError


@dataclass(frozen=True, kw_only=True)
class InstructionConfig(CorpusConfig):
    """Corpora."""

    output_foundational: str = opt("data/foundational_corpus.txt", "the plain-text file to write")
    output_instruction: str = opt("data/instruction_corpus.txt", "the JSON Lines file to write")
    foundational_only: bool = opt(False, "write only the foundational corpus")
    instruction_only: bool = opt(False, "write only the instruction corpus")


@dataclass(frozen=True, kw_only=True)
class FoundationalConfig(FoundationalCorpusConfig, InstructionConfig):
    """The same flags with the foundational corpus's defaults."""


def main(argv=None):
    config = parse(InstructionConfig, argv, __doc__)
    foundational = parse(FoundationalConfig, argv, __doc__)
    if config.foundational_only and config.instruction_only:
        raise UserError("--foundational-only and --instruction-only leave nothing to write")
    if config.output_foundational == config.output_instruction:
        raise UserError(f"{config.output_instruction}: both corpora cannot go to one file")
    if not config.instruction_only:
        make_corpus(foundational, config.output_foundational, plain_lines)
    if not config.foundational_only:
        make_corpus(config, config.output_instruction, json_line)


if __name__ == "__main__":
    run_main(main)
