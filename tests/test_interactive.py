"""The dialogue: the documented screen, character by character, and every way out of it."""

import codecs
import os
import re
import select
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from helpers import call, command, one_thread, run
from hypothesis import given
from hypothesis import strategies as st
from oracle import Oracle, right_answer, with_result

from arithmetic_llm.corpus.coverage import Coverage
from arithmetic_llm.evaluation.interactive import Typesetter, answer, explain, screen
from arithmetic_llm.evaluation.marks import PLAIN, SYMBOLS, marks_for
from arithmetic_llm.evaluation.solver import ArithmeticSolver
from arithmetic_llm.task.expression import ExpressionError, parse

MANUAL = """
------------------------------------------------------------
SOLUTION:
------------------------------------------------------------

Reasoning Steps:
  Step 1: 10 - 3 = 7
  Expression now: 5 + 7
  Step 2: 5 + 7 = 12
  Expression now: 12

Final Result: 12
------------------------------------------------------------
"""


def oracle_solver(tokenizer, answer=right_answer, **options):
    return ArithmeticSolver(Oracle(tokenizer, answer), tokenizer, **options)


def shown(tokenizer, expression, answer=right_answer, marks=SYMBOLS, **options):
    return "".join(screen(oracle_solver(tokenizer, answer, **options), expression, marks))


# ------------------------------------------------------------------------------- the screen


def test_the_screen_of_the_manual(tokenizer):
    text = shown(tokenizer, "5 + (10 - 3)")
    assert text.replace("  ✓", "").startswith(MANUAL)
    assert "Expression now: 5 + 7  ✓\n" in text
    assert text.endswith("\n✓ Right: the exact result is 12.\n\n")


def test_marks_stand_at_the_end_of_each_step(tokenizer):
    lines = shown(tokenizer, "(1 + 2) - (3 + 4)").splitlines()
    marked = [line for line in lines if line.endswith("✓")]
    assert marked == [line for line in lines if line.startswith("  Expression now:")]
    assert len(marked) == 3


def test_a_wrong_step_is_marked_with_what_is_wrong(tokenizer):
    wrong = (
        " Step 1: 10 - 3 = 7 Expression now: 5 - 7 "
        "Step 2: 5 - 7 = -3 Expression now: -3 </think> Final Result: -3"
    )
    text = shown(tokenizer, "5 + (10 - 3)", lambda _: wrong)
    assert "  Expression now: 5 - 7  ✗ wrongly copied\n" in text
    assert "  Expression now: -3  ✗ wrong result\n" in text
    assert "✗ Wrong: the exact result is 12." in text


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (3, "✓ Right: the exact result is 3."),
        (4, "✗ Wrong: the exact result is 3."),
        ("ERROR", "✗ Wrong: this is a valid expression, its result is 3."),
        ("?", "✗ No readable result; the exact one is 3."),
    ],
)
def test_the_result_is_compared_with_the_exact_one(tokenizer, result, words):
    text = shown(tokenizer, "1 + 2", lambda e: with_result(e, result))
    assert f"Final Result: {result}\n" in text
    assert text.endswith(f"{words}\n\n")


def test_a_right_result_by_a_wrong_way(tokenizer):
    lucky = " Step 1: 1 + 2 = 4 Expression now: 4 </think> Final Result: 3"
    text = shown(tokenizer, "1 + 2", lambda _: lucky)
    assert "✓ The result is right, 3; the way to it is not." in text


def test_a_text_that_is_cut_off_says_so(tokenizer):
    text = shown(tokenizer, "1 + 2", max_new_tokens=6)
    assert "✗ No readable result, stopped after 6 tokens; the exact one is 3." in text


def test_a_bare_number_has_no_steps(tokenizer):
    assert "Reasoning Steps:\n\nFinal Result: 7\n---" in shown(tokenizer, "7")


def test_deeper_than_trained_is_noted_and_solved(tokenizer):
    seen = Coverage({"nested": 1}, (1,), (), (1, 20), {"train": 1})
    solver = oracle_solver(tokenizer, trained_on=seen)
    text = "".join(answer(solver, "(1+2)-3", SYMBOLS))
    assert text.startswith("\nNote: depth 2; trained on depth 1.\n\n-----")
    assert "Right: the exact result is 0" in text


def test_longer_than_the_context_is_noted(tokenizer):
    solver = ArithmeticSolver(Oracle(tokenizer, context=20), tokenizer)
    text = "".join(screen(solver, "1 + 2", SYMBOLS))
    assert "Note: the text is longer than anything trained on (20 tokens)." in text


def test_too_long_an_expression_is_refused_in_a_line(tokenizer):
    text = "".join(answer(oracle_solver(tokenizer), "1 + " * 5000 + "1", SYMBOLS))
    assert "too long" in text
    assert "SOLUTION" not in text


TEXT = "Step 1: Expression now: Error: Final Result: </think> 12 - ( ) + 7 = xS E <th Steps F"
WORDS = st.sampled_from(TEXT.split())


