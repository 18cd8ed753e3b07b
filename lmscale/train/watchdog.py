"""A thread of each rank that notices when the rank makes no progress, shows where it is, and ends it. No torch.

It needs no supervisor. Where there is one, it is told from time to time where the rank is, so that it can say which rank the
others wait for, and end all of them; a rank that nobody ends ends itself.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from lmscale.errors import HangError
from lmscale.train.pulse import Beat, Collective, Phase, Place, Pulse

STACKS_SIGNAL = signal.SIGUSR2
"""Makes a rank write its stacks to its log, even one that holds Python's lock."""

_MAX_INTERVAL_S = 10.0
_MAX_TICK_S = 1.0
_TICKS = 20
"""In a time-out."""
_LAST_RESORT_S = 60.0
"""Beyond the time-out, for a rank whose watchdog cannot run because other code keeps Python's lock."""


class Watchdog:
    """Watch a rank's pulse from a thread.

    Args:
        pulse: the rank's.
        hang_timeout_s: for a step after the first; 0 switches everything off.
        first_step_timeout_s: for what may take long; 0 for no limit.
        log: the rank's log, where stacks go; left out, or where it cannot be written, stderr.
        publish: tells the supervisor; whether there is one that could hear.
        end: ends this process.
        collectives: the rank's last ones, by group.
    """

    def __init__(
        self,
        pulse: Pulse,
        hang_timeout_s: float,
        first_step_timeout_s: float,
        log: Path | None,
        publish: Callable[[Beat], bool],
        end: Callable[[HangError, bool], None],
        collectives: Callable[[], dict[str, Collective]] = dict,
    ):
        self._pulse, self._log, self._publish, self._end = pulse, log, publish, end
        self._hang_s, self._slow_s, self._collectives = hang_timeout_s, first_step_timeout_s, collectives
        shortest = min(filter(None, (hang_timeout_s, first_step_timeout_s)), default=0.0)
        self._tick_s = min(_MAX_TICK_S, shortest / _TICKS)
        self._interval_s = min(_MAX_INTERVAL_S, shortest / _TICKS)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._file: IO[str] | None = None

    def __enter__(self) -> Watchdog:
        if self._hang_s:
            with contextlib.suppress(OSError):
                self._file = self._log.open("a") if self._log is not None else None
            with contextlib.suppress(AttributeError, io.UnsupportedOperation):  # a stderr that is no file
                faulthandler.register(STACKS_SIGNAL, file=self._target, all_threads=True)
            self._tell(self._pulse.place)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is None:
            return
        self._stopping.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(STACKS_SIGNAL)
        if self._file is not None:
            self._file.close()

    @property
    def _target(self) -> IO[str]:
        return self._file or sys.stderr

    def _watch(self) -> None:
        told_s = time.monotonic()
        self._arm(self._pulse.place)
        while not self._stopping.wait(self._tick_s):
            place, now_s = self._pulse.place, time.monotonic()
            limit_s = self._limit_s(place)
            if limit_s and now_s - place.at_s > limit_s:
                self._give_up(place)
                return
            if now_s - told_s >= self._interval_s:
                self._tell(place)
                self._arm(place)
                told_s = now_s

    def _limit_s(self, place: Place) -> float:
        if place.phase is Phase.CLOSE:
            return 0.0
        return self._slow_s if place.is_slow else self._hang_s

    def _arm(self, place: Place) -> None:
        """Let faulthandler, whose thread needs no lock of Python's, end the process where this thread cannot."""
        faulthandler.cancel_dump_traceback_later()
        limit_s = max(self._slow_s, self._hang_s) if self._limit_s(place) else 0.0
        if limit_s:
            with contextlib.suppress(AttributeError, io.UnsupportedOperation):
                faulthandler.dump_traceback_later(limit_s + _LAST_RESORT_S, exit=True, file=self._target)

    def _tell(self, place: Place, is_hung: bool = False) -> tuple[Beat, bool]:
        try:
            collectives = self._collectives()
        except (RuntimeError, ValueError, KeyError):  # torch's record is no promise
            collectives = {}
        beat = Beat(
            pid=os.getpid(),
            host=socket.gethostname(),
            step=place.step,
            phase=place.phase,
            age_s=time.monotonic() - place.at_s,
            limit_s=self._limit_s(place),
            interval_s=self._interval_s,
            is_hung=is_hung,
            collectives=collectives,
        )
        return beat, self._publish(beat)

    def _give_up(self, place: Place) -> None:
        faulthandler.cancel_dump_traceback_later()
        beat, is_heard = self._tell(place, is_hung=True)
        error = HangError(
            f"no progress for {beat.age_s:.0f} s: rank {os.environ.get('RANK', '0')} is in {beat.where}",
            field="train.first_step_timeout_s" if place.is_slow else "train.hang_timeout_s",
            value=beat.limit_s,
            remedy=f"its stacks are in {self._log}" if self._file else "its stacks are above",
        )
        target = self._target
        with contextlib.suppress(OSError, ValueError):
            target.write(f"{error}\n")
            target.flush()
            faulthandler.dump_traceback(file=target, all_threads=True)
        self._end(error, is_heard)
