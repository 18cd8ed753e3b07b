"""Which ranks write to the same files: hosts may share the run's directory, or each have its own."""

from __future__ import annotations

import contextlib
import socket
import uuid
from pathlib import Path

import torch.distributed as dist


def directory_leaders(directory: Path) -> list[int]:
    """Find, for each rank, the lowest rank that sees the same directory.

    The first rank of each host leaves a marker, and every rank looks which of them it sees.

    Args:
        directory: made on every host where it is missing.

    Returns:
        By rank; all zeros where all share it.

    Raises:
        OSError: on every rank, if it cannot be written on one host.
    Collectives: every rank must call.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    hosts: list[str] = [""] * world_size
    dist.all_gather_object(hosts, socket.gethostname())
    name = [uuid.uuid4().hex]
    dist.broadcast_object_list(name, src=0)
    marks = {first: directory / f".seen-{name[0]}-{first}" for first in {hosts.index(host) for host in hosts}}
    problem: OSError | None = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if rank in marks:
            marks[rank].touch()
    except OSError as error:
        problem = error
    problems: list[OSError | None] = [None] * world_size
    dist.all_gather_object(problems, problem)  # a barrier too: all markers are there
    seen = [first for first, mark in sorted(marks.items()) if mark.exists()]
    leaders: list[int] = [0] * world_size
    dist.all_gather_object(leaders, min(seen, default=rank))
    if rank in marks:
        with contextlib.suppress(OSError):
            marks[rank].unlink(missing_ok=True)
    for error in problems:
        if error is not None:
            raise error
    return leaders
