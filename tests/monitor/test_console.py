"""What the console shows, with and without a terminal."""

import inspect
import io
import logging
import sys

import pytest

from lmscale.monitor.console import Console, ConsoleLike, NullConsole, format_duration, progress_line
from lmscale.monitor.metrics import Record

RECORD = Record(
    40,
    320,
    4000,
    {"train/lm_loss": 2.34567, "train/lr": 3.0e-4, "perf/tokens_per_second": 50.0, "perf/mfu_fraction": 0.4},
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_line_per_record_where_there_is_no_terminal():
    file = io.StringIO()
    console = Console(file)
    console.start(total_tokens=10_000)
    console.update(RECORD)
    console.message("saved [step 40]")
    console.close()
    assert file.getvalue().splitlines() == [
        " 40% step 40  loss 2.3457  lr 3.000e-04  50 tokens/s  2m 00s left  MFU 40.0%",
        "saved [step 40]",
    ]


def test_a_bar_on_a_terminal_starts_where_the_run_continues(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.delenv("NO_COLOR", raising=False)
    file = Terminal()
    console = Console(file)
    console.start(total_tokens=10_000, consumed_tokens=2_000)
    console.message("a line")
    console.update(RECORD)
    console.close()
    shown = file.getvalue()
    assert "20% starting" in shown
    assert "40% step 40  loss 2.3457" in shown
    assert "a line" in shown


def test_log_lines_pass_above_the_bar_and_the_handler_is_given_back(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    file = Terminal()
    monkeypatch.setattr(sys, "stderr", file)
    handler, logger = logging.StreamHandler(), logging.getLogger("lmscale")
    logger.addHandler(handler)
    try:
        console = Console()
        console.start(total_tokens=100)
        assert handler.stream is not file
        logger.warning("a log line")
        console.close()
        assert handler.stream is file
    finally:
        logger.removeHandler(handler)
    assert "a log line" in file.getvalue()


def test_held_out_losses_have_lines_of_their_own():
    file = io.StringIO()
    console = Console(file)
    console.start(100)
    console.update(Record(40, 1, 1, {"valid/wiki/lm_loss": 2.0, "valid/wiki/perplexity": 7.389}))
    assert file.getvalue() == "held out, wiki, step 40: loss 2.0000  perplexity 7.39\n"


def test_skipped_steps_are_shown_when_there_are_any():
    assert "skipped" not in progress_line(Record(1, 1, 1, {"train/skipped_steps": 0}), 10)
    assert progress_line(Record(1, 1, 1, {"train/skipped_steps": 3}), 10) == "step 1  skipped 3"


def test_a_table_holds_its_cells():
    file = io.StringIO()
    Console(file).table("parameters", ["kind", "count"], [["mlp", "1,024"], ["head", "0"]])
    assert [word for word in ("parameters", "kind", "mlp", "1,024", "head") if word not in file.getvalue()] == []


def test_the_null_console_takes_every_call(capfd):
    console: ConsoleLike = NullConsole()
    console.start(1)
    console.update(RECORD)
    console.message("x")
    console.table("t", ["a"], [["b"]])
    console.close()
    assert capfd.readouterr() == ("", "")


def test_both_consoles_have_the_signatures_of_the_protocol():
    for name, method in inspect.getmembers(ConsoleLike, inspect.isfunction):
        if not name.startswith("_"):
            for console in (Console, NullConsole):
                assert inspect.signature(getattr(console, name)) == inspect.signature(method)


@pytest.mark.parametrize(
    ("duration_s", "text"), [(8.4, "8s"), (69, "1m 09s"), (7500, "2h 05m"), (3 * 86400 + 4 * 3600 + 59, "3d 04h")]
)
def test_durations_show_their_two_largest_units(duration_s, text):
    assert format_duration(duration_s) == text
