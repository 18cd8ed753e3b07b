"""Ranks on this host, on the CPU over gloo: forked from a process that has imported everything, joined over a file.

A spawned rank imports torch, DeepSpeed and megatron-core for ten seconds; a forked one is there at once. A failure in a
rank reaches the caller with the rank's traceback; a hang fails after a time, names the ranks and shows where they are.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from lmscale.parallel.inherited import keep_inherited_groups

TIMEOUT_S = 240.0
_GRACE_S = 5.0
"""Seconds that the other ranks get to answer once one has failed; most of them wait for it in a collective."""
_TICK_S = 0.2
_STACKS_S = 0.5
"""What a rank that hangs gets to write its stacks."""
_LOG_NAME = "rank-{:04d}.log"
_PR_SET_PDEATHSIG = 1


class RankFailure(Exception):
    """A rank raised, died or hung; the text names it and holds its traceback.

    Attributes:
        reason: the first failure, in one line.
    """

    def __init__(self, failures: list[tuple[str, str]]):
        """Make one of (one line, the whole text) for each failure, in the order in which they came."""
        super().__init__("\n".join(text for _, text in failures))
        self.reason = failures[0][0]


class RankPool:
    """A world of ranks that wait for functions to run together.

    Args:
        world_size: how many.
        logs: directory for what each rank writes to stdout and stderr, rank-NNNN.log; left out, it goes when the pool
            is closed.
    """

    def __init__(self, world_size: int, logs: Path | None = None):
        # Imported before the fork, so that no rank imports it again.
        import deepspeed  # noqa: F401
        import megatron.core  # noqa: F401

        self.world_size, self.is_closed = world_size, False
        self._directory = tempfile.TemporaryDirectory(prefix="lmscale-ranks-")
        self._logs = logs = logs or Path(self._directory.name)
        logs.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("fork")
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            arguments = (rank, world_size, Path(self._directory.name), logs, os.getpid(), theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, function: Any, *args: Any, timeout_s: float = TIMEOUT_S, tick: Callable[[], None] | None = None
    ) -> list[Any]:
        """Run a module-level function(*args) on every rank, in the directory of the caller.

        Args:
            function: pickled by name.
            args: pickled.
            timeout_s: until when every rank has answered.
            tick: called several times a second on the way.

        Returns:
            The results, by rank.

        Raises:
            RankFailure: the pool is closed then.
        """
        payload = pickle.dumps((function, args, os.getcwd()))
        failures: list[tuple[str, str]] = []
        for rank, connection in enumerate(self._connections):
            try:
                connection.send_bytes(payload)
            except OSError:
                failures.append(self._death_of(rank))
        results = {} if failures else self._collect(failures, timeout_s, tick)
        if failures:
            self.close()
            raise RankFailure(failures)
        return [results[rank] for rank in range(self.world_size)]

    def _collect(
        self, failures: list[tuple[str, str]], timeout_s: float, tick: Callable[[], None] | None
    ) -> dict[int, Any]:
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        waiting: dict[Any, int] = {connection: rank for rank, connection in enumerate(self._connections)}
        while waiting:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                # Who waits for a rank that has failed is not to blame.
                if not failures:
                    line = f"ranks {sorted(waiting.values())} did not answer within {timeout_s:.0f} s"
                    failures.append((line, "\n".join((line, *map(self._stacks_of, sorted(waiting.values()))))))
                break
            for connection in wait(list(waiting), timeout=min(_TICK_S, left_s)):
                rank = waiting.pop(connection)
                try:
                    kind, value = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, OSError):
                    kind, value = "error", self._death_of(rank)
                if kind == "error":
                    failures.append(value)
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
                else:
                    results[rank] = value
            if tick is not None:
                tick()
        return results

    def _stacks_of(self, rank: int) -> str:
        """Return where the threads of a rank that hangs are."""
        log = self._log_of(rank)
        start = log.stat().st_size if log.exists() else 0
        process = self._processes[rank]
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)
            time.sleep(_STACKS_S)
        text = log.read_bytes()[start:].decode(errors="replace").strip() if log.exists() else ""
        return f"rank {rank}:\n{text or 'it does not say where it is'}"

    def _log_of(self, rank: int) -> Path:
        return self._logs / _LOG_NAME.format(rank)

    def _death_of(self, rank: int) -> tuple[str, str]:
        process = self._processes[rank]
        process.join(1.0)
        status = process.exitcode
        cause = "" if status is None else f" of signal {-status}" if status < 0 else f" with status {status}"
        line = f"rank {rank} died{cause}"
        return line, line

    def close(self) -> None:
        """End the ranks."""
        self.is_closed = True
        for process in self._processes:
            process.kill()
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.join()
            connection.close()
        self._directory.cleanup()


def _serve(rank: int, world_size: int, directory: Path, logs: Path, parent: int, connection: Connection) -> None:
    _end_with_parent(parent)
    warnings.simplefilter("default")  # a parent that makes errors of warnings, as pytest does, means its own
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _write_to(logs / _LOG_NAME.format(rank))
    keep_inherited_groups()
    _join(rank, world_size, directory)
    while True:
        try:
            payload = connection.recv_bytes()
        except EOFError:
            return
        try:
            function, args, working_directory = pickle.loads(payload)
            os.chdir(working_directory)
            answer: tuple[str, Any] = ("result", function(*args))
        except BaseException as error:
            text = traceback.format_exc()
            sys.stderr.write(text)
            answer = ("error", (f"rank {rank}: {_one_line(error)}", f"rank {rank}:\n{text}"))
        _drop_groups()
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send_bytes(pickle.dumps(answer))


def _drop_groups() -> None:
    """Leave the groups that a function has made: each keeps gloo threads that wake up a hundred times a second."""
    import torch.distributed as dist
    from deepspeed.utils import groups
    from torch.distributed import distributed_c10d

    gc.collect()
    world = distributed_c10d.GroupMember.WORLD
    for group in list(distributed_c10d._world.pg_map):
        if group is not world:
            dist.destroy_process_group(group)
    groups._WORLD_GROUP = None  # DeepSpeed's copy of the world, dropped above
    gc.collect()


def _end_with_parent(parent: int) -> None:
    """Let the kernel end this rank when its parent is gone: a killed parent closes no pool."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _write_to(path: Path) -> None:
    """Send stdout and stderr to a file, those of C++ code and of handlers made before the fork too."""
    file = path.open("a", buffering=1)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file
    faulthandler.enable(file)
    faulthandler.register(signal.SIGUSR1, file)


def _join(rank: int, world_size: int, directory: Path) -> None:
    # No GPU, even where the parent has seen one: a forked process cannot use what its parent initialized.
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        DS_ACCELERATOR="cpu",
        CUDA_VISIBLE_DEVICES="",
    )
    import torch
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    torch.cuda.is_available = lambda: False
    if not isinstance(get_accelerator(), CPU_Accelerator):
        set_accelerator(CPU_Accelerator())
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world_size)


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
