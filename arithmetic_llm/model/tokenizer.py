"""Byte-pair encoding for arithmetic: text to token ids and back, without losing a character.

The tokenizer is the ``tokenizers`` library's BPE in its own JSON file; this module only decides how
text is cut *before* merging, because that decides what the model must learn:

* every digit stands alone: ``137`` is three tokens, so carrying is one rule and not a table;
* and it is a token of its own for each place, the units first: ``137`` is ``7 3₁ 1₂``, see
  `numerals`. Marks and order exist inside the tokenizer alone: its normalizer puts them in, its
  decoder takes them out (on request digits stand as people write them, have no marks, or merge, to
  see what that does);
* a binary operator takes its two spaces along (``" + "``), a sign stays a bare ``"-"``; the model
  sees at once which of the two it reads;
* every other run of characters may merge into one token: ``" Step "``, ``" Expression now: "``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from arithmetic_llm.model.numerals import MARKS, PLACED, SPELLINGS, UNMARKED, Spelling
from arithmetic_llm.runtime import UserError, atomic_write_text, require_file
from arithmetic_llm.task.text import CLOSE, OPEN, SPECIAL_TOKENS, prompt_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, UNK, BOS, EOS, THINK, END_THINK = range(len(SPECIAL_TOKENS))

FILE_NAME = "tokenizer.json"
# Order matters: the first alternative that matches at a position wins.
PIECES = r"{digits}| [+\-] |[+\-()]|[^0-9+\-()]+?(?= [+\-] |[0-9+\-()]|$)"
Digits = Literal["reversed", "places", "alone", "merged"]
_WITH_MARK = f"[0-9][{MARKS}]?"
DIGITS = {"reversed": _WITH_MARK, "places": _WITH_MARK, "alone": "[0-9]", "merged": "[0-9]+"}
# For `_words`: what stands between words, and operators, each one letter for the time being.
_BETWEEN, _OPERATORS = "\0", {" + ": "\1", " - ": "\2"}
_ALONE = dict.fromkeys(map(ord, "0123456789+-()"), _BETWEEN)
_NUMBERS = re.compile("([0-9]+)")
PRINTABLE_ASCII = [chr(code) for code in range(32, 127)]
_PLACE_TOKENS = (*MARKS, *map("".join, PLACED))
SMALLEST_VOCAB = len(SPECIAL_TOKENS) + len(PRINTABLE_ASCII)  # without merges and places


def _words(text: str, digits: Digits) -> str:
    """The `PIECES` of a text that have something to merge, a zero character between them.

    Cutting by the library's regular expression would take most of the time of training. Nor does
    its trainer know special tokens: left in, ``</think> Final`` would become one word.
    """
    text = text.replace(OPEN, _BETWEEN).replace(CLOSE, _BETWEEN)
    for operator, letter in _OPERATORS.items():
        text = text.replace(operator, f"{_BETWEEN}{letter}{_BETWEEN}")
    numbers = _NUMBERS.findall(text) if digits == "merged" else []
    text = _BETWEEN.join([text.translate(_ALONE), *numbers])
    for operator, letter in _OPERATORS.items():
        text = text.replace(letter, operator)
    return text


def _spelled(tokenizer: Tokenizer, spelling: Spelling) -> str:
    """A tokenizer of bare digits, as one that has a token for each digit and place.

    All of them, whatever the corpus: a number may become longer than any that was learned from.
    """
    said = json.loads(tokenizer.to_str())
    first = len(said["model"]["vocab"])
    said["model"]["vocab"] |= {token: first + i for i, token in enumerate(_PLACE_TOKENS)}
    said["model"]["merges"] += PLACED
    said |= {"normalizer": spelling.normalizer(), "decoder": spelling.decoder()}
    return type(tokenizer).from_str(json.dumps(said)).to_str()


def _spelling_of(serialized: str) -> Spelling | None:
    """What the rules of a tokenizer's file come to, if they are ours."""
    said = json.loads(serialized)
    rules = said.get("normalizer"), said.get("decoder")
    ours = (each for each in SPELLINGS.values() if (each.normalizer(), each.decoder()) == rules)
    return next(ours, None)


