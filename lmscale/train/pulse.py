"""Where a rank is: noted by the loop as it goes, read by its watchdog, told to the supervisor. No torch."""

from __future__ import annotations

import enum
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple


class Phase(enum.IntEnum):
    """The parts of a run, in the order in which every rank passes them."""

    START = 0
    DATA = 1
    TRAIN = 2
    UPDATE = 3
    AGREE = 4
    EVALUATE = 5
    SAVE = 6
    FINISH = 7
    CLOSE = 8
    """Waiting for the last save and the user's hooks, on which there is no limit."""

    @property
    def label(self) -> str:
        """The phase in words."""
        return _LABELS[self]


_LABELS = {
    Phase.START: "start, or rewind",
    Phase.DATA: "waiting for data",
    Phase.TRAIN: "forward and backward",
    Phase.UPDATE: "update",
    Phase.AGREE: "behind the update",
    Phase.EVALUATE: "evaluation",
    Phase.SAVE: "save",
    Phase.FINISH: "finish",
    Phase.CLOSE: "close",
}
_STEP = frozenset({Phase.DATA, Phase.TRAIN, Phase.UPDATE, Phase.AGREE})


class Place(NamedTuple):
    """A rank's last sign of progress."""

    step: int
    phase: Phase
    at_s: float
    is_slow: bool
    """Of what may take long: all but a step after the first."""


class Pulse:
    """Notes a rank's progress; cheap enough for every micro batch.

    Args:
        clock: seconds, monotonic; a test puts its own here.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._first_step: int | None = None
        self.place = Place(0, Phase.START, clock(), True)

    def enter(self, phase: Phase, step: int | None = None) -> None:
        """Note that a phase begins.

        Args:
            phase: the one that begins.
            step: its step, counted from 1; left out, the step goes on.
        """
        step = self.place.step if step is None else step
        if self._first_step is None and phase in _STEP:
            self._first_step = step
        is_slow = phase not in _STEP or step == self._first_step
        # One assignment: the watchdog reads it from another thread.
        self.place = Place(step, phase, self._clock(), is_slow)

    def beat(self) -> None:
        """Note progress within a phase."""
        self.place = self.place._replace(at_s=self._clock())

    def follow(self, model: Any, optimizer: Any) -> None:
        """Take every forward of a module, and every update of a torch optimizer, for progress."""
        model.register_forward_pre_hook(lambda *_: self._within_step(Phase.TRAIN))
        optimizer.register_step_pre_hook(lambda *_: self._within_step(Phase.UPDATE))

    def _within_step(self, phase: Phase) -> None:
        if self.place.phase in _STEP:
            self.enter(phase)
        else:
            self.beat()


@dataclass(frozen=True)
class Collective:
    """The last collective operation that a rank has begun in a group."""

    number: int
    """Counted from 1 by every member of the group alike."""
    name: str
    is_pending: bool


@dataclass(frozen=True)
class Beat:
    """What a rank tells from time to time about itself."""

    pid: int
    host: str
    step: int
    phase: Phase
    age_s: float
    """Since the last progress."""
    limit_s: float
    """That age_s may reach; 0 for no limit."""
    interval_s: float
    """Until the next beat."""
    is_hung: bool = False
    collectives: dict[str, Collective] = field(default_factory=dict)
    """By group."""

    def to_json(self) -> str:
        """Write as a line."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Beat:
        """Read what `to_json` wrote."""
        keys = json.loads(text)
        keys["phase"] = Phase(keys["phase"])
        keys["collectives"] = {name: Collective(**found) for name, found in keys["collectives"].items()}
        return Beat(**keys)

    @property
    def where(self) -> str:
        """The place in words."""
        step = f"step {self.step}, " if self.step else ""
        waits = [
            f"{one.name} number {one.number} of {group}" for group, one in self.collectives.items() if one.is_pending
        ]
        return f"{step}{self.phase.label}" + (f", in {waits[0]}" if waits else "")