class Stream:
    """Pieces that a model might write, with the judgement that follows them."""

    def __init__(self, pieces, steps=()):
        self.pieces, self.steps = pieces, steps

    def __iter__(self):
        yield from self.pieces
        return self


@given(st.lists(WORDS).map(" ".join), st.data())
def test_how_a_text_is_cut_into_pieces_changes_nothing(text, data):
    places = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]

    def typeset(pieces):
        return "".join(Typesetter("1 + 2", SYMBOLS).set(iter(Stream(pieces))))

    assert typeset(pieces) == typeset([text])


@given(st.lists(WORDS).map(" ".join))
def test_nothing_that_a_model_writes_is_lost(text):
    set_text = "".join(Typesetter("1 + 2", SYMBOLS).set(iter(Stream([text]))))
    set_text = re.sub(r"  [✓✗]( [a-z ]+(?=\n|$))?", "", set_text)
    assert "".join(set_text.split()) == "".join(text.replace("</think>", "").split())


def test_digits_are_shown_as_they_come():
    typesetter = Typesetter("1 + 2", SYMBOLS)
    assert "".join(typesetter._feed(" Step ")) == "\n  Step"
    assert "".join(typesetter._feed("1: ")) == " 1:"
    assert "".join(typesetter._feed("4")) == " 4"
    assert "".join(typesetter._feed("2 <")) == "2"


# -------------------------------------------------------------------------- invalid input


def explained(text):
    with pytest.raises(ExpressionError) as error:
        parse(text)
    return explain(error.value)


@pytest.mark.parametrize("text", ["5 + + 3", "5 +", "(5 + 3", "5 + 3)", "6 18", "5 + 3abc", "()"])
def test_the_caret_stands_under_the_column(text):
    with pytest.raises(ExpressionError) as error:
        parse(text)
    _, source, caret, message, *_ = explain(error.value).split("\n")
    assert source == f"  {text}"
    assert caret.index("^") == 2 + error.value.column
    assert error.value.reason in message


def test_the_caret_of_a_long_text_stays_on_the_screen():
    _, source, caret, *_ = explained("1 + " * 1000 + "x" + " + 1" * 1000).split("\n")
    assert len(source) < 79
    assert source[caret.index("^")] == "x"


def test_a_tab_takes_one_column():
    _, source, caret, *_ = explained("1\t+ x").split("\n")
    assert source[caret.index("^")] == "x"


def test_control_characters_do_not_reach_the_terminal():
    assert "\x1b" not in explained("1 + \x1b[2J")


def test_the_model_is_not_asked_about_an_invalid_expression(tokenizer):
    solver = oracle_solver(tokenizer, lambda _: pytest.fail("asked"))
    assert "Invalid expression" in "".join(answer(solver, "5 +", SYMBOLS))


def test_the_model_sees_the_canonical_spelling(tokenizer):
    seen = []

    def note(expression):
        seen.append(expression)
        return right_answer(expression)

    "".join(answer(oracle_solver(tokenizer, note), "5+((10-3))- -2", SYMBOLS))
    assert set(seen) == {"5 + ((10 - 3)) - -2"}


@pytest.mark.parametrize(
    ("encoding", "marks"),
    [("utf-8", SYMBOLS), ("ascii", PLAIN), ("latin-1", PLAIN), (None, PLAIN), ("no such", PLAIN)],
)
def test_marks_that_the_encoding_can_show(encoding, marks):
    assert marks_for(encoding) == marks


# ------------------------------------------------------------------------- the script, piped


