"""Directories that appear when they are whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from lmscale.errors import ConversionError, OutputError


def check_free(target: Path) -> None:
    """Refuse to write where something is.

    Raises:
        ConversionError: if the path exists.
    """
    if target.exists() or target.is_symlink():
        raise ConversionError("exists already", field=str(target), remedy="name a new directory, or remove it")


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Make a directory under a temporary name, and give it its own if the block ends without an exception.

    Yields: the temporary directory, beside the target.

    Raises:
        ConversionError: if the target exists.
        OutputError: if it cannot be written.
    """
    check_free(target)
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        for path in [*partial.rglob("*"), partial]:
            _flush(path)
        check_free(target)
        partial.rename(target)
        _flush(target.parent)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot be written: {error}", field=str(target)) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
