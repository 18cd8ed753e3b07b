"""Run a launcher, and do for its ranks what it does not: pass signals on, return their status, leave nothing behind.

DeepSpeed's launcher loses its ranks when it gets TERM, is killed, or gets USR1, and sends SIGKILL 30 seconds after a
signal, in the middle of a save. So it is started in a session of its own, where no signal of the terminal reaches it,
and gets none from us; the ranks get them, as soon as they have registered that they handle them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from lmscale.errors import EXIT_BAD_INPUT, EXIT_FAILURE, EXIT_INTERRUPTED_AND_SAVED
from lmscale.launcher.processes import marked, ranks_of, send
from lmscale.launcher.status import RUN_ID, STATUS_BY_FILE, STATUS_DIR, Report, read_registrations, read_reports

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_POLL_S = 0.1
_WATCH_S = 0.5
_GRACE_S = 15.0
"""From the first rank's failure to the end of those that wait for it in a collective."""
_LAUNCHER_GRACE_S = 10.0
_EXIT_HANG, _EXIT_BUDGET = 76, 77


@dataclass(frozen=True)
class Outcome:
    """How a launch ended."""

    status: int
    error: str | None = None
    """The line for the user; None where there is nothing to say."""


def supervise(
    argv: Sequence[str],
    environ: Mapping[str, str],
    status_dir: Path,
    num_ranks: int,
    *,
    is_local: bool = True,
    stop_file: Path | None = None,
    launcher_passes_signals: bool = False,
    grace_s: float = _GRACE_S,
) -> Outcome:
    """Run a launcher until all of its ranks are gone.

    TERM, INT, USR1 and HUP (as TERM: a closed terminal) go to the ranks of this host. A second INT kills everything.
    Where all ranks run on other hosts, TERM and INT make the stop file instead.

    Args:
        argv: the launcher's command line.
        environ: its environment; the run id in it marks the processes.
        status_dir: an empty directory, for the ranks' reports.
        num_ranks: ranks that will report, on all hosts.
        is_local: whether all ranks are processes of this host.
        stop_file: the file that makes a run save and stop.
        launcher_passes_signals: the launcher hands signals to the ranks by itself, as srun does.
        grace_s: seconds that the other ranks get when one has failed.

    Returns:
        The ranks' status, as `outcome_of` derives it.
    """
    extra = {STATUS_DIR: str(status_dir), STATUS_BY_FILE: "1" if is_local else "0"}
    supervisor = _Supervisor(
        {**environ, **extra}, status_dir, num_ranks, is_local, stop_file, launcher_passes_signals, grace_s
    )
    return supervisor.run(list(argv))


def outcome_of(reports: Mapping[int, Report], num_ranks: int, launcher_status: int, is_local: bool = True) -> Outcome:
    """Derive a launch's outcome from its ranks' reports.

    What a rank said outweighs the silence of those that were killed because of it: any 1 wins, then 2, 76, 77; a rank
    that died silently makes 1; then 75, then 0. Silent ranks on other hosts are judged by the launcher's status.
    """
    for status in (EXIT_FAILURE, EXIT_BAD_INPUT, _EXIT_HANG, _EXIT_BUDGET):
        errors = [report.error for _, report in sorted(reports.items()) if report.status == status]
        if errors:
            return Outcome(status, next((error for error in errors if error), f"a rank ended with status {status}"))
    silent = [number for number in range(num_ranks) if number not in reports]
    said = {report.status for report in reports.values()} - {0}
    if silent and not is_local and launcher_status in {0, EXIT_INTERRUPTED_AND_SAVED}:
        said |= {launcher_status} - {0}
    elif len(silent) == num_ranks:
        return Outcome(
            EXIT_FAILURE,
            f"every rank crashed or was killed without a word; the launcher returned {launcher_status}, see above",
        )
    elif silent:
        names = ", ".join(map(str, silent[:8])) + (", ..." if len(silent) > 8 else "")
        return Outcome(EXIT_FAILURE, f"died without a word, killed or crashed: rank {names} of {num_ranks}")
    if said - {EXIT_INTERRUPTED_AND_SAVED}:
        return Outcome(EXIT_FAILURE, f"ranks ended with status {sorted(said)}")
    return Outcome(EXIT_INTERRUPTED_AND_SAVED if said else 0)


