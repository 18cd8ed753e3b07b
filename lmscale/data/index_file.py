"""The format of .bin/.idx, which is megatron-core's: its IndexedDataset reads what we write, and we read what it wrote.

    .bin  token ids, document after document, nothing between them
    .idx  magic, version u64, dtype code u8, S u64, D + 1 u64, little-endian; then lengths i32 [S] in tokens,
          pointers i64 [S] in bytes, document_indices i64 [D + 1]: document d is the sequences from
          document_indices[d] up to document_indices[d + 1]

A sequence is a sentence, or the whole document in a corpus without sentences.

It is read and written here, and not through megatron-core, so that `lmscale tokenize`, `lmscale data inspect` and the
checks of `lmscale train` do not import torch for some seconds; the tests hold both to be the same, byte for byte.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from lmscale.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.integer[Any]]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_REMEDY = "make it again: lmscale tokenize"


@dataclass(frozen=True)
class Index:
    """What a valid .idx says.

    Attributes:
        dtype: of the tokens in the .bin.
        document_offsets: int64 [num_documents + 1], the first token of each document, and the end.
        sentence_offsets: int64 [num_sentences + 1], the first token of each sentence, and the end.
        document_sentences: int64 [num_documents + 1], the first sentence of each document, and the end.
    """

    dtype: np.dtype[Any]
    document_offsets: NDArray[np.int64]
    sentence_offsets: NDArray[np.int64]
    document_sentences: NDArray[np.int64]


def bin_path(prefix: str | Path) -> Path:
    """Name the file of the tokens."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """Name the file of the lengths; a corpus is complete where it exists."""
    return Path(f"{prefix}.idx")


def dtype_for(vocab_size: int) -> type[np.integer[Any]]:
    """Choose the smallest dtype that holds the ids of a vocabulary, of the two that megatron-core writes."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


def write_index(
    file: IO[bytes], dtype: type[np.integer[Any]], lengths: NDArray[np.int32], counts: NDArray[np.int32]
) -> None:
    """Write the .idx of a .bin.

    Args:
        file: open for writing.
        dtype: of the tokens.
        lengths: int32 [num_sentences], in tokens.
        counts: int32 [num_documents], sentences of each document.
    """
    ends = np.cumsum(lengths, dtype=np.int64) * np.dtype(dtype).itemsize
    pointers, bounds = _from_zero(ends)[:-1], _from_zero(np.cumsum(counts, dtype=np.int64))
    file.write(_HEADER.pack(_MAGIC, 1, _CODES[dtype], len(lengths), len(bounds)))
    for array in (lengths.astype("<i4"), pointers.astype("<i8"), bounds.astype("<i8")):
        file.write(array.tobytes())


def _from_zero(ends: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), ends])


def read_index(prefix: str | Path) -> Index:
    """Read PREFIX.idx and check it against the size of PREFIX.bin.

    Raises:
        DataError: naming the file that is missing, empty, truncated or foreign.
    """
    path = idx_path(prefix)
    for file in (path, bin_path(prefix)):
        if not file.is_file():
            raise DataError("there is no such file", field=str(file), remedy="give the prefix of a .bin and an .idx")
        if file.stat().st_size == 0:
            raise DataError("is empty", field=str(file), remedy=_REMEDY)
    dtype, num_sequences, num_bounds = _read_header(path)
    content = np.memmap(path, np.uint8, "r", offset=_HEADER.size)
    sizes = (4 * num_sequences, 8 * num_sequences, 8 * num_bounds)
    # Behind the arrays, a multimodal index holds one byte for each sequence.
    if content.size not in (sum(sizes), sum(sizes) + num_sequences):
        raise DataError(
            f"holds {content.size + _HEADER.size} bytes, and its header is of {sum(sizes) + _HEADER.size}: truncated",
            field=str(path),
            remedy=_REMEDY,
        )
    lengths, pointers, bounds = np.split(content[: sum(sizes)], np.cumsum(sizes)[:-1])
    return _check(
        prefix, dtype, np.asarray(lengths).view("<i4"), np.asarray(pointers).view("<i8"), np.asarray(bounds).view("<i8")
    )


def _read_header(path: Path) -> tuple[np.dtype[Any], int, int]:
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if not header.startswith(_MAGIC[: len(header)]):
        raise DataError("is not an index of megatron-core", field=str(path), remedy=_REMEDY)
    if len(header) < _HEADER.size:
        raise DataError("is truncated in its header", field=str(path), remedy=_REMEDY)
    _, version, code, num_sequences, num_bounds = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise DataError(
            f"is of version {version} and token type {code}, which lmscale does not read",
            field=str(path),
            remedy=_REMEDY,
        )
    if num_sequences == 0 or num_bounds < 2:
        raise DataError("holds no documents", field=str(path), remedy=_REMEDY)
    return np.dtype(_DTYPES[code]), num_sequences, num_bounds


def _check(
    prefix: str | Path,
    dtype: np.dtype[Any],
    lengths: NDArray[np.int32],
    pointers: NDArray[np.int64],
    bounds: NDArray[np.int64],
) -> Index:
    file = str(idx_path(prefix))
    offsets = _from_zero(np.cumsum(lengths, dtype=np.int64))
    if lengths.min() < 0 or not np.array_equal(pointers, offsets[:-1] * dtype.itemsize):
        raise DataError("its sequences do not follow each other without a gap", field=file, remedy=_REMEDY)
    if bounds[0] != 0 or bounds[-1] != len(lengths) or np.any(np.diff(bounds) < 0):
        raise DataError("its documents do not cover its sequences in order", field=file, remedy=_REMEDY)
    path, expected = bin_path(prefix), int(offsets[-1]) * dtype.itemsize
    if path.stat().st_size != expected:
        raise DataError(
            f"holds {path.stat().st_size} bytes, and its index is of {expected}: truncated, or of another index",
            field=str(path),
            remedy=_REMEDY,
        )
    return Index(dtype, offsets[bounds], offsets, bounds.astype(np.int64))
