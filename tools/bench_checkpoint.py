"""Checkpoints beside the disk and the memory: saves against `dd`, the loop's stall against a copy, verification by the core."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench_sheet import Sheet

from lmscale.parallel.local_ranks import RankPool

ROUNDS = 5
GOAL_OF_SAVE, GOAL_OF_STALL, GOAL_OF_VERIFY = 0.7, 1.2, 1.0
_MB = 1 << 20


@dataclass
class Measured:
    """Figures of one process, by round: seconds, and the bytes that they are of."""

    num_bytes: int = 0
    save_s: list[float] = field(default_factory=list)
    dd_s: list[float] = field(default_factory=list)
    stall_s: list[float] = field(default_factory=list)
    copy_s: list[float] = field(default_factory=list)
    verify_s: list[float] = field(default_factory=list)


def measure(home: str, rounds: int) -> Measured:
    """On a rank: save, write with dd, save behind the loop, copy, verify, in turn."""
    import bench_peers
    import torch
    from bench_adaptation import LARGER

    from lmscale.parallel.topology import init_topology
    from lmscale.train.checkpoint_show import verify
    from lmscale.train.progress import Progress
    from lmscale.train.retention import Keep
    from lmscale.train.saving import Saver

    trainer = bench_peers.lmscale_trainer(bench_peers.lmscale_config(LARGER, "fp32", 0, 16, 2, 1), init_topology(1, 1))
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    trainer.step(tokens, tokens)  # makes the moments
    keep, found = Keep(newest=1), Measured()
    waiting = Saver(trainer.engine, Path(home) / "waiting", "", None, keep)
    behind = Saver(trainer.engine, Path(home) / "behind", "", None, keep, asynchronous=True)
    behind.save(Progress())  # allocates the copy's memory
    behind.finish()
    for number in range(1, rounds + 1):
        found.save_s.append(_timed(lambda number=number: waiting.save(Progress(step=number))))
        path = Path(home) / f"waiting/step-{number:08d}"
        found.num_bytes = sum(file.stat().st_size for file in path.iterdir())
        found.dd_s.append(_timed(lambda: _dd(Path(home) / "dd", found.num_bytes)))
        (Path(home) / "dd").unlink()
        source, target = torch.zeros(found.num_bytes // 4), torch.zeros(found.num_bytes // 4)
        found.copy_s.append(_timed(lambda source=source, target=target: target.copy_(source)))
        found.stall_s.append(_timed(lambda number=number: behind.save(Progress(step=number))))
        behind.finish()
        found.verify_s.append(_timed(lambda path=path: verify(path, threads=1)))
    return found


def checkpoints() -> Iterator[Sheet]:
    """Measure on one rank and make the table."""
    with tempfile.TemporaryDirectory(prefix="lmscale-bench-", dir=Path.cwd()) as home:
        with RankPool(1) as pool:
            found: Measured = pool.run(measure, home, ROUNDS, timeout_s=900)[0]
        shutil.rmtree(home, ignore_errors=True)
    size = found.num_bytes

    def speed(seconds: list[float]) -> str:
        return f"{size / 1e9 / statistics.median(seconds):.2f}"

    def ratio(ours: list[float], theirs: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))

    sheet = Sheet(
        "Checkpoints",
        ["", "GB/s", "ratio", "goal"],
        note=f"Weights and moments of one rank, {size / 1e6:,.0f} MB; medians of {ROUNDS} rounds in which all take turns. "
        "A save hashes and flushes all; dd writes zeros and flushes them (conv=fsync). The stall is the time for which the "
        "training loop stands for a save that is written behind it, the copy one of as many bytes into memory at hand. "
        "Verification reads files that are in the page cache, by one thread.",
    )
    sheet.row("dd, flushed", speed(found.dd_s), "", "")
    save = 1 / ratio(found.save_s, found.dd_s)
    sheet.row("save / dd, speed", speed(found.save_s), f"{save:.2f}", f">= {GOAL_OF_SAVE}")
    sheet.row("copy in memory", speed(found.copy_s), "", "")
    stall = ratio(found.stall_s, found.copy_s)
    sheet.row("stall / copy, time", speed(found.stall_s), f"{stall:.2f}", f"<= {GOAL_OF_STALL}")
    sheet.row("verification, one core", speed(found.verify_s), "", f">= {GOAL_OF_VERIFY} GB/s")
    yield sheet


def _dd(path: Path, num_bytes: int) -> None:
    count = -(-num_bytes // (4 * _MB))
    command = ["dd", "if=/dev/zero", f"of={path}", f"bs={4 * _MB}", f"count={count}", "conv=fsync", "status=none"]
    subprocess.run(command, check=True)


def _timed(action: object) -> float:
    started = time.perf_counter()
    action()  # type: ignore[operator]
    return time.perf_counter() - started
