"""What the training of classifiers tells the run: records for its writers, and a moment to look for requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lmscale.monitor.metrics import Record


@dataclass(frozen=True)
class Watch:
    """Who looks on.

    Attributes:
        tick: called before each step; may raise `Stopped`.
        write: takes each record.
        prefix: before the tags of the classifier's records, where a run trains several; each counts its steps from 1.
    """

    tick: Callable[[], None] = lambda: None
    write: Callable[[Record], None] = lambda record: None
    prefix: str = ""

    def of(self, name: str) -> Watch:
        """Return the watch over a classifier of its own name; an empty one stays."""
        return replace(self, prefix=f"{self.prefix}{name}/") if name else self

    def record(self, record: Record) -> None:
        """Hand a record on, its tags with the prefix."""
        values = {f"{self.prefix}{tag}": value for tag, value in record.values.items()}
        self.write(replace(record, values=values))


class Stopped(Exception):
    """The run was asked to end; raised between two steps."""
