"""The processes of a launch, found by the mark in their environment (Linux: /proc)."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path

from lmscale.launcher.status import RUN_ID

_RANKS = (b"RANK=", b"OMPI_COMM_WORLD_RANK=", b"PMI_RANK=")
"""Of Slurm's tasks SLURM_PROCID would tell, but a batch script has it too; srun passes signals on by itself."""


def marked(mark: str, variable: str = RUN_ID) -> dict[int, bool]:
    """Find the living processes of a launch: for each id, whether it belongs to a rank (or is the launcher's).

    Zombies have no environment any more and do not count.
    """
    wanted = f"{variable}={mark}".encode()
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            variables = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if wanted in variables:
            found[int(path.name)] = any(each.startswith(_RANKS) for each in variables)
    return found


def ranks_of(run_id: str) -> list[int]:
    """List the rank processes of a launch, and what they have started."""
    return [pid for pid, is_rank in marked(run_id).items() if is_rank]


def send(pids: Iterable[int], number: int) -> None:
    """Send a signal to processes that may be gone by now."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.Signals(number))
