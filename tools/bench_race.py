"""Run contenders in turn, each in processes of its own, and time every step of theirs from outside.

A contender is a world of ranks. All of them are built and warmed up first; then each takes a step while the others wait,
round after round, so that what else the machine does falls on all alike.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

WARM_UP = 1
ROUNDS, LEAST_ROUNDS = 5, 3
"""Rounds of a race at least, and of one that has taken PATIENCE times as long as it was given."""
PATIENCE = 4


@dataclass(frozen=True)
class Contender:
    """What takes part: `build(*arguments)` makes, on each rank, a step to be timed, or for `collect` an answer."""

    name: str
    build: Callable[..., Any]
    arguments: tuple[Any, ...]
    ranks: int = 1
    threads: int = 2
    on_gpu: bool = False


def race(contenders: list[Contender], seconds: float) -> dict[str, list[float]]:
    """Time the contenders' steps, for about `seconds`.

    Returns:
        Seconds of each step by contender, in the order of the rounds.
    """
    with contextlib.ExitStack() as stack:
        worlds = {contender.name: stack.enter_context(_World(contender)) for contender in contenders}
        for world in worlds.values():
            world.wait()
        for _ in range(WARM_UP):
            for world in worlds.values():
                world.step()
        times: dict[str, list[float]] = {name: [] for name in worlds}
        started, rounds, taken = time.monotonic(), 0, 0.0
        while rounds < LEAST_ROUNDS or taken < seconds or (rounds < ROUNDS and taken < PATIENCE * seconds):
            for name, world in worlds.items():
                times[name].append(world.step())
            rounds, taken = rounds + 1, time.monotonic() - started
    return times


def collect(contender: Contender) -> list[Any]:
    """Build a contender and return what `build` returned on each rank."""
    with _World(contender) as world:
        return world.wait()


def median_ratio(times: list[float], reference: list[float]) -> float:
    """Return the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(times, reference, strict=True))


class _World:
    """The ranks of one contender."""

    def __init__(self, contender: Contender):
        context = multiprocessing.get_context("spawn")
        self._name = contender.name
        self._directory = tempfile.TemporaryDirectory(prefix="lmscale-bench-")
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(contender.ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, contender, self._directory.name, theirs), daemon=True)
            with _environment(rank, contender):
                process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def __enter__(self) -> _World:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._directory.cleanup()

    def step(self) -> float:
        """Have every rank take a step and return the seconds until the last has."""
        started = time.perf_counter()
        for connection in self._connections:
            connection.send(None)
        self.wait()
        return time.perf_counter() - started

    def wait(self) -> list[Any]:
        """Wait until every rank has answered, and return the answers."""
        answers = []
        for connection in self._connections:
            try:
                failure, answer = connection.recv()
            except EOFError:
                failure, answer = "a rank died", None
            if failure is not None:
                raise RuntimeError(f"{self._name}: {failure}")
            answers.append(answer)
        return answers


@contextlib.contextmanager
def _environment(rank: int, contender: Contender) -> Iterator[None]:
    """Set what a rank must find when it imports torch."""
    before = dict(os.environ)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(contender.ranks), OMP_NUM_THREADS=str(contender.threads)
    )
    if not contender.on_gpu:
        os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(rank: int, contender: Contender, directory: str, connection: Connection) -> None:
    log = os.open(os.path.join(directory, f"rank-{rank}.log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(contender.threads)
        dist.init_process_group(
            "nccl" if contender.on_gpu else "gloo",
            init_method=f"file://{directory}/rendezvous",
            rank=rank,
            world_size=contender.ranks,
        )
        built = contender.build(*contender.arguments)
        connection.send((None, None if callable(built) else built))
        while True:
            connection.recv()
            built()
            connection.send((None, None))
    except EOFError:
        return
    except BaseException:
        connection.send((traceback.format_exc(), None))
