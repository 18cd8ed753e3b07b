"""What others ask of a running run, by signals and the stop file, agreed on by all ranks between two steps."""

from __future__ import annotations

import enum
import signal
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

STOP_FILE = "STOP"


class Request(enum.IntEnum):
    """In rising urgency: the most urgent that any rank got holds for all."""

    NONE = 0
    SAVE = 1
    """SIGUSR1: save and go on."""
    STOP = 2
    """SIGTERM, SIGINT or output_dir/STOP: save and end."""


_SIGNALS = {signal.SIGTERM: Request.STOP, signal.SIGINT: Request.STOP, signal.SIGUSR1: Request.SAVE}


class Requests:
    """Notices requests and makes all ranks see the same one after the same step.

    Signals come to the ranks through `lmscale train`. Under the bare `deepspeed` command, whose launcher loses ranks on
    a signal, the stop file is the way.
    """

    def __init__(self, output_dir: Path, device: torch.device):
        self._file = output_dir / STOP_FILE
        self._flag = torch.zeros(1, dtype=torch.int32, device=device)
        self._noted = Request.NONE

    def install(self) -> None:
        """Handle the signals from now on, and forget a stop file that an earlier start left."""
        if dist.get_rank() == 0:
            self.clear()
        for number in _SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._noted = max(self._noted, _SIGNALS[signal.Signals(number)])

    def agreed(self) -> Request:
        """Return the most urgent request that any rank got since the last call.

        Collectives: a maximum over all ranks.
        """
        noted, self._noted = self._noted, Request.NONE
        if dist.get_rank() == 0 and self._file.exists():
            noted = Request.STOP
        self._flag.fill_(int(noted))
        dist.all_reduce(self._flag, op=dist.ReduceOp.MAX)
        return Request(int(self._flag.item()))

    def clear(self) -> None:
        """Remove the stop file, so that the next start goes on; call on rank 0."""
        self._file.unlink(missing_ok=True)
