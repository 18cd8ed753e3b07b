"""A corpus in several shards, read as one: PREFIX.shards.json lists them, in order, and nothing is copied together."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from lmscale.data.index_file import Index, bin_path, idx_path, read_index
from lmscale.data.manifest import Manifest, read_manifest, sha256_of_file
from lmscale.errors import DataError

_FORMAT = 1
_REMEDY = "make it whole: the same lmscale tokenize again"


@dataclass(frozen=True)
class Shard:
    """One entry of the list."""

    name: str
    """Its prefix beside the list."""
    documents: int
    tokens: int
    idx_sha256: str
    bin_bytes: int


@dataclass(frozen=True)
class ShardList:
    """What PREFIX.shards.json says: the shards in order, and the manifest of them all, their counts summed.

    The manifest's idx_sha256 is the SHA-256 of those of the shards, one behind the other.
    """

    shards: list[Shard]
    manifest: Manifest


def list_path(prefix: str | Path) -> Path:
    """Name the list; a corpus in shards is complete where it exists."""
    return Path(f"{prefix}.shards.json")


def shard_prefix(prefix: str | Path, number: int) -> Path:
    """Name a shard: PREFIX-00000."""
    return Path(f"{prefix}-{number:05d}")


def files_of(prefix: str | Path) -> list[Path]:
    """Name the files whose times tell whether a corpus has changed: .idx and .bin, or the list of its shards."""
    plain = [idx_path(prefix), bin_path(prefix)]
    return plain if plain[0].exists() else [list_path(prefix)]


def is_corpus(prefix: str | Path) -> bool:
    """Tell whether there is a corpus, whole or in shards."""
    return any(path.exists() for path in files_of(prefix))


def summed(prefix: str | Path, numbers: Sequence[int]) -> ShardList:
    """Put the shards' manifests together.

    Raises:
        DataError: if a shard has none, they are of different tokenizers or divisions, or hold no document together.
    """
    shards, manifests = [], []
    for number in numbers:
        path = shard_prefix(prefix, number)
        manifest = read_manifest(path, sha256_of_file(idx_path(path)))
        if manifest is None:
            raise DataError("is not of lmscale tokenize", field=str(idx_path(path)), remedy=_REMEDY)
        manifests.append(manifest)
        shards.append(Shard(path.name, manifest.documents, manifest.tokens, manifest.idx_sha256, manifest.bin_bytes))
    kinds = {(each.tokenizer_hash, each.vocab_size, each.eos_id, each.sentences) for each in manifests}
    if len(kinds) != 1:
        raise DataError("its shards are of different tokenizers or kinds", field=str(prefix), remedy=_REMEDY)
    if not any(each.documents for each in manifests):
        raise DataError("holds no documents", field=str(prefix))
    skipped: dict[str, int] = {}
    for reason, count in (item for each in manifests for item in each.skipped.items()):
        skipped[reason] = skipped.get(reason, 0) + count
    whole = dataclasses.replace(
        manifests[0],
        documents=sum(each.documents for each in manifests),
        tokens=sum(each.tokens for each in manifests),
        skipped=skipped,
        idx_sha256=_digest(shards),
        bin_bytes=sum(each.bin_bytes for each in manifests),
        made_from=None,
    )
    return ShardList(shards, whole)


def to_json(found: ShardList) -> str:
    """Render as the content of the file."""
    return json.dumps({"format": _FORMAT, **dataclasses.asdict(found)}, indent=2) + "\n"


def read_shards(prefix: str | Path) -> ShardList:
    """Read PREFIX.shards.json.

    Raises:
        DataError: if it cannot be read, or is not such a list.
    """
    path = list_path(prefix)
    try:
        content = json.loads(path.read_text())
        shards = [Shard(**shard) for shard in content["shards"]]
        found = ShardList(shards, Manifest(**content["manifest"]))
    except (OSError, ValueError, TypeError, KeyError):
        raise DataError("is no list of shards", field=str(path), remedy=_REMEDY) from None
    if content.get("format") != _FORMAT or not shards or _digest(shards) != found.manifest.idx_sha256:
        raise DataError("is no list of shards that this lmscale reads", field=str(path), remedy=_REMEDY)
    return found


def open_shards(prefix: str | Path, found: ShardList) -> tuple[Index, ShardedTokens]:
    """Open the shards as one corpus: their indices joined, their tokens where they are.

    Raises:
        DataError: naming the shard's file that is missing, damaged, or not the one that the list names.
    """
    indices, parts = [], []
    for shard in found.shards:
        if shard.tokens == 0:  # of an empty input file: neither numpy nor read_index takes an empty .bin
            continue
        path = Path(prefix).with_name(shard.name)
        index = read_index(path)
        counts = (len(index.document_offsets) - 1, int(index.document_offsets[-1]))
        if counts != (shard.documents, shard.tokens):
            raise DataError("is not the shard that the list names", field=str(idx_path(path)), remedy=_REMEDY)
        indices.append(index)
        parts.append(np.memmap(bin_path(path), index.dtype, "r"))
    if len({index.dtype for index in indices}) != 1:
        raise DataError("its shards have different types", field=str(list_path(prefix)), remedy=_REMEDY)
    joined = Index(
        indices[0].dtype,
        _joined([index.document_offsets for index in indices]),
        _joined([index.sentence_offsets for index in indices]),
        _joined([index.document_sentences for index in indices]),
    )
    return joined, ShardedTokens(parts)


def _joined(bounds: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Join arrays that each begin with 0 and end with their sum."""
    starts = np.cumsum([0, *(each[-1] for each in bounds)])
    return np.concatenate([each[:-1] + start for each, start in zip(bounds, starts, strict=False)] + [starts[-1:]])


def _digest(shards: Sequence[Shard]) -> str:
    return hashlib.sha256("".join(shard.idx_sha256 for shard in shards).encode()).hexdigest()


class ShardedTokens:
    """Flat tokens that lie in several arrays, read by slices and by arrays of places as a single one would be.

    A slice inside one shard is a view; one that crosses a border is a copy.

    Args:
        parts: flat, of one dtype, one at least.
    """

    def __init__(self, parts: Sequence[NDArray[Any]]):
        self._parts = list(parts)
        self._starts = np.cumsum([0, *map(len, parts)])
        self.dtype: np.dtype[Any] = parts[0].dtype
        self.nbytes = sum(part.nbytes for part in parts)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, key: slice) -> NDArray[Any]: ...
    @overload
    def __getitem__(self, key: NDArray[np.int64]) -> NDArray[Any]: ...
    def __getitem__(self, key: slice | NDArray[np.int64]) -> NDArray[Any]:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            assert step == 1
            return self._range(start, max(start, stop))
        places = np.where(key < 0, key + len(self), key)
        number = np.searchsorted(self._starts, places, side="right") - 1
        read = np.empty(places.shape, self.dtype)
        for each in np.unique(number).tolist():
            rows = number == each
            read[rows] = self._parts[each][places[rows] - self._starts[each]]
        return read

    def _range(self, start: int, stop: int) -> NDArray[Any]:
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        pieces = []
        while start < stop:
            begin, end = int(self._starts[first]), int(self._starts[first + 1])
            pieces.append(self._parts[first][start - begin : min(stop, end) - begin])
            start, first = min(stop, end), first + 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Copy all of it into memory, where an array of it is asked for."""
        return np.concatenate(self._parts).astype(dtype or self.dtype)

    def view(self, dtype: Any) -> ShardedTokens:
        """Read the same bytes as another type."""
        return ShardedTokens([part.view(dtype) for part in self._parts])
