"""What a rank and its supervisor tell each other, through small files in a directory named by the environment.

Ranks on the hosts of a hostfile send the same by a connection (lmscale.launcher.link), and the supervisor writes the files.

A rank registers (its process id, once it handles signals), tells from time to time where it is, and, when it ends,
reports its exit status and error line.
DeepSpeed's launcher cannot carry this: it returns the status of whichever rank failed first, and 1 for its own signals.
Without a supervisor, under the bare `deepspeed` or `torchrun`, nothing is written and a rank's status is its own.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lmscale.errors import (
    EXIT_BAD_INPUT,
    EXIT_BUDGET,
    EXIT_FAILURE,
    EXIT_INTERRUPTED_AND_SAVED,
    HangError,
    LmscaleError,
    RunError,
)
from lmscale.launcher.link import Link
from lmscale.log import get_logger
from lmscale.train.pulse import Beat

STATUS_DIR = "LMSCALE_STATUS_DIR"
"""Environment: the directory of these files; absent without a supervisor."""
STATUS_ADDRESS = "LMSCALE_STATUS_ADDRESS"
"""Environment: where the supervisor listens, as HOST:PORT, for ranks that cannot be sure to see its files."""
RUN_ID = "LMSCALE_RUN_ID"
"""Environment: marks every process of one launch, so that none is left behind."""
STATUS_BY_FILE = "LMSCALE_STATUS_BY_FILE"
"""Environment: "1" where the supervisor sees every report. A rank then ends with 0 after 2, 75
or 77, because DeepSpeed's launcher kills the other ranks as soon as one returns anything else, mid-save included."""

STARTED_AT = "LMSCALE_STARTED_AT"
"""Environment: seconds since the epoch when `lmscale train` began, before restarts; absent without it."""

KINDS = ("pid", "status", "beat")
"""Of what a rank tells: that it is up, how it ended, where it is."""

_PATIENCE_S = 1.0
_HANG_PATIENCE_S = 2.0
"""For the watchdogs of the other ranks, before a launcher ends them for this one's sake."""
_SUPERVISOR_PATIENCE_S = 45.0
"""For a supervisor that has heard of the hang to collect stacks and end everything."""


@dataclass(frozen=True)
class Registration:
    """A rank that is up and handles signals."""

    pid: int
    host: str


@dataclass(frozen=True)
class Report:
    """How a rank ended."""

    status: int
    error: str


def rank() -> int:
    """Return this process's global rank; 0 outside a launch."""
    return int(os.environ.get("RANK", "0"))


def is_supervised() -> bool:
    """Tell whether there is a supervisor, which tells the user how the run ended."""
    return STATUS_DIR in os.environ or STATUS_ADDRESS in os.environ


def register() -> None:
    """Tell the supervisor that this rank handles signals from now on; without a supervisor, do nothing."""
    _write("pid", f"{os.getpid()}\n{socket.gethostname()}")


def report(status: int, error: str = "") -> int:
    """Record how this rank ends.

    Args:
        status: its exit status.
        error: its error line, for the supervisor to print.

    Returns:
        The status that the process should exit with.
    """
    if _link is not None:
        _link.close()
    recorded = _write("status", f"{status}\n{error}")
    told = {EXIT_BAD_INPUT, EXIT_INTERRUPTED_AND_SAVED, EXIT_BUDGET}
    return 0 if recorded and status in told and os.environ.get(STATUS_BY_FILE) == "1" else status


def tell(beat: Beat) -> bool:
    """Tell the supervisor where this rank is; without one that could hear it, do nothing and return False."""
    return _write("beat", beat.to_json())


def end_hung(error: HangError, is_heard: bool) -> None:
    """End this process, from its watchdog's thread, without waiting for what its other threads do.

    Args:
        error: what to report.
        is_heard: a supervisor knows and will end all ranks; if it does not, this one ends by itself.
    """
    if not is_heard and int(os.environ.get("LOCAL_RANK", "0")) < 2:
        # A launcher ends everything with the first rank, and rank 0 may be the one that cannot speak.
        sys.stderr.write(f"error: {error}\n")
    time.sleep(_SUPERVISOR_PATIENCE_S if is_heard else _HANG_PATIENCE_S)
    os._exit(report(error.exit_status, str(error)))


