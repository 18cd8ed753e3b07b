"""Start a line of shell on each of several hosts: `python -m lmscale.launcher.over_ssh NAME,NAME HOST LINE HOST LINE ...`.

The variables that are named first go before each line, with their values here.

Every line of their output is passed on with the host's name before it, as pdsh does. Unlike pdsh it ends the others when
one host has failed: each line runs under tether.py, which ends with its connection.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from types import FrameType
from typing import IO

from lmscale.launcher.shell import SSH, with_exports

_ALIVE = ("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=4")
"""A host that does not answer for 20 s is lost."""
_SSH_FAILED = 255
_GRACE_S = 20.0
"""From the first failure to the end of the other hosts: their ranks may be about to say why."""
_LAST_WORDS_S = 10.0
_DRAIN_S = 5.0
"""For what the connections have brought and nobody has read, when all are closed."""
_POLL_S = 0.1


class _Hosts:
    def __init__(self, commands: Iterable[tuple[str, str]]):
        self.processes = {
            host: subprocess.Popen(
                [*SSH, *_ALIVE, host, line], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            for host, line in commands
        }
        self._pumps = [
            threading.Thread(target=_pass_on, args=(host, source, target), daemon=True)
            for host, process in self.processes.items()
            for source, target in ((process.stdout, sys.stdout.buffer), (process.stderr, sys.stderr.buffer))
        ]
        for pump in self._pumps:
            pump.start()

    def failed(self) -> tuple[str, int] | None:
        """Return a host whose line has failed, and its status."""
        ended = ((host, process.poll()) for host, process in self.processes.items())
        return next(((host, status) for host, status in ended if status), None)

    def let_go(self) -> None:
        """Close what holds the hosts' commands."""
        for process in self.processes.values():
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()

    def end(self) -> None:
        """Let go of all, and wait for the connections to close, all within the same time; a lost host's never does."""
        self.let_go()
        deadline = time.monotonic() + _LAST_WORDS_S
        for process in self.processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        deadline = time.monotonic() + _DRAIN_S
        for pump in self._pumps:
            pump.join(max(0.0, deadline - time.monotonic()))


def run(commands: Sequence[tuple[str, str]], grace_s: float = _GRACE_S) -> int:
    """Run a line on each host.

    Args:
        commands: hosts and what their shells get.
        grace_s: seconds that the other hosts get when one has failed.

    Returns:
        0 where all have ended with 0; or the first failure's status.
    """
    asked: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        asked.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, note)
    hosts, failure, deadline = _Hosts(commands), None, float("inf")
    try:
        while any(process.poll() is None for process in hosts.processes.values()) and not asked:
            if failure is None and (failure := hosts.failed()) is not None:
                deadline = time.monotonic() + grace_s
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
    finally:
        hosts.end()
    failure = failure or (None if asked else hosts.failed())
    if failure is None:
        return 128 + asked[0] if asked else 0
    _tell(*failure)
    return failure[1]


def _tell(host: str, status: int) -> None:
    lost = ": unreachable, or the connection was lost" if status == _SSH_FAILED else ""
    sys.stderr.write(f"{host}: ended with status {status}{lost}\n")


def _pass_on(host: str, source: IO[bytes], target: IO[bytes]) -> None:
    for line in source:
        target.write(f"{host}: ".encode() + line)
        target.flush()


def main(arguments: Sequence[str]) -> int:
    """Read the names and the HOST LINE pairs, and run them."""
    environ = {name: os.environ[name] for name in arguments[0].split(",") if name in os.environ}
    pairs = zip(arguments[1::2], arguments[2::2], strict=True)
    return run([(host, with_exports(line, environ)) for host, line in pairs])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
