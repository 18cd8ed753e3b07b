"""A rank's connection to `lmscale train` on another host, where no directory need be shared. No torch.

Lines of JSON. The rank begins with [run id, rank, host name] and goes on with [kind, text], as it would write files; the
other side sends numbers of signals. The kernel keeps the connection alive: it answers for a rank that is busy, stopped or
keeps Python's lock, and not for a host that is gone. A rank that loses the connection ends itself, since nobody would.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable

SILENCE_S = 12
"""A host that has not answered for so long counts as gone; a link that is cut for a shorter time is ridden out. The kernel
counts from what it sent last, so that a rank which tells something meanwhile learns of it some seconds later."""
_PROBE_S = 2
_CONNECT_S = 10.0
_TRIES = 3
_RECEIVED = 4096


def keep_alive(connection: socket.socket) -> None:
    """Make a connection fail when the other host has been silent for SILENCE_S, busy or idle."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, SILENCE_S // _PROBE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * SILENCE_S)


def split_address(address: str) -> tuple[str, int]:
    """Split HOST:PORT; HOST may be an IPv6 address."""
    host, _, port = address.rpartition(":")
    return host, int(port)


class Link:
    """Connect to the supervisor.

    Args:
        address: HOST:PORT.
        run_id: of this launch.
        rank: this process's.
        lost: called from another thread, with the reason, when the other side is gone unexpectedly.

    Raises:
        OSError: if it cannot be reached.
    """

    def __init__(self, address: str, run_id: str, rank: int, lost: Callable[[str], None]):
        self._lost, self._is_closing = lost, False
        self._lock = threading.Lock()
        self._socket = _connect(split_address(address))
        self._socket.settimeout(None)
        keep_alive(self._socket)
        # A worker of the data loader would hold the connection open for a rank that is dead.
        os.register_at_fork(after_in_child=self._socket.close)
        self._send([run_id, rank, socket.gethostname()])
        threading.Thread(target=self._read, name="link", daemon=True).start()

    def send(self, kind: str, text: str) -> bool:
        """Send what a rank tells, and return whether it was taken."""
        try:
            self._send([kind, text])
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Take the end of the connection for granted from now on."""
        self._is_closing = True

    def _send(self, message: list[object]) -> None:
        with self._lock:
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _read(self) -> None:
        reason, text = "it has ended", b""
        try:
            # Not by makefile: as long as its file is open, a forked child's close would not close the connection.
            while received := self._socket.recv(_RECEIVED):
                *lines, text = (text + received).split(b"\n")
                for line in lines:
                    os.kill(os.getpid(), signal.Signals(int(line)))
        except (OSError, ValueError) as error:
            reason = str(error)
        if not self._is_closing:
            self._lost(reason)


def _connect(address: tuple[str, int]) -> socket.socket:
    for _ in range(_TRIES - 1):
        with contextlib.suppress(OSError):
            return socket.create_connection(address, _CONNECT_S)
        time.sleep(1.0)
    return socket.create_connection(address, _CONNECT_S)
