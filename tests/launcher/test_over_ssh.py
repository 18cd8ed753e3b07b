"""Lines on several hosts: their output, their status, and nothing left when one fails or the client is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from lmscale.launcher import over_ssh, tether
from lmscale.launcher.processes import marked
from lmscale.launcher.status import RUN_ID
from tests.launcher.fake_ssh import NO_NAME, put_ssh_on_path

WITHIN_S = 30.0


def eventually(condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + WITHIN_S
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return condition()


def start(*pairs: str, run_id: str = "") -> subprocess.Popen[str]:
    environ = {**os.environ, RUN_ID: run_id or uuid.uuid4().hex}
    command = [sys.executable, "-m", "lmscale.launcher.over_ssh", "ONE,TWO", *pairs]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)


def tethered(script: str) -> str:
    return f"exec {sys.executable} -m lmscale.launcher.tether sh -c '{script}'"


@pytest.fixture(autouse=True)
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_ssh_on_path(tmp_path, monkeypatch, {"gone": NO_NAME})


def test_output_bears_the_hosts_name_and_the_status_is_zero():
    process = start("a", "echo one; echo two >&2", "b", "echo three")
    out, err = process.communicate(timeout=WITHIN_S)
    assert (sorted(out.splitlines()), err, process.returncode) == (["a: one", "b: three"], "a: two\n", 0)


def test_the_first_failure_is_the_status_and_ends_the_others(monkeypatch):
    run_id = uuid.uuid4().hex
    environ = {**os.environ, RUN_ID: run_id}
    code = "import sys; from lmscale.launcher.over_ssh import run; sys.exit(run(eval(sys.argv[1]), grace_s=0.5))"
    pairs = [("a", tethered("sleep 600 & sleep 600")), ("b", tethered("exit 3"))]
    done = subprocess.run(
        [sys.executable, "-c", code, repr(pairs)], env=environ, capture_output=True, text=True, timeout=WITHIN_S
    )
    assert (done.returncode, done.stderr) == (3, "b: ended with status 3\n")
    assert eventually(lambda: not marked(run_id))


def test_variables_go_along_by_name_through_the_remote_shell(monkeypatch):
    monkeypatch.setenv("ONE", "$x '\"`b`")
    done = start("a", f"exec {sys.executable} -c 'import os; print(os.environ[\"ONE\"])'")
    assert done.communicate(timeout=WITHIN_S)[0] == "a: $x '\"`b`\n"


def test_an_unreachable_host_is_named():
    process = start("gone", "true", "b", "true")
    _, err = process.communicate(timeout=WITHIN_S)
    assert "gone: ended with status 255: unreachable, or the connection was lost" in err
    assert process.returncode == 255


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_client(tmp_path, number):
    """By KILL too: nothing is left then but that the connections close."""
    run_id = uuid.uuid4().hex
    line = tethered(f"sleep 600 & touch {tmp_path}/up; wait")
    process = start("a", line, run_id=run_id)
    assert eventually((tmp_path / "up").exists)
    process.send_signal(number)
    process.communicate(timeout=WITHIN_S)
    assert process.returncode in {128 + number, -number}
    assert eventually(lambda: not marked(run_id))


def test_a_tether_returns_its_commands_status_and_takes_what_is_left():
    run_id = uuid.uuid4().hex
    command = [sys.executable, "-m", "lmscale.launcher.tether", "sh", "-c", "sleep 600 & exit 7"]
    holder, held = os.pipe()
    try:
        done = subprocess.run(command, stdin=holder, env={**os.environ, RUN_ID: run_id}, timeout=WITHIN_S)
    finally:
        os.close(holder)
        os.close(held)
    assert done.returncode == 7
    assert eventually(lambda: not marked(run_id))


def test_hosts_that_do_not_end_share_the_time_for_their_last_words(monkeypatch):
    waited = []

    class Noting(subprocess.Popen):
        def wait(self, timeout=None):
            waited.append(timeout or 0.0)
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Noting)
    monkeypatch.setattr(over_ssh, "_LAST_WORDS_S", 0.5)
    hosts = over_ssh._Hosts((name, "exec sleep 600") for name in ("a", "b", "c", "d"))
    hosts.end()
    for process in hosts.processes.values():
        process.stdout.close()
        process.stderr.close()
    assert {process.returncode for process in hosts.processes.values()} == {-signal.SIGKILL}
    assert sum(waited) < 2 * 0.5


def test_a_process_that_cannot_be_killed_does_not_hold_the_tether(monkeypatch):
    looks = []
    monkeypatch.setattr(tether, "marked", lambda *_: looks.append(1) or {0: False})
    monkeypatch.setattr(tether, "send", lambda *_: None)
    monkeypatch.setattr(tether, "_KILL_S", 0.3)
    tether._kill_all("mark")
    assert 1 < len(looks) < 10  # it looks again, and not without a pause
