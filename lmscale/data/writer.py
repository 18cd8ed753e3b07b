"""Write a tokenized corpus so that it appears whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from lmscale.data.index_file import bin_path, idx_path, write_index
from lmscale.data.manifest import Manifest, manifest_path, sha256_of_file
from lmscale.errors import DataError, OutputError

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class CorpusWriter:
    """Append documents to PREFIX.bin; `finish` gives the files their names, the .idx last.

    Until then they are called PREFIX.*.partial, and leaving the context without `finish` removes them. A killed process
    leaves them behind, and the next run on the prefix overwrites them. A former corpus at the prefix stays usable
    until `finish`, which removes its .idx first: whatever happens, an .idx never stands beside the .bin of another.

    Args:
        prefix: the output, its directory created if missing.
        dtype: of the tokens.

    Raises:
        DataError: if another process writes to the prefix.
        OutputError: here and in each method, if the disk is full or cannot be written.
    """

    def __init__(self, prefix: str | Path, dtype: type[np.integer[Any]]):
        self._dtype = dtype
        self._lengths: list[NDArray[np.int32]] = []
        self._counts: list[NDArray[np.int32]] = []
        self.num_documents, self.num_tokens = 0, 0
        self._names = {_partial(path): path for path in (bin_path(prefix), manifest_path(prefix), idx_path(prefix))}
        self._bin_partial, self._json_partial, self._idx_partial = self._names
        with disk_errors(self._bin_partial):
            self._bin_partial.parent.mkdir(parents=True, exist_ok=True)
            self._bin = _open_alone(self._bin_partial)

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for partial in self._names:
            partial.unlink(missing_ok=True)
        # The error on its way out says it all; what the buffer still holds is not wanted.
        with suppress(OSError):
            self._bin.close()

    def append(self, tokens: bytes, lengths: NDArray[np.int32], counts: NDArray[np.int32] | None = None) -> None:
        """Append documents.

        Args:
            tokens: of all of them, in the writer's dtype.
            lengths: int32 [sentences], in tokens.
            counts: int32 [documents], sentences of each document; None where each is one.
        """
        counts = np.ones_like(lengths) if counts is None else counts
        with disk_errors(self._bin_partial):
            self._bin.write(tokens)
        self._lengths.append(lengths)
        self._counts.append(counts)
        self.num_documents += len(counts)
        self.num_tokens += int(lengths.sum(dtype=np.int64))

    def finish(self, make_manifest: Callable[[str, int], Manifest]) -> Manifest:
        """Write the index and the manifest, and let all three appear.

        Args:
            make_manifest: from the SHA-256 of the .idx and the bytes of the .bin.
        """
        lengths, counts = (np.concatenate([np.zeros(0, np.int32), *parts]) for parts in (self._lengths, self._counts))
        with disk_errors(self._bin_partial):
            self._bin.flush()
            os.fsync(self._bin.fileno())
        _write_durably(self._idx_partial, lambda file: write_index(file, self._dtype, lengths, counts))
        manifest = make_manifest(sha256_of_file(self._idx_partial), self._bin_partial.stat().st_size)
        _write_durably(self._json_partial, lambda file: file.write(manifest.to_json().encode()))
        with disk_errors(self._bin_partial):
            self._names[self._idx_partial].unlink(missing_ok=True)
            for partial, path in self._names.items():
                os.replace(partial, path)
            _sync_directory(self._bin_partial.parent)
        return manifest


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _open_alone(path: Path) -> IO[bytes]:
    file = path.open("ab", buffering=1 << 20)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        remedy = "wait, or choose another --output"
        raise DataError("another process is writing it", field=str(path), remedy=remedy) from None
    except OSError:
        pass  # A file system without locks: two writers at once are then the user's care.
    file.truncate(0)
    return file


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Say in one line that a write failed, and that nothing half-written is left."""
    try:
        yield
    except OSError as error:
        rule = "the disk is full" if error.errno in _DISK_FULL else f"cannot be written: {error.strerror}"
        remedy = "nothing was kept; free some space or choose another --output"
        raise OutputError(rule, field=str(path), remedy=remedy) from None


def _write_durably(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    with disk_errors(path), path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