class _Supervisor:
    def __init__(
        self,
        environ: dict[str, str],
        status_dir: Path,
        num_ranks: int,
        is_local: bool,
        stop_file: Path | None,
        launcher_passes_signals: bool,
        grace_s: float,
    ):
        self._environ, self._run_id = environ, environ[RUN_ID]
        self._status_dir, self._num_ranks, self._is_local = status_dir, num_ranks, is_local
        self._stop_file, self._launcher_passes_signals, self._grace_s = stop_file, launcher_passes_signals, grace_s
        self._pending: list[int] = []
        self._interrupts = 0
        self._failed_at: float | None = None
        self._watched_at = 0.0

    def run(self, argv: list[str]) -> Outcome:
        with self._handling_signals():
            launcher = subprocess.Popen(argv, env=self._environ, stdin=subprocess.DEVNULL, start_new_session=True)
            try:
                while not self._is_over(launcher):
                    if self._interrupts > 1:
                        self._kill(launcher)
                        return Outcome(EXIT_FAILURE, "interrupted twice: killed, without a save")
                    self._deliver(launcher)
                    self._end_survivors()
                    time.sleep(_POLL_S)
            finally:
                self._kill(launcher)
        status = EXIT_FAILURE if launcher.returncode is None or launcher.returncode < 0 else launcher.returncode
        return outcome_of(read_reports(self._status_dir), self._num_ranks, status, self._is_local)

    @contextlib.contextmanager
    def _handling_signals(self) -> Iterator[None]:
        former = {number: signal.signal(number, self._note) for number in _FORWARDED}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        self._pending.append(signal.SIGTERM if number == signal.SIGHUP else number)

    def _is_over(self, launcher: subprocess.Popen[bytes]) -> bool:
        """Ask for the ranks too: a launcher that is killed from outside leaves ranks that go on to their end."""
        return launcher.poll() is not None and not ranks_of(self._run_id)

    def _deliver(self, launcher: subprocess.Popen[bytes]) -> None:
        """Pass signals on once every rank handles them; an earlier one would end a rank and strand the others."""
        if not self._pending:
            return
        registered = read_registrations(self._status_dir)
        here = [entry.pid for entry in registered.values() if entry.host == socket.gethostname()]
        is_up = len(registered) >= self._num_ranks
        if not is_up and self._is_local:
            return
        for number in self._pending:
            if self._launcher_passes_signals:
                launcher.send_signal(number)
            elif is_up and here:
                # The ranks agree on what to do, so that it is enough to tell some of them.
                send(set(here) & set(ranks_of(self._run_id)), number)
            elif number != signal.SIGUSR1 and self._stop_file is not None:
                with contextlib.suppress(OSError):
                    self._stop_file.touch()
        self._pending.clear()

    def _end_survivors(self) -> None:
        """Kill the ranks that still wait for one that has failed."""
        now = time.monotonic()
        if now - self._watched_at < _WATCH_S:
            return
        self._watched_at = now
        if self._failed_at is None:
            self._failed_at = now if self._has_failed_rank() else None
        elif now - self._failed_at > self._grace_s:
            send(ranks_of(self._run_id), signal.SIGKILL)

    def _has_failed_rank(self) -> bool:
        reports = read_reports(self._status_dir)
        if any(report.status not in {0, EXIT_INTERRUPTED_AND_SAVED} for report in reports.values()):
            return True
        host = socket.gethostname()
        waited = [
            e.pid
            for number, e in read_registrations(self._status_dir).items()
            if number not in reports and e.host == host
        ]
        return any(not _is_alive(pid) for pid in waited)

    def _kill(self, launcher: subprocess.Popen[bytes]) -> None:
        """Leave no process behind, on this host at once, on others by the launcher's own means."""
        if not self._is_local and launcher.poll() is None:
            launcher.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                launcher.wait(_LAUNCHER_GRACE_S)
        deadline = time.monotonic() + _LAUNCHER_GRACE_S
        # A process that hangs in the kernel (a dead file server) cannot be killed, nor waited for.
        while (left := {*marked(self._run_id)} - {os.getpid()}) and time.monotonic() < deadline:
            send(left, signal.SIGKILL)
            launcher.poll()
            time.sleep(_POLL_S)
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(_LAUNCHER_GRACE_S)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False
