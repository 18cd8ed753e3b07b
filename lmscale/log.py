"""Logging that knows its rank: the console belongs to rank 0, every rank keeps a file.

What DeepSpeed, megatron-core and torch say goes to the rank's file only, warnings and worse included, so that the
console shows the run and nothing else.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module of ours; `name` is its `__name__`."""
    return logging.getLogger(name)


def setup_logging(rank: int, directory: Path | None = None) -> None:
    """Route our messages to the console on rank 0, and everybody's to `directory`/rank-NNNN.log.

    Args:
        rank: global rank; only rank 0 writes to the console.
        directory: where the rank logs go, created if missing; None keeps no files.
    """
    ours, root = logging.getLogger("lmscale"), logging.getLogger()
    for logger in (ours, root):
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
    root.setLevel(logging.INFO)
    ours.setLevel(logging.INFO)
    if rank == 0:
        console = logging.StreamHandler(sys.stderr)
        console.setFormatter(logging.Formatter("%(message)s"))
        ours.addHandler(console)
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(log_file(rank, directory))
        file.setFormatter(logging.Formatter(_FORMAT))
        root.addHandler(file)
    else:
        root.addHandler(logging.NullHandler())
    # A full disk is said once, by what has to be written there, and not for each line of a log.
    logging.raiseExceptions = False
    logging.captureWarnings(True)
    _capture_third_party()


def log_file(rank: int, directory: Path) -> Path:
    """Name a rank's log in the directory of logs."""
    return directory / f"rank-{rank:04d}.log"


@contextlib.contextmanager
def prints_logged(name: str) -> Iterator[None]:
    """Send what a library prints within the block to its logger instead, `name`, and so to the rank's file."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        for line in printed.getvalue().splitlines():
            logging.getLogger(name).info(line)


def _capture_third_party() -> None:
    """Take the handlers of loggers that write to the console by themselves, so that they speak through the root."""
    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0].lower() in {"deepspeed", "megatron", "torch"}:
            logger = logging.getLogger(name)
            logger.handlers.clear()
            logger.propagate = True
