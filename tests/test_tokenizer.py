"""The tokenizer: nothing is lost, digits stay single, and others read the same file alike."""

import json
import re

import pytest
from helpers import call, make_tokenizer, records
from hypothesis import example, given
from hypothesis import strategies as st

from arithmetic_llm.model.tokenizer import (
    BOS,
    EOS,
    PAD,
    THINK,
    UNK,
    ArithmeticTokenizer,
)
from arithmetic_llm.runtime import UserError
from arithmetic_llm.task.solution import solve
from arithmetic_llm.task.text import SPECIAL_TOKENS, one_line

TOKENIZER = make_tokenizer()
PLACES, ALONE, MERGED = (make_tokenizer(digits=name) for name in ("places", "alone", "merged"))
# 6 special tokens and printable ASCII; four marks, and ten digits of four places
SMALLEST_OF = {"reversed": 145, "places": 6 + 95 + 4 + 40, "alone": 6 + 95, "merged": 6 + 95}
SMALLEST = make_tokenizer(SMALLEST_OF["alone"], "alone")
ALL = {
    "reversed": TOKENIZER,
    "places": PLACES,
    "alone": ALONE,
    "merged": MERGED,
    "no merges": SMALLEST,
}
TEXTS = [record.sequence for record in records(300, seed=1, num_range=(-50, 200))]

ascii_text = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60)
# Near misses of the task's own language, special tokens included.
task_like = st.lists(
    st.sampled_from([*"0123456789+-() ", " + ", " - ", *SPECIAL_TOKENS, "Step ", ": ", " = "])
).map("".join)


@pytest.fixture(scope="module", params=["reversed", "places", "alone", "merged"])
def two_readers(request, tmp_path_factory):
    """A tokenizer, and what transformers makes of its file."""
    from transformers import PreTrainedTokenizerFast

    path = ALL[request.param].save(tmp_path_factory.mktemp("tokenizer"))
    return ALL[request.param], PreTrainedTokenizerFast(tokenizer_file=str(path))


# ---------------------------------------------------------------------------------- lossless


@pytest.mark.parametrize("tokenizer", ALL.values(), ids=ALL)
def test_every_text_of_the_task_survives(tokenizer):
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(ascii_text | task_like)
@example(" ")
@example("1 + 2  +  3 - -4")
@example("<think><bos> </think>")
def test_printable_ascii_survives(text):
    for tokenizer in (TOKENIZER, PLACES, ALONE):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_character_without_a_token_becomes_unk():
    assert TOKENIZER.encode("5\u00d73") == [*TOKENIZER.encode("5"), UNK, *TOKENIZER.encode("3")]


def test_encode_batch_is_encode_of_each():
    assert TOKENIZER.encode_batch(TEXTS[:20]) == [TOKENIZER.encode(text) for text in TEXTS[:20]]


