"""metrics.jsonl: one JSON object per logged step."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmscale.errors import OutputError
from lmscale.log import get_logger
from lmscale.monitor.atomic import replaced
from lmscale.monitor.histogram import Histogram
from lmscale.monitor.metrics import Record

_logger = get_logger(__name__)


class JsonlWriter:
    """Append records to a file of JSON lines: step, consumed_samples, consumed_tokens, and the tags as keys.

    A value that is not finite is written as null, since JSON knows neither NaN nor infinity. Every line is flushed.

    Args:
        path: the file; made, with its directory, if missing.
        resume_step: the step that the run continues from: records of later steps are cut off first, and a line that is
            torn or not JSON with them. None is a new run and keeps nothing.

    Raises:
        OutputError: if the file cannot be written.
    """

    def __init__(self, path: Path, resume_step: int | None = None):
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                cut_records(path, resume_step)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._failure(error) from None

    def write(self, record: Record) -> None:
        """Append a record."""
        line: dict[str, Any] = {
            "step": record.step,
            "consumed_samples": record.consumed_samples,
            "consumed_tokens": record.consumed_tokens,
            **{tag: value if math.isfinite(value) else None for tag, value in record.scalars().items()},
        }
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._failure(error) from None

    def text(self, tag: str, markdown: str, step: int | None = None) -> None:
        """Do nothing: texts are files of their own in the run's directory, or for people who watch."""

    def histograms(self, step: int, found: Mapping[str, Histogram]) -> None:
        """Do nothing: histograms are pictures."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _failure(self, error: OSError) -> OutputError:
        return OutputError(f"cannot be written: {error.strerror}", field=str(self._path))


def cut_records(path: Path, resume_step: int | None) -> None:
    """Drop the records after `resume_step` (all, where it is None) and unreadable lines, atomically."""
    unreadable = 0
    with path.open("rb") as old, replaced(path) as new:
        for line in old:
            step = _step_of(line)
            unreadable += step is None
            if step is not None and resume_step is not None and step <= resume_step:
                new.write(line)
    if unreadable:
        _logger.warning("%s: dropped %d torn or unreadable lines", path, unreadable)


def _step_of(line: bytes) -> int | None:
    # A line without its end may be a number cut short that still parses, so it counts as torn.
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) else None
