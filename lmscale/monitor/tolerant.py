"""Records that cannot be written end no run: a full disk is told once, and training goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from lmscale.errors import LmscaleError
from lmscale.log import get_logger
from lmscale.monitor.histogram import Histogram
from lmscale.monitor.metrics import Record

_log = get_logger(__name__)


class _Writer(Protocol):
    def write(self, record: Record) -> None: ...

    def text(self, tag: str, markdown: str, step: int | None = None) -> None: ...

    def histograms(self, step: int, found: Mapping[str, Histogram]) -> None: ...

    def close(self) -> None: ...


class Tolerant:
    """Hands everything to a writer, and tells when it begins to fail and when it works again.

    What a writer held back while it failed it may write later; what it lost is lost.
    """

    def __init__(self, writer: _Writer):
        self._writer = writer
        self._is_failing = False

    def write(self, record: Record) -> None:
        """Write a record, if that is possible."""
        self._try(lambda: self._writer.write(record))

    def text(self, tag: str, markdown: str, step: int | None = None) -> None:
        """Write a text, if that is possible."""
        self._try(lambda: self._writer.text(tag, markdown, step))

    def histograms(self, step: int, found: Mapping[str, Histogram]) -> None:
        """Write histograms, if that is possible."""
        self._try(lambda: self._writer.histograms(step, found))

    def close(self) -> None:
        """Close the writer."""
        self._try(self._writer.close)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except (OSError, ValueError, LmscaleError) as error:  # a library's ValueError: of a name that it does not take
            if not self._is_failing:
                _log.warning("%s: %s; the run goes on without these records", type(self._writer).__name__, error)
            self._is_failing = True
        else:
            if self._is_failing:
                _log.warning("%s: records are written again", type(self._writer).__name__)
            self._is_failing = False
