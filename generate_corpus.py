"""Make a foundational corpus (plain text), an instruction corpus (JSON Lines), or both.

    python generate_corpus.py --instruction-only --split test --num-samples 1000 --max-depth 4 \\
        --invalid-rate 0 --output-instruction data/instruction_corpus_test.txt

A flag that is given holds for both corpora.
"""

from dataclasses import dataclass, fields

from arithmetic_llm.cli import default_of, like, opt, parse, run_main
from arithmetic_llm.corpus.files import (
    CorpusConfig,
    FoundationalCorpusConfig,
    json_line,
    make_corpus,
    plain_lines,
)
from arithmetic_llm.runtime import UserError


def _of_each(name):
    """A rate that each corpus has a default of its own for."""
    foundational, instruction = (
        default_of(kind.__dataclass_fields__[name], [kind])
        for kind in (FoundationalCorpusConfig, CorpusConfig)
    )
    same = foundational == instruction
    unset = instruction if same else f"{instruction}; in the foundational corpus {foundational}"
    return like(CorpusConfig, name, None, unset=unset)


@dataclass(frozen=True, kw_only=True)
class Config(CorpusConfig):
    """Corpora."""

    typed_rate: float | None = _of_each("typed_rate")
    padded_rate: float | None = _of_each("padded_rate")
    flat_rate: float | None = _of_each("flat_rate")
    drill_rate: float | None = _of_each("drill_rate")
    output_foundational: str = opt(
        "data/foundational_corpus.txt",
        "the plain-text file to write",
        needs=[{"instruction_only": False}],
    )
    output_instruction: str = opt(
        "data/instruction_corpus.txt",
        "the JSON Lines file to write",
        needs=[{"foundational_only": False}],
    )
    foundational_only: bool = opt(False, "write only the foundational corpus")
    instruction_only: bool = opt(False, "write only the instruction corpus")

    def __post_init__(self):
        if self.foundational_only and self.instruction_only:
            raise UserError("--foundational-only and --instruction-only leave nothing to write")
        both = not (self.foundational_only or self.instruction_only)
        if both and self.output_foundational == self.output_instruction:
            raise UserError(f"{self.output_instruction}: both corpora cannot go to one file")
        if not self.instruction_only:
            self.of(FoundationalCorpusConfig)
        if not self.foundational_only:
            self.of(CorpusConfig)

    def of(self, kind):
        """The settings of one kind of corpus, with its own defaults for what is not given."""
        values = {field.name: getattr(self, field.name) for field in fields(kind)}
        return kind(**{name: value for name, value in values.items() if value is not None})


def main(argv=None):
    config = parse(Config, argv, __doc__)
    if not config.instruction_only:
        make_corpus(config.of(FoundationalCorpusConfig), config.output_foundational, plain_lines)
    if not config.foundational_only:
        make_corpus(config.of(CorpusConfig), config.output_instruction, json_line)


if __name__ == "__main__":
    run_main(main)
