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
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

from lmscale.errors import EXIT_BAD_INPUT, EXIT_BUDGET, EXIT_FAILURE, EXIT_HANG, EXIT_INTERRUPTED_AND_SAVED
from lmscale.launcher.hang import Hang, HangWatch
from lmscale.launcher.link import SILENCE_S
from lmscale.launcher.processes import marked, ranks_of, send
from lmscale.launcher.relay import Relay
from lmscale.launcher.remote import sweep
from lmscale.launcher.status import (
    RUN_ID,
    STATUS_BY_FILE,
    STATUS_DIR,
    Report,
    is_crash,
    read_registrations,
    read_reports,
)

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_POLL_S = 0.1
_WATCH_S = 0.5
_WATCH_LOCAL_S = 0.1
"""Who of several dead ranks died first shows in a short while only; reports of other hosts lie on a shared file system."""
_GRACE_S = 15.0
"""From the first rank's failure to the end of those that wait for it in a collective."""
_DEAD_GRACE_S = 4.0
"""The same where the first rank is gone without a word: there is nothing that the others could still do together."""
_LAUNCHER_GRACE_S = 10.0
_START_GRACE_S = 60.0
"""From the wish that a launch end to its end, where its ranks are not all up by then."""


@dataclass(frozen=True)
class Outcome:
    """How a launch ended."""

    status: int
    error: str | None = None
    """The line for the user; None where there is nothing to say."""
    lost: tuple[int, ...] = ()
    """Ranks whose process died without a word, or did not answer any more."""
    is_final: bool = field(default=False, compare=False)
    """The user has asked for the end, so that nothing should be started again."""
    step: int = field(default=0, compare=False)
    """The furthest that a rank has told of."""


def supervise(
    argv: Sequence[str],
    environ: Mapping[str, str],
    status_dir: Path,
    num_ranks: int,
    *,
    is_local: bool = True,
    stop_file: Path | None = None,
    launcher_passes_usr1: bool = False,
    logs: Path | None = None,
    grace_s: float = _GRACE_S,
    relay: Relay | None = None,
    rank_hosts: Sequence[str] = (),
    start_s: float = 0.0,
) -> Outcome:
    """Run a launcher until all of its ranks are gone.

    TERM, INT, USR1 and HUP (as TERM: a closed terminal) go to the ranks of this host, and through the relay to those of all
    hosts. A second INT kills everything. Without a relay, where all ranks run on other hosts, TERM and INT make the stop
    file instead; no launcher gets them, since srun would kill the ranks at TERM and do nothing at INT.

    Args:
        argv: the launcher's command line.
        environ: its environment; the run id in it marks the processes.
        status_dir: an empty directory, for the ranks' reports.
        num_ranks: ranks that will report, on all hosts.
        is_local: whether all ranks are processes of this host.
        stop_file: the file that makes a run save and stop.
        launcher_passes_usr1: the launcher hands USR1 to the ranks by itself, as srun does.
        logs: the run's directory of logs, for the stacks of ranks that hang.
        grace_s: seconds that the other ranks get when one has failed.
        relay: listens to ranks of other hosts.
        rank_hosts: the host of each rank, of a hostfile; on none of them a process may be left.
        start_s: seconds from the first rank of such hosts that is there until all must be; 0 lets them take any time.

    Returns:
        The ranks' status, as `outcome_of` derives it, or that of a hang.
    """
    hears_all = is_local or relay is not None
    extra = {STATUS_DIR: str(status_dir), STATUS_BY_FILE: "1" if hears_all else "0"}
    supervisor = _Supervisor(
        {**environ, **extra},
        status_dir,
        num_ranks,
        hears_all,
        stop_file,
        launcher_passes_usr1,
        logs,
        grace_s,
        relay,
        rank_hosts,
        start_s,
    )
    return supervisor.run(list(argv))


