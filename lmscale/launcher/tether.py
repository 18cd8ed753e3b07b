"""Run a command on another host for as long as somebody holds its standard input: `python -m lmscale.launcher.tether CMD`.

sshd leaves a command running when its client is gone. So the client keeps standard input open, and when it closes (the
client was killed, the launching host died, the connection was given up) the command and all that it started are killed.
Nothing is saved then: a run that should save is asked to by its stop file, long before.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence

from lmscale.launcher.processes import marked, send

_MARK = "LMSCALE_TETHER"
_KILL_S = 10.0
_POLL_S = 0.05


def main(argv: Sequence[str]) -> int:
    """Run a command until it ends, or until standard input does.

    Returns:
        Its status; 128 and the signal's number where a signal ended it, as a shell says.
    """
    mark = uuid.uuid4().hex
    child = subprocess.Popen(list(argv), stdin=subprocess.DEVNULL, env={**os.environ, _MARK: mark})
    threading.Thread(target=_kill_at_the_end_of_input, args=(mark,), daemon=True).start()
    status = child.wait()
    _kill_all(mark)  # what the command left behind belongs to nobody
    return status if status >= 0 else 128 - status


def _kill_at_the_end_of_input(mark: str) -> None:
    while os.read(0, 4096):
        pass
    _kill_all(mark)


def _kill_all(mark: str) -> None:
    """Kill until none is left: one that is just being forked is not seen, and one that hangs in the kernel stays."""
    deadline = time.monotonic() + _KILL_S
    while (left := marked(mark, _MARK)) and time.monotonic() < deadline:
        send(left, signal.SIGKILL)
        time.sleep(_POLL_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
