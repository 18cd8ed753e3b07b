"""Prompts in a JSONL file, each with the adaptation that it is for, answered by the batch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmscale.errors import ConfigError, DataError
from lmscale.evaluate.model import TrainedModel

PROMPT, ADAPTER, TEXT = "prompt", "adapter", "text"
DEFAULT_BATCH = 32


@dataclass(frozen=True)
class Request:
    """A line: a prompt, and the name of an adaptation or None for the base.

    Attributes:
        keys: all of the line, which come back with the text.
    """

    prompt: str
    adapter: str | None
    keys: dict[str, Any]


def read_requests(file: Path) -> list[Request]:
    """Read a file of lines {"prompt": ..., "adapter": ...}; adapter may be absent or null.

    Raises:
        DataError: naming the first line that is no such object.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", field="--input", value=str(file)) from None
    requests = [_request(file, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not requests:
        raise DataError("holds no prompt", field="--input", value=str(file))
    return requests


def _request(file: Path, number: int, line: str) -> Request:
    place = f"{file}:{number}"
    try:
        keys = json.loads(line)
    except ValueError as error:
        raise DataError(f"is no JSON: {error}", field=place) from None
    if not isinstance(keys, dict) or not isinstance(keys.get(PROMPT), str):
        raise DataError(f'must be an object with a text at "{PROMPT}"', field=place)
    adapter = keys.get(ADAPTER)
    if adapter is not None and not isinstance(adapter, str):
        raise DataError("must be a name, or null for the base", field=f"{place}: {ADAPTER}", value=adapter)
    return Request(keys[PROMPT], adapter, keys)


def answer(
    model: TrainedModel, requests: Sequence[Request], batch_size: int, options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Write a text for each request, in order: the line's keys and the text. Names are checked before the first.

    Args:
        model: loaded with the adaptations that are named.
        requests: in order.
        batch_size: prompts that are computed at a time; with more adaptations than slots, no more than slots.
        options: of the model's `generate`.

    Raises:
        ConfigError: if a name is unknown.
    """
    names = {request.adapter for request in requests} - {None}
    if names and model.table is None:
        name = min(str(one) for one in names)
        raise ConfigError("there is no such adaptation", field="adapter", value=name, remedy="give --adapter NAME=PATH")
    if model.table is not None:
        for name in sorted(str(one) for one in names):
            model.table.check(name)
        batch_size = batch_size if len(names) <= model.table.slots else min(batch_size, model.table.slots)
    for first in range(0, len(requests), batch_size):
        batch = requests[first : first + batch_size]
        adapters = [request.adapter for request in batch] if model.table is not None else None
        texts = model.generate([request.prompt for request in batch], adapters=adapters, **options)
        for request, text in zip(batch, texts, strict=True):
            yield {**request.keys, TEXT: text}
