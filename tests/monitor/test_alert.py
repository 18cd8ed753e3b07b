"""The user's command is run with the event in its environment, and nothing that it does harms the run."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lmscale.monitor.alert import OUTPUT_FILE, alert

WAIT_S = 10.0
"""A shell starts in milliseconds; the machine may be busy."""


def wait_for(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + WAIT_S
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_command_gets_the_event_in_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMSCALE_RUN_ID", "abc")
    (tmp_path / "logs").mkdir()
    names = "$LMSCALE_EVENT|$LMSCALE_MESSAGE|$LMSCALE_STEP|$LMSCALE_OUTPUT_DIR|$LMSCALE_RUN_ID"
    alert(f'echo "{names}"', "fault", 'a "quoted" line; `id`', 7, tmp_path)
    log = tmp_path / OUTPUT_FILE
    assert wait_for(lambda: log.is_file() and log.read_text().endswith("\n"))
    assert log.read_text() == f'fault|a "quoted" line; `id`|7|{tmp_path}|\n'


@pytest.mark.parametrize("command", [None, ""])
def test_no_command_does_nothing(command: str | None, tmp_path: Path) -> None:
    alert(command, "failure", "gone", 1, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_failing_command_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="lmscale"):
        alert("exit 3", "hang", "stuck", 1, tmp_path / "absent")
        assert wait_for(lambda: "ended with status 3" in caplog.text)


def test_slow_command_is_not_waited_for_and_is_ended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pid = tmp_path / "pid"
    with caplog.at_level(logging.WARNING, logger="lmscale"):
        start = time.monotonic()
        alert(f"echo $$ > {pid}; sleep 300", "fault", "slow", 1, tmp_path, timeout_s=1.0)
        assert time.monotonic() - start < 1.0
        assert wait_for(lambda: "took more than 1 s" in caplog.text)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
