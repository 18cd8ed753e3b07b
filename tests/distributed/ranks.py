"""Ranks for tests: forked once for each world size, reused, joined over a file store.

A failure in a rank reaches pytest with the rank's traceback; a hang fails after a time and names the ranks.
"""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection, wait
from typing import Any

TIMEOUT_S = 240.0

_pools: dict[int, Pool] = {}


class RankFailure(AssertionError):
    """A rank raised, died or hung; the message names it and holds its traceback."""


class Pool:
    """A world of ranks that wait for functions to run together."""

    def __init__(self, world_size: int):
        # Imported before the fork, so that each rank does not import it again.
        import deepspeed  # noqa: F401
        import megatron.core  # noqa: F401

        self.world_size = world_size
        context = multiprocessing.get_context("fork")
        self._directory = tempfile.TemporaryDirectory(prefix="lmscale-ranks-")
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, self._directory.name, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, function: Any, *args: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
        """Run function(*args) on every rank and return the results by rank."""
        payload = pickle.dumps((function, args))
        for connection in self._connections:
            connection.send_bytes(payload)
        results: dict[int, Any] = {}
        failures: list[str] = []
        deadline = time.monotonic() + timeout_s
        waiting = {connection: rank for rank, connection in enumerate(self._connections)}
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                failures.append(f"ranks {sorted(waiting.values())} did not answer within {timeout_s:.0f} s")
                break
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[arg-type]
                try:
                    kind, value = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    failures.append(f"rank {rank} died")
                    continue
                if kind == "error":
                    failures.append(f"rank {rank}:\n{value}")
                    deadline = min(deadline, time.monotonic() + 5.0)
                else:
                    results[rank] = value
        if failures:
            self.close()
            raise RankFailure("\n".join(failures))
        return [results[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        """End the ranks."""
        _pools.pop(self.world_size, None)
        for process in self._processes:
            process.kill()
            process.join()
        self._directory.cleanup()


def run_ranks(world_size: int, function: Any, *args: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
    """Run a module-level function on `world_size` ranks, on CPU over gloo, and return the results by rank."""
    if world_size not in _pools:
        _pools[world_size] = Pool(world_size)
    return _pools[world_size].run(function, *args, timeout_s=timeout_s)


@atexit.register
def close_pools() -> None:
    """End every rank of every pool."""
    for pool in list(_pools.values()):
        pool.close()


def _serve(rank: int, world_size: int, directory: str, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable(open(os.path.join(directory, f"fault-{rank}.log"), "w"))  # noqa: SIM115
    sys.stdout = open(os.path.join(directory, f"out-{rank}.log"), "w")  # noqa: SIM115
    sys.stderr = sys.stdout
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), DS_ACCELERATOR="cpu")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world_size)
    while True:
        try:
            payload = connection.recv_bytes()
        except EOFError:
            return
        try:
            function, args = pickle.loads(payload)
            answer: tuple[str, Any] = ("result", function(*args))
        except BaseException:
            answer = ("error", traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))
