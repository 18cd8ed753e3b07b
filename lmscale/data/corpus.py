"""Documents from text files: .txt (one document a file) and .jsonl (one a line), plain, .gz or .zst.

Reading is split in two so that worker processes can share it: `read_records` finds the raw bytes of each document in
order, `parse_record` decodes them. A record that cannot be decoded is skipped, counted and reported with file and line.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from lmscale.errors import DataError
from lmscale.log import get_logger

logger = get_logger(__name__)

SUFFIXES = tuple(kind + packing for kind in (".txt", ".jsonl") for packing in ("", ".gz", ".zst"))
_REPORTED_AT_MOST = 20


@dataclass(frozen=True)
class Record:
    """The undecoded bytes of one document; `line` counts from 1 and is None where the whole file is the document."""

    path: str
    line: int | None
    data: bytes


@dataclass(frozen=True)
class Skipped:
    """A record that holds no document, and why."""

    path: str
    line: int | None
    reason: str
    broken: bool = True
    """False for a document that is merely empty: `strict` lets it pass, and no line is logged."""

    @property
    def place(self) -> str:
        """File and line, as editors write it."""
        return self.path if self.line is None else f"{self.path}:{self.line}"


class SkipReport:
    """Counts what was skipped, by reason, and logs the first that is broken.

    Args:
        strict: raise at the first broken record.
    """

    def __init__(self, strict: bool = False):
        self.strict = strict
        self.counts: Counter[str] = Counter()
        self._num_broken = 0

    def add(self, skipped: Skipped) -> None:
        """Count one record.

        Raises:
            DataError: if `strict`, and the record is broken.
        """
        if self.strict and skipped.broken:
            raise DataError(skipped.reason, field=skipped.place, remedy="mend it, or leave out --strict to skip it")
        self.counts[skipped.reason] += 1
        if not skipped.broken:
            return
        self._num_broken += 1
        if self._num_broken <= _REPORTED_AT_MOST:
            logger.warning("skipped %s: %s", skipped.place, skipped.reason)
        elif self._num_broken == _REPORTED_AT_MOST + 1:
            logger.warning("skipped more; they are counted, and no longer listed")


def expand_inputs(patterns: Sequence[str]) -> list[Path]:
    """List the corpus files that globs match (`**` goes down directories), sorted within a glob, each file once.

    Raises:
        DataError: if a glob matches no file, or a file is of no known kind.
    """
    paths: dict[Path, None] = {}
    for pattern in patterns:
        matches = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
        files = [path for path in matches if path.is_file()]
        if not files:
            raise DataError(
                "matches no file", field="--input", value=pattern, remedy="check the path, and quote a glob"
            )
        paths.update(dict.fromkeys(files))
    for path in paths:
        if not path.name.endswith(SUFFIXES):
            raise DataError("is of no known kind", field=str(path), remedy="give files named " + ", ".join(SUFFIXES))
    return list(paths)


def read_records(paths: Iterable[Path], on_bytes: Callable[[int], None] = lambda count: None) -> Iterator[Record]:
    """Yield the record of each document, in the order of files and lines.

    Args:
        paths: as `expand_inputs` lists them.
        on_bytes: told of the bytes read from disk since it was last called, compressed as they are.

    Raises:
        DataError: if a file cannot be opened or its compression is damaged.
    """
    for path in paths:
        try:
            with path.open("rb") as raw:
                yield from _records_of(path, raw, on_bytes)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"cannot be read: {error}", field=str(path)) from None


def _records_of(path: Path, raw: IO[bytes], on_bytes: Callable[[int], None]) -> Iterator[Record]:
    told = 0
    stream = _decompress(path, raw)
    by_line = path.name.removesuffix(".gz").removesuffix(".zst").endswith(".jsonl")
    lines: Iterable[bytes] = stream if by_line else [stream.read()]
    for number, data in enumerate(lines, start=1):
        if number == 1:
            data = data.removeprefix(codecs.BOM_UTF8)
        if data.strip() or not by_line:
            yield Record(str(path), number if by_line else None, data)
        position = raw.tell()
        if position != told:
            on_bytes(position - told)
            told = position


def _decompress(path: Path, raw: IO[bytes]) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdStream(raw), buffer_size=1 << 20)
    return raw


class _ZstdStream(io.RawIOBase):
    """Decompress frame after frame; unlike zstandard's own reader, a truncated frame is an error, not an early end."""

    def __init__(self, raw: IO[bytes]):
        import zstandard

        self._raw = raw
        self._context = zstandard.ZstdDecompressor()
        self._error = zstandard.ZstdError
        self._frame: Any = None
        self._pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            between_frames = self._frame is None or self._frame.eof
            data = (self._frame.unused_data if self._frame and between_frames else b"") or self._raw.read(1 << 17)
            if not data:
                if between_frames:
                    return 0
                raise EOFError("its last zstd frame is truncated")
            if between_frames:
                self._frame = self._context.decompressobj()
            try:
                self._pending = self._frame.decompress(data)
            except self._error as error:
                raise OSError(str(error)) from None
        count = min(len(buffer), len(self._pending))
        buffer[:count], self._pending = self._pending[:count], self._pending[count:]
        return count


def parse_record(record: Record, json_key: str = "text") -> str | Skipped:
    """Decode a record to the text of its document, or say why it holds none.

    Args:
        record: as `read_records` yields it.
        json_key: the key of the text in a JSON line.
    """
    texts = parse_texts(record, (json_key,))
    return texts if isinstance(texts, Skipped) else texts[0]


def parse_texts(record: Record, json_keys: tuple[str, ...]) -> tuple[str, ...] | Skipped:
    """Decode a record to its texts, or say why one of them is not there.

    Args:
        record: as `read_records` yields it; that of a whole file has one text.
        json_keys: the keys of the texts in a JSON line.
    """
    try:
        text = record.data.decode("utf-8")
    except UnicodeDecodeError:
        return Skipped(record.path, record.line, "invalid UTF-8")
    texts: tuple[Any, ...] = (text,)
    if record.line is not None:
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            return Skipped(record.path, record.line, "broken JSON")
        found = [document.get(key) if isinstance(document, dict) else None for key in json_keys]
        for key, value in zip(json_keys, found, strict=True):
            if not isinstance(value, str):
                return Skipped(record.path, record.line, f"no string under the key {key!r}")
        texts = tuple(found)
        if b"\\u" in record.data and not all(map(_is_encodable, texts)):
            return Skipped(record.path, record.line, "a lone surrogate, which is no text")
    return texts if all(texts) else Skipped(record.path, record.line, "an empty document", broken=False)


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_documents(inputs: Sequence[str], json_key: str = "text", report: SkipReport | None = None) -> Iterator[str]:
    """Yield the text of each document of some globs, in order, one at a time.

    Args:
        inputs: globs.
        json_key: the key of the text in JSON lines.
        report: counts what is skipped; with `strict` it raises instead.

    Raises:
        DataError: if a glob matches nothing, a file cannot be read, or under a strict report.
    """
    report = report or SkipReport()
    for record in read_records(expand_inputs(inputs)):
        text = parse_record(record, json_key)
        if isinstance(text, Skipped):
            report.add(text)
        else:
            yield text
