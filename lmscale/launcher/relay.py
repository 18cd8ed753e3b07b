"""Take what ranks on other hosts tell, and put it into the directory of the ranks' reports as if they had written it there.

So everything that looks after ranks reads the same files, and no directory has to be shared between hosts.
"""

from __future__ import annotations

import contextlib
import errno
import json
import secrets
import socket
import threading
from dataclasses import dataclass
from pathlib import Path

from lmscale.launcher.link import keep_alive
from lmscale.launcher.status import KINDS, put, read_reports

_HELLO_S = 10.0
_LONGEST_LINE = 1 << 20
_SILENT = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH}


@dataclass(frozen=True)
class Gone:
    """A rank whose connection has ended before it reported."""

    host: str
    is_silent: bool
    """Its host does not answer; else the process is gone."""


class Relay:
    """Listen for the ranks of a launch; a context manager.

    Who connects shows the run's id. That keeps ranks of other launches out, and not who can list the processes of a host:
    launchers put the id on command lines.

    Args:
        status_dir: the directory of the ranks' reports.
        run_id: of this launch.
        num_ranks: of all.
    """

    def __init__(self, status_dir: Path, run_id: str, num_ranks: int):
        self._status_dir, self._run_id, self._num_ranks = status_dir, run_id, num_ranks
        self._connections: dict[int, socket.socket] = {}
        self._gone: dict[int, Gone] = {}
        self._lock = threading.Lock()
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        self._listener = socket.create_server(
            ("", 0), family=family, backlog=1024, dualstack_ipv6=family is socket.AF_INET6
        )
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Relay:
        threading.Thread(target=self._listen, name="relay", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for connection in self._connections.values():
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    @property
    def num_connected(self) -> int:
        """Ranks that are connected now."""
        return len(self._connections)

    @property
    def came(self) -> set[int]:
        """Ranks that are or were connected."""
        with self._lock:
            return {*self._connections, *self._gone}

    def lost(self) -> dict[int, Gone]:
        """Return the ranks that are gone without a report, in the order in which they went."""
        with self._lock:
            gone = dict(self._gone)
        # In this order: a rank that ends well meanwhile has reported before it went.
        reports = read_reports(self._status_dir) if gone else {}
        return {number: each for number, each in gone.items() if number not in reports}

    def signal(self, number: int) -> None:
        """Send a signal to every connected rank."""
        with self._lock:
            connections = list(self._connections.values())
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall(b"%d\n" % number)

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), name="relay", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines:
            connection.settimeout(_HELLO_S)
            try:
                run_id, rank, host = json.loads(lines.readline(_LONGEST_LINE))
                rank = int(rank)
                is_ours = secrets.compare_digest(str(run_id), self._run_id) and 0 <= rank < self._num_ranks
            except (OSError, ValueError, TypeError):
                return
            if not is_ours or rank in self._connections:
                return
            connection.settimeout(None)
            keep_alive(connection)
            with self._lock:
                self._connections[rank] = connection
            is_silent = False
            try:
                while line := lines.readline(_LONGEST_LINE):
                    kind, text = json.loads(line)
                    if kind in KINDS:
                        put(self._status_dir, rank, kind, str(text))
            except OSError as error:
                is_silent = error.errno in _SILENT
            except (ValueError, TypeError):
                pass
            with self._lock:
                del self._connections[rank]
                self._gone[rank] = Gone(str(host), is_silent)