@pytest.mark.parametrize("digits", ["alone", "merged"])
def test_training_cuts_text_as_the_file_says(digits):
    """The trainer with its own regular expression writes the same file, byte for byte."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.trainers import BpeTrainer

    ours = make_tokenizer(digits=digits)
    plain = Tokenizer.from_str(make_tokenizer(SMALLEST_OF[digits], digits).serialized)
    trainer = BpeTrainer(
        vocab_size=ours.vocab_size,
        show_progress=False,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=[chr(code) for code in range(32, 127)],
    )
    texts = (re.split("</?think>", record.sequence) for record in records())
    plain.train_from_iterator(texts, trainer)
    assert plain.to_str() == ours.serialized


# ----------------------------------------------------------------------------- transformers


def test_transformers_reads_the_same_ids_from_the_file(two_readers):
    ours, theirs = two_readers
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text)


@given(text=ascii_text | task_like)
def test_transformers_agrees_on_any_ascii(two_readers, text):
    ours, theirs = two_readers
    ids = ours.encode(text)
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text


# -------------------------------------------------------------------------------- the tokens


def test_special_tokens_have_ids_0_to_5():
    assert [TOKENIZER.encode(token) for token in SPECIAL_TOKENS] == [[i] for i in range(6)]
    assert [TOKENIZER.kind(i) for i in range(7)] == ["special"] * 6 + ["text"]


def test_no_token_holds_a_digit_or_an_operator_beside_anything_but_its_spaces():
    for token_id in range(len(SPECIAL_TOKENS), TOKENIZER.vocab_size):
        token = TOKENIZER.token(token_id)
        if re.search(r"[0-9+\-()]", token):
            assert re.fullmatch(r"[0-9()]| ?[+\-] ?", token), token


@given(st.integers(0, 10**9))
@example(10**9)
def test_a_digit_is_another_token_in_each_place(number):
    """The reference: powers of ten, the highest mark for all from the ten thousands on."""
    marks = [*"₄" * 6, "₃", "₂", "₁", ""][-len(str(number)) :]
    named = [digit + mark for digit, mark in zip(str(number), marks, strict=True)]
    turned = named[:-5] + named[-5:][::-1]  # the last five, the units first
    for before, after in (("", ""), ("(-", ") + 4"), (" Step ", ": 12"), ("10 - ", " ")):
        for tokenizer, wanted in ((PLACES, named), (TOKENIZER, turned)):
            names = [tokenizer.name(i) for i in tokenizer.encode(f"{before}{number}{after}")]
            start = len(tokenizer.encode(before))
            assert names[start : start + len(wanted)] == wanted


def test_a_digits_place_is_composed_of_the_digit_and_the_mark():
    told = {
        TOKENIZER.name(token): "".join(map(TOKENIZER.name, parts))
        for token, parts in TOKENIZER.composed.items()
    }
    assert told == {f"{d}{m}": f"{d}{m}" for d in "0123456789" for m in "₁₂₃₄"}
    assert ALONE.composed == MERGED.composed == {}


def test_but_for_its_digits_a_tokenizer_of_places_is_one_of_bare_digits():
    for text in [*TEXTS, "12 - (-7 + 100) 5 6"]:
        bare = [ALONE.token(i) for i in ALONE.encode(text)]
        assert [PLACES.token(i) for i in PLACES.encode(text)] == bare
        turned = re.sub("[0-9]+", lambda number: number[0][::-1], text)
        assert "".join(TOKENIZER.token(i) for i in TOKENIZER.encode(text)) == turned


@pytest.mark.parametrize("digits", ["reversed", "places"])
@given(ids=st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=30))
@example(ids=TOKENIZER.encode("12345 678 9") * 2)
def test_what_no_text_is_encoded_as_is_read_alike_by_the_library(digits, ids):
    """Marks out of order, bare marks, digits beside digits: whatever a model may write."""
    from tokenizers import Tokenizer

    ours = ALL[digits]
    library = Tokenizer.from_str(ours.serialized)
    assert ours.decode(ids) == library.decode(ids, skip_special_tokens=False)


@given(st.text("0123456789₁₂₄ -a", max_size=24))
@example("1234567890123")
@example("6₁5")
def test_the_library_spells_numbers_alike(text):
    from tokenizers import Tokenizer

    for ours in (TOKENIZER, PLACES):
        library = Tokenizer.from_str(ours.serialized)
        assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids


def test_rules_that_are_not_ours_are_run_as_the_file_has_them():
    said = json.loads(TOKENIZER.serialized)
    said["normalizer"]["normalizers"].append(
        {"type": "Replace", "pattern": {"String": "+"}, "content": "-"}
    )
    other = ArithmeticTokenizer(json.dumps(said))
    assert other.encode("71 + 2") == TOKENIZER.encode("71 - 2")
    assert other.decode(TOKENIZER.encode("71 + 2")) == "71 + 2"


@pytest.mark.parametrize(
    ("text", "settled"),
    [("", ""), ("12", ""), ("5 - 12", "5 - "), ("1 Step 12 ", "1 Step 12 "), ("= -12", "= -")],
)
def test_what_is_written_stays_but_for_a_last_number(text, settled):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids[: TOKENIZER.settled(ids)]) == settled


def test_every_place_has_its_digits_even_if_no_number_of_the_corpus_has_it():
    assert not any(re.search("[0-9]{5}", record.sequence) for record in records())
    assert [TOKENIZER.name(i) for i in TOKENIZER.encode("98765")] == ["5", "6₁", "7₂", "8₃", "9₄"]
    assert {f"{d}{mark}" for d in range(10) for mark in ("", *"₁₂₃₄")} <= {
        TOKENIZER.name(i) for i in range(TOKENIZER.vocab_size) if TOKENIZER.kind(i) == "digit"
    }


def test_a_mark_in_the_text_is_no_mark():
    assert TOKENIZER.encode("5₁3") == [*TOKENIZER.encode("5"), UNK, *TOKENIZER.encode("3")]


def test_digits_merge_into_numbers_on_request_and_with_nothing_else():
    ids = range(len(SPECIAL_TOKENS), MERGED.vocab_size)
    holding = [token for token in map(MERGED.token, ids) if re.search("[0-9]", token)]
    assert all(token.isdigit() for token in holding)
    assert {"10", "12"} <= {*holding}
    assert [MERGED.token(i) for i in MERGED.encode("12 - -7")] == ["12", " - ", "-", "7"]


def test_the_script_cuts_numbers_as_requested(tmp_path):
    lines = [json.dumps(record._asdict()) + "\n" for record in records()]
    (tmp_path / "c.txt").write_text("".join(lines))
    argv = ["--corpus-path", tmp_path / "c.txt", "--vocab-size", 400, "--output-dir", tmp_path]
    for name in ("reversed", "places", "alone", "merged"):
        assert call("train_tokenizer.py", *argv, "--digits", name).code == 0
        assert ArithmeticTokenizer.load(tmp_path).hash == ALL[name].hash
    assert call("train_tokenizer.py", *argv).code == 0
    assert ArithmeticTokenizer.load(tmp_path).hash == TOKENIZER.hash


def test_a_binary_operator_takes_its_spaces_and_a_sign_does_not():
    pieces = [TOKENIZER.token(i) for i in TOKENIZER.encode("(14 - -2) + 137")]
    assert pieces == ["(", "4", "1", " - ", "-", "2", ")", " + ", "7", "3", "1"]


def test_the_words_of_a_solution_are_single_tokens():
    text = one_line(solve("5 + (10 - 3)").text)
    tokens = [TOKENIZER.token(i) for i in TOKENIZER.encode(text)]
    assert {"<think>", " Step ", ": ", " = ", " Expression now: ", " Final Result: "} <= {*tokens}


def test_kinds():
    kinds = {TOKENIZER.token(i): TOKENIZER.kind(i) for i in range(TOKENIZER.vocab_size)}
    assert (kinds["7"], kinds[" + "], kinds["-"], kinds["("], kinds[" Step "]) == (
        "digit",
        "operator",
        "operator",
        "parenthesis",
        "text",
    )


def test_a_prompt_ends_with_think():
    ids = TOKENIZER.prompt_ids("5 + 3")
    assert (ids[0], ids[-1]) == (BOS, THINK)
    assert TOKENIZER.decode(ids[1:]) == "Evaluate: 5 + 3 <think>"


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        ([], [], "1 </think>"),
        ([], [EOS], "1 </think>"),
        ([], [EOS, EOS], "1 </think><eos>"),
        ([], [EOS, PAD], "1 </think><eos><pad>"),
        ([EOS], [], "<eos>1 </think>"),
        ([BOS, PAD, UNK, THINK], [EOS], "<bos><pad><unk><think>1 </think>"),
    ],
)
def test_a_completion_is_shown_whole_but_for_a_last_eos(before, after, text):
    assert TOKENIZER.decode_completion([*before, *TOKENIZER.encode("1 </think>"), *after]) == text


def test_the_completion_of_nothing_is_no_text():
    assert TOKENIZER.decode_completion([]) == TOKENIZER.decode_completion([EOS]) == ""


# ------------------------------------------------------------------------------- vocab size


@pytest.mark.parametrize("digits", SMALLEST_OF)
@pytest.mark.parametrize("more", [0, 10, 50, 100_000])
def test_vocab_size_is_an_upper_bound(digits, more):
    size = make_tokenizer(SMALLEST_OF[digits] + more, digits).vocab_size
    assert SMALLEST_OF[digits] <= size <= SMALLEST_OF[digits] + more


@pytest.mark.parametrize(("digits", "least"), SMALLEST_OF.items())
def test_a_vocab_without_room_for_ascii_and_places_is_refused(digits, least):
    with pytest.raises(UserError, match=f"at least {least}"):
        make_tokenizer(least - 1, digits)


def test_training_twice_gives_the_same_tokenizer():
    assert make_tokenizer().hash == TOKENIZER.hash != make_tokenizer(200).hash


# ------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("name", ["", "tokenizer.json", "tokenizer.pkl"])
def test_a_directory_its_file_and_the_old_pickle_name_all_load(tmp_path, name):
    TOKENIZER.save(tmp_path)
    assert ArithmeticTokenizer.load(tmp_path / name).hash == TOKENIZER.hash


def test_the_hash_does_not_depend_on_white_space(tmp_path):
    compact = json.dumps(json.loads(TOKENIZER.serialized), separators=(",", ":"))
    assert ArithmeticTokenizer(compact).hash == TOKENIZER.hash


def test_a_pickle_is_never_opened(tmp_path):
    TOKENIZER.save(tmp_path)
    (tmp_path / "tokenizer.pkl").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert ArithmeticTokenizer.load(tmp_path / "tokenizer.pkl").hash == TOKENIZER.hash


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"{}",
        b"[1, 2]",
        b"\xff\xfe\x00",
        b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
        TOKENIZER.serialized[:-200].encode(),
        TOKENIZER.serialized.replace("<think>", "<thunk>").encode(),
        b"[" * 100_000,
    ],
    ids=[
        "empty",
        "cut",
        "no keys",
        "a list",
        "not text",
        "no special tokens",
        "truncated",
        "other special tokens",
        "deeply nested",
    ],
)
def test_a_malformed_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json") as refusal:
        ArithmeticTokenizer.load(tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="no such tokenizer"):
        ArithmeticTokenizer.load(tmp_path / "nowhere")
