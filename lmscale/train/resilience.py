"""Requests to stop: signals and the stop file, agreed on by all ranks between two steps."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from lmscale.log import get_logger

_log = get_logger(__name__)

STOP_FILE = "STOP"
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Notices SIGTERM, SIGINT and output_dir/STOP, and makes all ranks stop after the same step.

    Signals come to the ranks through `lmscale train`. Under the bare `deepspeed` command, whose launcher loses ranks on
    a signal, the stop file is the way.
    """

    def __init__(self, output_dir: Path, device: torch.device):
        self._file = output_dir / STOP_FILE
        self._flag = torch.zeros(1, dtype=torch.int32, device=device)
        self._signal: int | None = None

    def install(self) -> None:
        """Handle the signals from now on."""
        for number in _SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._signal = number

    def is_agreed(self) -> bool:
        """Tell whether any rank was asked to stop.

        Collectives: a maximum over all ranks.
        """
        asked = self._signal is not None or (dist.get_rank() == 0 and self._file.exists())
        self._flag.fill_(int(asked))
        dist.all_reduce(self._flag, op=dist.ReduceOp.MAX)
        return bool(self._flag.item())

    def clear(self) -> None:
        """Remove the stop file, so that the next start goes on; call on rank 0."""
        self._file.unlink(missing_ok=True)
