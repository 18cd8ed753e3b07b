"""Examples from files: JSON lines, or tables in .csv and .tsv with a line of names; plain, .gz or .zst."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lmscale.data.corpus import Record, read_records
from lmscale.errors import DataError

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_PACKINGS = ("", ".gz", ".zst")
SUFFIXES = tuple(kind + packing for kind in (".jsonl", *_SEPARATORS) for packing in _PACKINGS)
_LONGEST_CELL = 1 << 27


@dataclass(frozen=True)
class Example:
    """One line of a file.

    Attributes:
        place: file and line, as editors write it.
        columns: values by name; all strings in a table, and what JSON has in JSON lines.
    """

    place: str
    columns: dict[str, Any]


def read_examples(path: str, field: str, limit: int | None = None) -> list[Example]:
    """Read the examples of a file.

    Args:
        path: of the file.
        field: the key that names it, for messages.
        limit: read no more than that many.

    Raises:
        DataError: if there is no such file, it is of no known kind, holds no example, or a line is broken.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError("there is no such file", field=field, value=path)
    if not file.name.endswith(SUFFIXES):
        raise DataError("is of no known kind", field=field, value=path, remedy="give one of " + ", ".join(SUFFIXES))
    kind = Path(file.name.removesuffix(".gz").removesuffix(".zst")).suffix
    records = read_records([file])
    lines = map(_parse_line, records) if kind == ".jsonl" else _parse_table(next(records), _SEPARATORS[kind])
    examples = list(islice(lines, limit))
    if not examples:
        raise DataError("holds no example", field=field, value=path)
    return examples


def _parse_line(record: Record) -> Example:
    place = f"{record.path}:{record.line}"
    try:
        columns = json.loads(record.data)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"is not JSON: {error}", field=place) from None
    if not isinstance(columns, dict):
        raise DataError("is not an object of columns", field=place, remedy='as in {"text": "...", "label": "..."}')
    return Example(place, columns)


def _parse_table(record: Record, separator: str) -> Iterator[Example]:
    try:
        text = record.data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8: {error}", field=record.path) from None
    csv.field_size_limit(_LONGEST_CELL)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    names: list[str] | None = None
    try:
        begin = 1
        for cells in lines:
            place, begin = f"{record.path}:{begin}", lines.line_num + 1
            if not cells:
                continue
            if names is None:
                names = _names(cells, place)
                continue
            if len(cells) != len(names):
                raise DataError(f"has {len(cells)} cells, and the first line names {len(names)} columns", field=place)
            yield Example(place, dict(zip(names, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"is broken: {error}", field=f"{record.path}:{lines.line_num}") from None


def _names(cells: list[str], place: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise DataError(f"names column {repeated!r} twice", field=place)
    return names