class ArithmeticTokenizer:
    """A trained tokenizer. ``decode(encode(text)) == text`` for all printable ASCII text."""

    def __init__(self, serialized: str):
        from tokenizers import Tokenizer, decoders

        try:
            self._tokenizer = Tokenizer.from_str(serialized)
        except BaseException as error:  # the Rust side raises bare Exception, or panics
            if isinstance(error, KeyboardInterrupt):
                raise
            raise ValueError(f"not a tokenizer ({str(error).splitlines()[0]})") from None
        ids = [self._tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
        if ids != list(range(len(SPECIAL_TOKENS))):
            raise ValueError(f"special tokens {SPECIAL_TOKENS} must have ids 0 to 5, not {ids}")
        self.serialized = serialized
        self._spelling = _spelling_of(serialized)
        if self._spelling:  # in place of its rules, which take much longer
            self._tokenizer.normalizer, self._tokenizer.decoder = None, decoders.Fuse()

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, digits: Digits = "reversed"
    ) -> ArithmeticTokenizer:
        """Learn merges from ``texts``; ``vocab_size`` is an upper bound on the result's size.

        Args:
            digits: a token for each digit and place, the units first or last; for each digit; or
                for frequent numbers.

        Raises:
            UserError: ``vocab_size`` leaves no room for the special tokens and printable ASCII, and
                for the digits of each place if there are to be such.
        """
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
        from tokenizers.trainers import BpeTrainer

        spelling = SPELLINGS.get(digits)
        places = len(_PLACE_TOKENS) if spelling else 0
        if vocab_size < (least := SMALLEST_VOCAB + places):
            raise UserError(f"--vocab-size {vocab_size}: must be at least {least}")
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(_BETWEEN)
        tokenizer.decoder = decoders.Fuse()
        trainer = BpeTrainer(
            vocab_size=vocab_size - places,  # which come later
            show_progress=False,
            special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
            initial_alphabet=PRINTABLE_ASCII,
        )
        tokenizer.train_from_iterator((_words(text, digits) for text in texts), trainer)
        pieces = Regex(PIECES.format(digits=DIGITS[digits]))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, "isolated")
        return cls(_spelled(tokenizer, spelling) if spelling else tokenizer.to_str())

    @classmethod
    def load(cls, path: str | Path) -> ArithmeticTokenizer:
        """Load a directory, a ``tokenizer.json``, or the documented ``tokenizer.pkl`` beside one.

        Raises:
            UserError: nothing there, or not a tokenizer of this package.
        """
        path = Path(path)
        if path.name == "tokenizer.pkl":  # the manual's old name; no pickle is ever opened
            path = path.with_name(FILE_NAME)
        elif path.is_dir() or not path.suffix:
            path = path / FILE_NAME
        path = require_file(path, "tokenizer")
        try:
            return cls(path.read_text(encoding="utf-8"))
        except (ValueError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: {error}; train one with train_tokenizer.py") from None

    def save(self, directory: str | Path) -> Path:
        """Write ``tokenizer.json``, which the wider ecosystem loads as it is."""
        path = Path(directory) / FILE_NAME
        atomic_write_text(path, self.serialized)
        return path

    @property
    def vocab_size(self) -> int:
        """The real number of tokens."""
        return self._tokenizer.get_vocab_size()

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the tokenizer's content, whatever the white space of its file."""
        canonical = json.dumps(json.loads(self.serialized), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; ``<think>`` and its kin become their one id each."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``[encode(text) for text in texts]``, in parallel."""
        if self._spelling:
            texts = [self._spelling.encoded(text) for text in texts]
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens included."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return self._spelling.decoded(text) if self._spelling else text

    def decode_completion(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` but for a last ``<eos>``; any other special token is shown."""
        return self.decode(ids[:-1] if ids and ids[-1] == EOS else ids)

    @cached_property
    def units_first(self) -> bool:
        """Whether the tokens of a number stand in another order than its digits."""
        return self.token(self.encode("12")[0]) == "2"

    def settled(self, ids: Sequence[int]) -> int:
        """How many of ``ids`` have a text that stays: all but the digits of a last number.

        Its next digit might be one that text has before them.
        """
        end = len(ids)
        while end and self.kind(ids[end - 1]) == "digit":
            end -= 1
        return end

    def token(self, token_id: int) -> str:
        """The text of one token."""
        return self.name(token_id).translate(UNMARKED)

    def name(self, token_id: int) -> str:
        """What the vocabulary calls a token: its text or, of a digit beyond the units, ``7₂``."""
        return self._tokenizer.id_to_token(token_id)

    @cached_property
    def composed(self) -> dict[int, tuple[int, int]]:
        """The tokens of a digit and its mark, ``7₂``, with those of ``7`` and ``₂`` alone."""
        number = self._tokenizer.get_vocab()
        pairs = [pair for pair in PLACED if "".join(pair) in number]
        return {number["".join(pair)]: (number[pair[0]], number[pair[1]]) for pair in pairs}

    def kind(self, token_id: int) -> str:
        """``special``, ``digit``, ``operator``, ``parenthesis`` or ``text``."""
        if token_id < len(SPECIAL_TOKENS):
            return "special"
        text = self.token(token_id).strip()
        if text.isdigit():
            return "digit"
        return {"+": "operator", "-": "operator", "(": "parenthesis", ")": "parenthesis"}.get(
            text, "text"
        )

    def prompt_ids(self, expression: str) -> list[int]:
        """``<bos> Evaluate: E <think>``: what the model is given; it writes from there."""
        return [BOS, *self.encode(prompt_text(expression))]
