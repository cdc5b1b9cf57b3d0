"""Progress on a terminal and in a log, readable times, devices."""

import io
import sys
import timeit

import pytest
import torch

from arithmetic_llm import runtime
from arithmetic_llm.runtime import (
    Progress,
    UserError,
    multiplies_bf16,
    readable_seconds,
    resolve_device,
    resolve_precision,
    seconds_of_a_product,
)


@pytest.fixture
def log(monkeypatch, capsys):
    """What is printed to standard error, which is no terminal; a line at every update."""
    monkeypatch.setattr(Progress, "SECONDS_BETWEEN_LINES", -1.0)
    return lambda: capsys.readouterr().err


def test_a_log_gets_plain_lines(log):
    with Progress(4, "work", "things") as progress:
        progress.update(3, loss="0.5")
        progress.update(1)
    assert log() == "work: 3/4 things, loss 0.5, 0s left\nwork: 4/4 things, loss 0.5, 0s left\n"


def test_a_log_is_not_flooded(log, monkeypatch):
    monkeypatch.setattr(Progress, "SECONDS_BETWEEN_LINES", 60.0)
    with Progress(1000, "work") as progress:
        for _ in range(1000):
            progress.update()
    assert log() == ""


def test_a_start_without_progress_is_no_division_by_zero(log):
    with Progress(4, "work", initial=2) as progress:
        progress.update(0)
    assert log().startswith("work: 2/4 it")


def test_an_unknown_total_has_no_time_left(log):
    with Progress(None, "work") as progress:
        progress.update(7)
    assert log() == "work: 7 it\n"


def test_a_terminal_gets_a_bar_that_notes_do_not_tear(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress(4, "work", "things") as progress:
        progress.update(2, loss="0.5")
        progress.note("a note")
    shown = sys.stderr.getvalue()
    assert "work" in shown
    assert "a note\n" in shown
    assert "loss=0.5" in shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (75, "1m15s"),
        (3600, "1h00m"),
        (100_000, "27h46m"),
    ],
)
def test_seconds_are_readable(seconds, text):
    assert readable_seconds(seconds) == text


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("toaster", "cuda:99", "", "meta:x"):
        with pytest.raises(UserError, match="try --device auto"):
            resolve_device(name)


def test_bf16_is_not_used_where_it_is_emulated(monkeypatch):
    for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, check, lambda: False, raising=False)
    assert not multiplies_bf16(torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert multiplies_bf16(torch.device("cpu"))
    assert not multiplies_bf16(torch.device("mps"))


def test_bf16_is_chosen_where_a_trial_finds_it_faster(monkeypatch):
    cpu, took = torch.device("cpu"), {torch.float32: 2.0}
    monkeypatch.setattr(runtime, "multiplies_bf16", lambda device: True)
    monkeypatch.setattr(runtime, "seconds_of_a_product", took.get)
    for seconds, chosen in ((1.0, torch.bfloat16), (3.0, torch.float32)):
        took[torch.bfloat16] = seconds
        assert resolve_precision("auto", cpu) == chosen
    assert resolve_precision("bf16", cpu) == torch.bfloat16
    monkeypatch.setattr(runtime, "multiplies_bf16", lambda device: False)
    took.clear()  # a trial would fail
    assert resolve_precision("auto", cpu) == torch.float32


def test_a_trial_times_one_product():
    """As fast as by hand, within what another process may do to either."""
    rows, weight = torch.ones(1024, 128), torch.ones(128, 384)
    by_hand = min(timeit.repeat(lambda: rows @ weight, number=1, repeat=50))
    assert by_hand / 5 < seconds_of_a_product(torch.float32) < 5 * by_hand