def outcome_of(
    reports: Mapping[int, Report],
    num_ranks: int,
    launcher_status: int,
    is_local: bool = True,
    lost: tuple[int, ...] = (),
) -> Outcome:
    """Derive a launch's outcome from its ranks' reports.

    What a rank said outweighs the silence of those that were killed because of it, and what it says on purpose outweighs
    the crash of those that lost it: 2 wins, then a 1 that was told, then 76, 77; a crash makes 1, and so does a rank that
    died silently, which is named before the crashes of those that lost it; then 75, then 0. Silent ranks on other hosts
    are judged by the launcher's status.

    Args:
        reports: of the ranks that have reported.
        num_ranks: of all.
        launcher_status: of the launcher.
        is_local: whether every rank could report.
        lost: ranks that were found dead, without a report, before any other was ended.
    """
    told = _told(reports, num_ranks)
    if told is not None and not (lost and told.error is not None and is_crash(told.error)):
        return told
    silent = [number for number in range(num_ranks) if number not in reports]
    said = {report.status for report in reports.values()} - {0}
    if silent and not is_local and not lost and launcher_status in {0, EXIT_INTERRUPTED_AND_SAVED}:
        said |= {launcher_status} - {0}
    elif silent and not is_local and launcher_status == EXIT_HANG:
        return Outcome(EXIT_HANG, "hang: the ranks made no progress; see above, and the logs of each host")
    elif len(silent) == num_ranks and not lost:
        return Outcome(
            EXIT_FAILURE,
            f"every rank crashed or was killed without a word; the launcher returned {launcher_status}, see above",
        )
    elif silent:
        names = ", ".join(map(str, (lost or silent)[:8])) + (", ..." if len(lost or silent) > 8 else "")
        return Outcome(EXIT_FAILURE, f"died without a word, killed or crashed: rank {names} of {num_ranks}", lost)
    if said - {EXIT_INTERRUPTED_AND_SAVED}:
        return Outcome(EXIT_FAILURE, f"ranks ended with status {sorted(said)}")
    return Outcome(EXIT_INTERRUPTED_AND_SAVED if said else 0)


def _told(reports: Mapping[int, Report], num_ranks: int) -> Outcome | None:
    """Return the weightiest failure that ranks have reported."""
    crashes = {number for number, report in reports.items() if report.status == EXIT_FAILURE and is_crash(report.error)}
    purposely = {number: report for number, report in sorted(reports.items()) if number not in crashes}
    ranking = [(status, purposely) for status in (EXIT_BAD_INPUT, EXIT_FAILURE, EXIT_HANG, EXIT_BUDGET)]
    for status, among in [*ranking, (EXIT_FAILURE, {number: reports[number] for number in sorted(crashes)})]:
        errors = [report.error for report in among.values() if report.status == status]
        if errors:
            return Outcome(status, next(filter(None, errors), f"a rank ended with status {status}"))
    return None


