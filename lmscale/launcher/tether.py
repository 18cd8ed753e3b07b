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
import uuid
from collections.abc import Sequence

from lmscale.launcher.processes import marked, send

_MARK = "LMSCALE_TETHER"


def main(argv: Sequence[str]) -> int:
    """Run a command until it ends, or until standard input does.

    Returns:
        Its status; 128 and the signal's number where a signal ended it, as a shell says.
    """
    mark = uuid.uuid4().hex
    child = subprocess.Popen(list(argv), stdin=subprocess.DEVNULL, env={**os.environ, _MARK: mark})
    threading.Thread(target=_kill_at_the_end_of_input, args=(mark,), daemon=True).start()
    status = child.wait()
    # What the command left behind belongs to nobody.
    send(marked(mark, _MARK), signal.SIGKILL)
    return status if status >= 0 else 128 - status


def _kill_at_the_end_of_input(mark: str) -> None:
    while os.read(0, 4096):
        pass
    while left := marked(mark, _MARK):
        send(left, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