def talk(checkpoint, text, **environment):
    """The script with ``text`` as its input."""
    done = subprocess.run(
        command("run_interactive.py", "--model-path", checkpoint, "--max-gen-length", 20),
        input=text if isinstance(text, bytes) else text.encode(),
        env={**one_thread(), "PYTHONIOENCODING": "utf-8", **environment},
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    return done.stdout.decode()


def test_piped_input_is_a_whole_transcript(tiny_checkpoint):
    text = talk(tiny_checkpoint, "5+(10-3)\n\n5 +\nexit\n1 + 1\n")
    assert text.startswith("Enter expression: 5+(10-3)\n\n-----")
    assert text.count("SOLUTION:") == 1
    assert "the exact one is 12" in text or "the exact result is 12" in text
    assert "  5 +\n     ^\n" in text
    assert text.endswith("Enter expression: exit\n")


def test_hostile_input_gets_an_answer_and_no_traceback(tiny_checkpoint):
    lines = [
        b"\xff\xfe 1 + 2",
        b"(" * 100_000,
        b"(" * 100_000 + b"1 + 2" + b")" * 100_000,
        b"9" * 1000 + b" - " + b"9" * 1000,
        b"\x00",
        "\N{FULLWIDTH DIGIT ONE} + 2".encode(),
    ]
    text = talk(tiny_checkpoint, b"\n".join(lines), PYTHONIOENCODING="")
    assert text.count("Invalid expression") == 4
    assert text.count("too long") == 2


def test_ascii_output_has_words_for_marks(tiny_checkpoint):
    text = talk(tiny_checkpoint, "1 + 2\n", PYTHONIOENCODING="ascii")
    assert text.isascii()
    assert "[wrong]" in text or "[right]" in text


@pytest.mark.parametrize("word", ["exit", "quit", "q", "EXIT", " q ", ""])
def test_words_that_end_the_dialogue(tiny_checkpoint, monkeypatch, word, capsys):
    lines = iter([word] if word else [])

    def typed(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    ended = call("run_interactive.py", "--model-path", tiny_checkpoint)
    assert ended.code == 0, ended.err
    assert not list(lines)


def test_every_refusal_is_one_line(tiny_checkpoint, tmp_path):
    (tmp_path / "cut.pt").write_bytes(tiny_checkpoint.read_bytes()[:5000])
    for path in (tmp_path / "none.pt", tmp_path, tmp_path / "cut.pt"):
        ended = call("run_interactive.py", "--model-path", path)
        assert (ended.code, len(ended.err.splitlines())) == (2, 1), ended.err
        assert str(path) in ended.err


def test_the_documented_command_with_a_foundational_model(tiny_checkpoint, tokenizer, tmp_path):
    folder = tmp_path / "models" / "foundational_20260101_120000"
    folder.mkdir(parents=True)
    (folder / "best_model.pt").write_bytes(tiny_checkpoint.read_bytes())
    (folder / "training_summary.json").write_text("{}")
    tokenizer.save(tmp_path / "data" / "tokenizer")
    ended = run(
        "run_interactive.py",
        *("--model-path", "models/foundational_YYYYMMDD_HHMMSS/best_model.pt"),
        *("--tokenizer-path", "data/tokenizer"),
        cwd=tmp_path,
        stdin="1 + 2\n",
    )
    assert ended.code == 0, ended.err
    assert "SOLUTION:" in ended.out


# -------------------------------------------------------------------- the script, in a terminal


class Terminal:
    """The script in a pseudo-terminal."""

    def __init__(self, checkpoint, *flags):
        import pty

        self.master, other = pty.openpty()
        self.process = subprocess.Popen(
            command("run_interactive.py", "--model-path", checkpoint, *flags),
            stdin=other,
            stdout=other,
            stderr=other,
            env={**one_thread(), "TERM": "dumb", "PYTHONIOENCODING": "utf-8"},
            start_new_session=True,
            preexec_fn=_own_terminal,
        )
        os.close(other)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text = ""
        self.place = 0  # in the text: what stands before it has been waited for

    def type(self, text):
        os.write(self.master, text.encode())

    def wait_for(self, words, seconds=120):
        """Read on until the words appear."""
        deadline = time.monotonic() + seconds
        while words not in self.text[self.place :]:
            left = deadline - time.monotonic()
            assert left > 0, f"no {words!r} in {self.text[self.place :]!r}"
            if select.select([self.master], [], [], left)[0]:
                self.text += self.decoder.decode(os.read(self.master, 4096))
        self.place = self.text.index(words, self.place) + len(words)

    def end(self):
        """Read to the end; returns the exit code."""
        with suppress(OSError):  # how Linux says that the other side is closed
            while data := os.read(self.master, 4096):
                self.text += self.decoder.decode(data)
        return self.process.wait(timeout=60)

    def leave_with(self, key, presses=10, seconds=5):
        """Press a key until the script ends; returns the exit code.

        Once is not enough: the prompt appears a moment before readline takes over the terminal,
        and a key in that moment is lost.
        """
        for _ in range(presses):
            self.type(key)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=seconds)
                return self.end()
        raise AssertionError(f"still there: {self.text!r}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def _own_terminal():
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


in_a_terminal = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
PROMPT = "Enter expression: "


@in_a_terminal
@pytest.mark.parametrize("key", ["\x03", "\x04"], ids=["Ctrl-C", "Ctrl-D"])
def test_keys_that_leave_at_the_prompt(tiny_checkpoint, key):
    with Terminal(tiny_checkpoint) as terminal:
        terminal.wait_for(PROMPT)
        assert terminal.leave_with(key) == 0
        assert "Traceback" not in terminal.text


@in_a_terminal
def test_ctrl_c_leaves_in_the_middle_of_a_solution(tiny_checkpoint):
    with Terminal(tiny_checkpoint, "--max-gen-length", 100_000) as terminal:
        terminal.wait_for(PROMPT)
        terminal.type("(1 + 2) - 3\r")
        terminal.wait_for("Reasoning Steps:")
        terminal.type("\x03")
        assert terminal.end() == 0
        assert "Traceback" not in terminal.text


@in_a_terminal
def test_history_and_line_editing(tiny_checkpoint):
    pytest.importorskip("readline")
    with Terminal(tiny_checkpoint, "--max-gen-length", 5) as terminal:
        terminal.wait_for(PROMPT)
        terminal.type("1 + 2\r")
        terminal.wait_for("the exact one is 3")
        terminal.wait_for(PROMPT)
        terminal.type("\x1b[A4\r")  # the line before, and one more digit
        terminal.wait_for("the exact one is 25")
        terminal.type("\x7f")
        terminal.type("exit\r")
        assert terminal.end() == 0
