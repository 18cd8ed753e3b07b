"""What others ask of a running run, by signals and the stop file, agreed on by all ranks between two steps."""

from __future__ import annotations

import enum
import os
import signal
import time
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from lmscale.log import get_logger

_log = get_logger(__name__)

STOP_FILE = "STOP"


class Request(enum.IntEnum):
    """In rising urgency: the most urgent that any rank got holds for all."""

    NONE = 0
    SAVE_EPHEMERAL = 1
    """checkpoint.ephemeral_minutes are over: save what goes with the next checkpoint."""
    SAVE = 2
    """SIGUSR1: save and go on."""
    STOP = 3
    """SIGTERM, SIGINT, output_dir/STOP, or train.max_minutes are over: save and end."""


_SIGNALS = {signal.SIGTERM: Request.STOP, signal.SIGINT: Request.STOP, signal.SIGUSR1: Request.SAVE}


class Requests:
    """Notices requests and makes all ranks see the same one after the same step.

    Signals come to the ranks through `lmscale train`. Under the bare `deepspeed` command, whose launcher loses ranks on
    a signal, the stop file is the way.
    """

    def __init__(
        self,
        output_dir: Path,
        device: torch.device,
        ephemeral_minutes: float = 0,
        max_minutes: float = 0,
        *,
        started_at: float | None = None,
        run_id: str | None = None,
    ):
        """Take requests for a run.

        Args:
            output_dir: where the stop file may appear.
            device: for the collective.
            ephemeral_minutes: from a checkpoint to an ephemeral one; 0 asks for none.
            max_minutes: from the run's start to a stop; 0 sets no limit. Rank 0's clock decides.
            started_at: seconds since the epoch; left out, when this process started.
            run_id: of this launch. A stop file that holds it is of this launch's supervisor, and newer than the start.
        """
        self._file = output_dir / STOP_FILE
        self._ephemeral_s = ephemeral_minutes * 60
        self._saved_at_s = time.monotonic()
        self._run_id, self._max_minutes = run_id, max_minutes
        self._ends_at_s = (_process_start() if started_at is None else started_at) + max_minutes * 60
        self._flag = torch.zeros(1, dtype=torch.int32, device=device)
        self._noted = Request.NONE

    def install(self) -> None:
        """Handle the signals from now on, and forget a stop file that an earlier start left."""
        if dist.get_rank() == 0 and not self._is_ours():
            self.clear()
        for number in _SIGNALS:
            signal.signal(number, self._note)

    def _is_ours(self) -> bool:
        """Tell whether the supervisor of this launch asked to stop while the ranks were starting."""
        try:
            return self._run_id is not None and self._file.read_text().strip() == self._run_id
        except (OSError, UnicodeDecodeError):
            return False

    def _note(self, number: int, _: FrameType | None) -> None:
        self._noted = max(self._noted, _SIGNALS[signal.Signals(number)])

    def agreed(self) -> Request:
        """Return the most urgent request that any rank got since the last call.

        Collectives: a maximum over all ranks.
        """
        noted, self._noted = self._noted, Request.NONE
        if dist.get_rank() == 0 and (self._file.exists() or self._is_over()):
            noted = Request.STOP
        is_due = self._ephemeral_s > 0 and time.monotonic() - self._saved_at_s >= self._ephemeral_s
        if dist.get_rank() == 0 and is_due:
            noted = max(noted, Request.SAVE_EPHEMERAL)
        self._flag.fill_(int(noted))
        dist.all_reduce(self._flag, op=dist.ReduceOp.MAX)
        return Request(int(self._flag.item()))

    def _is_over(self) -> bool:
        if not self._max_minutes or time.time() < self._ends_at_s:
            return False
        _log.info("train.max_minutes = %g are over", self._max_minutes)
        return True

    @property
    def stops_here(self) -> bool:
        """Whether this rank was asked to stop since the last call of `agreed`, or the stop file is there."""
        return self._noted is Request.STOP or self._file.exists()

    def saved(self) -> None:
        """Note that a checkpoint is being written: the next ephemeral one is due so many minutes from now."""
        self._saved_at_s = time.monotonic()

    def clear(self) -> None:
        """Remove the stop file, so that the next start goes on; call on rank 0."""
        self._file.unlink(missing_ok=True)


def _process_start() -> float:
    """Return when this process started, in seconds since the epoch (Linux: /proc)."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