def run_rank(body: Callable[[], int]) -> int:
    """Run a rank's work, say what went wrong in one line, and report its status.

    Of an error that all ranks find alike (a wrong config), one line is printed: by the supervisor, or by rank 0 where
    there is none; every rank logs its own. An error that is no LmscaleError keeps its traceback.

    Returns:
        The status that the process should exit with: `sys.exit(run_rank(main))`.
    """
    try:
        _connect()
        return report(body())
    except LmscaleError as error:
        _say(error)
        return report(error.exit_status, str(error))
    except SystemExit as error:
        return report(error.code if isinstance(error.code, int) else EXIT_FAILURE if error.code else 0)
    except Exception as error:
        sys.stderr.write(traceback.format_exc())
        return report(EXIT_FAILURE, f"rank {rank()} failed: {type(error).__name__}: {error}".splitlines()[0])


def is_crash(error: str) -> bool:
    """Tell the error line of a rank that failed unawares, perhaps because another was gone, from one told on purpose."""
    return re.match(r"rank \d+ failed: ", error) is not None


def read_registrations(directory: Path) -> dict[int, Registration]:
    """Read who has registered, by rank."""
    found = {}
    for number, text in _read(directory, "pid"):
        pid, _, host = text.partition("\n")
        found[number] = Registration(int(pid), host)
    return found


def read_reports(directory: Path) -> dict[int, Report]:
    """Read who has ended, by rank."""
    found = {}
    for number, text in _read(directory, "status"):
        status, _, error = text.partition("\n")
        found[number] = Report(int(status), error)
    return found


def read_beats(directory: Path) -> dict[int, Beat]:
    """Read where the ranks were last, by rank."""
    return {number: Beat.from_json(text) for number, text in _read(directory, "beat")}


def _say(error: LmscaleError) -> None:
    if is_supervised() and not isinstance(error, _Unsupervised):
        return
    if rank() == 0 or isinstance(error, _Unsupervised):
        sys.stderr.write(f"error: {error}\n")
        return
    get_logger(__name__).error("error: %s", error)
    # A launcher kills the others when the first rank fails; rank 0 is the one that says why.
    time.sleep(_PATIENCE_S)


class _Unsupervised(RunError):
    """There should be a supervisor, and it cannot be reached."""


_link: Link | None = None


def _connect() -> None:
    """Connect to the supervisor where it listens; the connection lasts as long as this process."""
    global _link
    address = os.environ.get(STATUS_ADDRESS)
    if address is None or _link is not None:
        return
    try:
        _link = Link(address, os.environ[RUN_ID], rank(), _end_alone)
    except OSError as error:
        remedy = "let the hosts of a run reach each other by TCP"
        raise _Unsupervised(f"cannot reach lmscale train at {address}: {error}", remedy=remedy) from None


def _end_alone(reason: str) -> None:
    """End this process, from the connection's thread: nobody is left who could."""
    line = f"error: rank {rank()} on {socket.gethostname()} has lost lmscale train at {os.environ[STATUS_ADDRESS]}: {reason}"
    with contextlib.suppress(OSError):
        get_logger(__name__).error("%s", line.removeprefix("error: "))
        sys.stderr.write(line + "\n")
    os._exit(EXIT_FAILURE)


def _write(kind: str, text: str) -> bool:
    if _link is not None:
        return _link.send(kind, text)
    directory = os.environ.get(STATUS_DIR)
    return directory is not None and put(Path(directory), rank(), kind, text)


def put(directory: Path, number: int, kind: str, text: str) -> bool:
    """Write what a rank tells; a reader sees all of it or what was there before."""
    path = directory / f"rank-{number:05d}.{kind}"
    partial = path.with_suffix(f".{kind}.partial")
    try:
        partial.write_text(text)
        partial.replace(path)
    except OSError:
        # A full disk must not hide the failure that is being reported; the supervisor takes silence for a failure.
        return False
    return True


def _read(directory: Path, kind: str) -> list[tuple[int, str]]:
    return [
        (int(path.stem.removeprefix("rank-")), path.read_text()) for path in sorted(directory.glob(f"rank-*.{kind}"))
    ]
