"""Replacing a file so that a reader, and a crash, see the old one or the new one and nothing between."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`, and rename it onto `path` if the block ends without an exception."""
    # The name begins with a dot and keeps nothing of the old one: TensorBoard reads any file named like its own.
    temporary = path.parent / f".replacing-{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