class _Supervisor:
    def __init__(
        self,
        environ: dict[str, str],
        status_dir: Path,
        num_ranks: int,
        is_local: bool,
        stop_file: Path | None,
        launcher_passes_usr1: bool,
        logs: Path | None,
        grace_s: float,
        relay: Relay | None,
        rank_hosts: Sequence[str],
        start_s: float,
    ):
        self._environ, self._run_id = environ, environ[RUN_ID]
        self._status_dir, self._num_ranks, self._is_local = status_dir, num_ranks, is_local
        self._stop_file, self._launcher_passes_usr1, self._grace_s = stop_file, launcher_passes_usr1, grace_s
        self._pending: list[int] = []
        self._interrupts = 0
        self._failed_at: float | None = None
        self._lost: tuple[int, ...] = ()
        self._watched_at = 0.0
        self._hangs = HangWatch(status_dir, logs)
        self._is_asked_to_end = False
        self._relay, self._rank_hosts, self._start_s = relay, rank_hosts, start_s
        self._hosts = tuple(dict.fromkeys(rank_hosts))
        self._first_came_at: float | None = None
        self._asked_to_end_at: float | None = None
        self._is_given_up = False

    def run(self, argv: list[str]) -> Outcome:
        with self._handling_signals():
            launcher = subprocess.Popen(argv, env=self._environ, stdin=subprocess.DEVNULL, start_new_session=True)
            try:
                while not self._is_over(launcher) and not self._is_given_up:
                    if self._interrupts > 1:
                        return Outcome(EXIT_FAILURE, "interrupted twice: killed, without a save", is_final=True)
                    self._deliver(launcher)
                    late = self._stopped_while_starting() or self._late()
                    if late is not None:
                        return late
                    hang = self._watch()
                    if hang is not None:
                        return self._marked(Outcome(EXIT_HANG, str(hang.error), hang.silent))
                    time.sleep(_POLL_S)
            finally:
                self._kill(launcher)
        status = EXIT_FAILURE if launcher.returncode is None or launcher.returncode < 0 else launcher.returncode
        reports = read_reports(self._status_dir)
        outcome = outcome_of(reports, self._num_ranks, status, self._is_local, self._lost)
        return self._marked(self._naming_hosts(outcome) if outcome.lost else outcome)

    def _naming_hosts(self, outcome: Outcome) -> Outcome:
        """Say on which hosts ranks were lost; where a host does not answer, that is all that can be said."""
        gone = self._relay.lost() if self._relay is not None else {}
        # More of them than were found first: the ranks of a host fall silent one after the other.
        silent = sorted(number for number in gone if gone[number].is_silent)
        names = ", ".join(dict.fromkeys(gone[number].host for number in silent or outcome.lost if number in gone))
        if silent:
            ranks = ", ".join(map(str, silent[:8])) + (", ..." if len(silent) > 8 else "")
            what = f"hang: {names} has not answered for {SILENCE_S} s, the host or its link is down"
            error = f"{what}: rank {ranks} of {self._num_ranks}"
            return replace(outcome, status=EXIT_HANG, error=error, lost=tuple(silent))
        return replace(outcome, error=f"{outcome.error}, on {names}") if names else outcome

    def _marked(self, outcome: Outcome) -> Outcome:
        return replace(outcome, is_final=self._is_asked_to_end, step=self._hangs.step)

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
        self._is_asked_to_end = self._is_asked_to_end or number != signal.SIGUSR1
        self._pending.append(signal.SIGTERM if number == signal.SIGHUP else number)

    def _is_over(self, launcher: subprocess.Popen[bytes]) -> bool:
        """Ask for the ranks too: a launcher that is killed from outside leaves ranks that go on to their end."""
        if launcher.poll() is None or ranks_of(self._run_id):
            return False
        return self._relay is None or not self._relay.num_connected

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
            if self._relay is not None:
                self._relay.signal(number)
            elif is_up and here:
                # The ranks agree on what to do, so that it is enough to tell some of them.
                send(set(here) & set(marked(self._run_id)), number)
            elif number == signal.SIGUSR1:
                if is_up and self._launcher_passes_usr1:
                    launcher.send_signal(number)
            elif self._stop_file is not None:
                with contextlib.suppress(OSError):
                    # Rank 0 removes a file of an earlier start when it is up; by the id it knows that this one is newer.
                    self._stop_file.write_text(self._run_id)
        self._pending.clear()

    def _stopped_while_starting(self) -> Outcome | None:
        """End a launch that shall end and does not come up: there is nothing yet to save."""
        if not self._is_asked_to_end or not self._pending:
            return None
        self._asked_to_end_at = self._asked_to_end_at or time.monotonic()
        if time.monotonic() - self._asked_to_end_at < _START_GRACE_S:
            return None
        return Outcome(EXIT_INTERRUPTED_AND_SAVED, "stopped before every rank was up", is_final=True)

    def _late(self) -> Outcome | None:
        """Tell of ranks that have not come long after the first: a host may be reached, and start nothing."""
        if self._relay is None or not self._start_s:
            return None
        came = self._relay.came
        if self._first_came_at is None:
            self._first_came_at = time.monotonic() if came else None
        if self._first_came_at is None or time.monotonic() - self._first_came_at < self._start_s:
            return None
        late = tuple(number for number in range(self._num_ranks) if number not in came)
        if not late:
            return None
        hosts = ", ".join(dict.fromkeys(self._rank_hosts[number] for number in late if number < len(self._rank_hosts)))
        ranks = ", ".join(map(str, late[:8])) + (", ..." if len(late) > 8 else "")
        where = f"rank {ranks} of {self._num_ranks} on {hosts}"
        error = f"hang: {where} has not started, {self._start_s:g} s after the first was there"
        return self._marked(Outcome(EXIT_HANG, error, late))

    def _watch(self) -> Hang | None:
        """Look for ranks that have failed, whose survivors are ended after a while, and for a hang."""
        now = time.monotonic()
        if now - self._watched_at < (_WATCH_LOCAL_S if self._is_local else _WATCH_S):
            return None
        self._watched_at = now
        if self._failed_at is None:
            reports = read_reports(self._status_dir)
            self._lost = self._find_lost(reports)
            has_failed = any(report.status not in {0, EXIT_INTERRUPTED_AND_SAVED} for report in reports.values())
            self._failed_at = now if has_failed or self._lost else None
            return None if self._failed_at else self._hangs.poll()
        if now - self._failed_at > (min(self._grace_s, _DEAD_GRACE_S) if self._lost else self._grace_s):
            send(ranks_of(self._run_id), signal.SIGKILL)
            self._is_given_up = bool(self._hosts)  # their launcher may wait for a host that is gone
        return None

    def _find_lost(self, reports: Mapping[int, Report]) -> tuple[int, ...]:
        if self._relay is not None:
            return tuple(self._relay.lost())
        host = socket.gethostname()
        waited = {
            number: entry.pid
            for number, entry in read_registrations(self._status_dir).items()
            if number not in reports and entry.host == host
        }
        dead = [number for number, pid in waited.items() if not _is_alive(pid)]
        # A rank that has ended in this moment has left its report before.
        ended = read_reports(self._status_dir) if dead else {}
        return tuple(number for number in dead if number not in ended)

    def _kill(self, launcher: subprocess.Popen[bytes]) -> None:
        """Leave no process behind, on this host and on those of the hostfile; on others by the launcher's own means."""
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
        if self._hosts and len(read_reports(self._status_dir)) < self._num_ranks:
            gone = self._relay.lost().values() if self._relay is not None else ()
            silent = {rank.host for rank in gone if rank.is_silent}
            sweep([host for host in self._hosts if host not in silent], self._run_id)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False
