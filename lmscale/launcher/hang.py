"""Find a hang in what the ranks tell of themselves, get the stacks of those that are silent, and name the missing rank."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmscale.errors import HangError
from lmscale.launcher.processes import send
from lmscale.launcher.status import read_beats, read_reports
from lmscale.log import log_file
from lmscale.train.pulse import Beat
from lmscale.train.watchdog import STACKS_SIGNAL

_COLLECT_S = 5.0
"""From the first rank that reports a hang to the verdict: the others' watchdogs were told of their last progress later."""
_SLACK_S = 5.0
"""Beyond its limit, for a rank whose watchdog has fallen silent."""
_ANSWER_S = 2.0
_PY_SPY_S = 20.0


@dataclass(frozen=True)
class Hang:
    """What was found."""

    error: HangError
    missing: tuple[int, ...]
    """Ranks that the others wait for; empty where all stand at the same place."""
    silent: tuple[int, ...]
    """Those of them whose process does not even tell that it hangs."""
    step: int


class HangWatch:
    """Looks at the ranks' beats, again and again.

    Args:
        status_dir: where they are.
        logs: the run's directory of logs, for the stacks of ranks that do not write them themselves.
    """

    def __init__(self, status_dir: Path, logs: Path | None):
        self._status_dir, self._logs = status_dir, logs
        self._heard: dict[int, tuple[Beat, float]] = {}
        self._since_s: float | None = None
        self._next_s = 0.0

    @property
    def step(self) -> int:
        """The furthest step that a rank has told of."""
        return max((beat.step for beat, _ in self._heard.values()), default=0)

    def poll(self) -> Hang | None:
        """Return a hang once it is certain and looked into, which takes some seconds."""
        now_s = time.monotonic()
        if self._since_s is None and now_s < self._next_s:
            return None
        ended = read_reports(self._status_dir)
        for number, beat in read_beats(self._status_dir).items():
            known = self._heard.get(number)
            if known is None or known[0] != beat:
                self._heard[number] = beat, now_s
        self._next_s = now_s + min((beat.interval_s for beat, _ in self._heard.values()), default=0.0) / 2
        living = {number: heard for number, heard in self._heard.items() if number not in ended}
        stopped = [number for number, (beat, at_s) in living.items() if beat.is_hung or _is_mute(beat, now_s - at_s)]
        if not stopped:
            self._since_s = None
            return None
        if self._since_s is None:
            self._since_s = now_s
        settled = [number for number, (beat, at_s) in living.items() if beat.is_hung or _fell_silent(beat, at_s)]
        if len(settled) < len(living) and now_s - self._since_s < _COLLECT_S:
            return None
        return self._look_into({number: beat for number, (beat, _) in living.items()})

    def _look_into(self, beats: Mapping[int, Beat]) -> Hang:
        quiet = {number: beat for number, beat in beats.items() if not beat.is_hung}
        silent = tuple(number for number, beat in quiet.items() if _fell_silent(beat, self._heard[number][1]))
        answered = self._ask_for_stacks(quiet)
        missing, line = verdict(beats, silent)
        hung = [beat for beat in beats.values() if beat.is_hung] or list(beats.values())
        limit = min(beat.limit_s for beat in hung)
        where = f"stacks are in {self._logs}" if self._logs is not None else None
        unanswered = [number for number in quiet if number not in answered]
        if unanswered and where is not None:
            where += f", but for rank {_names(unanswered)}: pip install lmscale[debug] for py-spy"
        error = HangError(f"hang: no progress for more than {limit:g} s: {line}", remedy=where)
        return Hang(error, missing, silent, max(beat.step for beat in beats.values()))

    def _ask_for_stacks(self, quiet: Mapping[int, Beat]) -> set[int]:
        """Let this host's ranks that have not written their stacks do so, or py-spy; return those that are there then."""
        here = {number: beat.pid for number, beat in quiet.items() if beat.host == socket.gethostname()}
        if not here or self._logs is None:
            return set()
        sizes = {number: _size(log_file(number, self._logs)) for number in here}
        send(here.values(), STACKS_SIGNAL)
        deadline_s = time.monotonic() + _ANSWER_S
        answered: set[int] = set()
        while len(answered) < len(here) and time.monotonic() < deadline_s:
            time.sleep(0.1)
            answered = {number for number in here if _size(log_file(number, self._logs)) > sizes[number]}
        return answered | {
            number for number, pid in here.items() if number not in answered and _spy(pid, log_file(number, self._logs))
        }


def verdict(beats: Mapping[int, Beat], silent: tuple[int, ...] = ()) -> tuple[tuple[int, ...], str]:
    """Say which ranks the others wait for.

    A rank that does not tell anything any more is missing. Else it is the one that is furthest behind, by its step, its
    phase, and then by the number of its last collective in a group that it shares with others; but where few have gone
    ahead of many, they have left out what the many wait in, and are the ones.

    Args:
        beats: the last of each rank.
        silent: ranks whose watchdog tells nothing.

    Returns:
        (the ranks, a clause that names them and where they and the others are).
    """
    if silent:
        others = {number: beat for number, beat in beats.items() if number not in silent}
        return (
            silent,
            f"{_who(silent, beats)} does not answer, and told last of {_where(beats, silent)}"
            + (f"; the others are in {_where(others)}" if others else ""),
        )
    places = Counter((beat.step, beat.phase) for beat in beats.values())
    apart: tuple[int, ...] = ()
    if len(places) > 1:
        first, last = min(places), max(places)
        is_ahead = len(places) == 2 and places[last] < places[first]
        apart = tuple(n for n, beat in beats.items() if (beat.step, beat.phase) == (last if is_ahead else first))
        how = "has gone ahead" if is_ahead else "is behind"
    else:
        apart, how = _behind_in_a_group(beats), "has not come to the collective that the others wait in"
    if not apart:
        return (), f"all {len(beats)} ranks stand in {_where(beats)}"
    others = {number: beat for number, beat in beats.items() if number not in apart}
    return (
        apart,
        f"{_who(apart, beats)} {how}, in {_where(beats, apart)}; the others are in {_where(others)}",
    )


def _behind_in_a_group(beats: Mapping[int, Beat]) -> tuple[int, ...]:
    """Find the ranks whose count of collectives is the lowest in a group in which another rank waits for more."""
    waited = {
        group: max(beat.collectives[group].number for beat in beats.values() if group in beat.collectives)
        for beat in beats.values()
        for group, last in beat.collectives.items()
        if last.is_pending
    }
    return tuple(
        number
        for number, beat in beats.items()
        if any(group in beat.collectives and beat.collectives[group].number < most for group, most in waited.items())
    )


def _where(beats: Mapping[int, Beat], numbers: tuple[int, ...] | None = None) -> str:
    places = Counter(beats[number].where for number in (beats if numbers is None else numbers))
    (place, _), *more = places.most_common()
    return place + (f" (and {len(more)} other places)" if more else "")


def _who(numbers: tuple[int, ...], beats: Mapping[int, Beat]) -> str:
    """Name ranks, and their hosts where there are several."""
    hosts = dict.fromkeys(beats[number].host for number in numbers)
    where = f" on {_names(list(hosts))}" if len({beat.host for beat in beats.values()}) > 1 else ""
    return f"rank {_names(numbers)} of {len(beats)}{where}"


def _names(numbers: Sequence[int | str]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")


def _is_mute(beat: Beat, quiet_s: float) -> bool:
    """Tell whether a rank has told nothing for so long that it hangs whatever its watchdog would say."""
    return beat.limit_s > 0 and beat.age_s + quiet_s > beat.limit_s + 2 * beat.interval_s + _SLACK_S


def _fell_silent(beat: Beat, heard_at_s: float) -> bool:
    """Tell whether a rank has missed beats."""
    return time.monotonic() - heard_at_s > 3 * beat.interval_s + 2.0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _spy(pid: int, log: Path) -> bool:
    """Append the stacks of a process that does not answer to its log, by py-spy where it is there and permitted."""
    beside = Path(sys.executable).with_name("py-spy")
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None:
        return False
    command = [program, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_PY_SPY_S, check=False, env=_plain_environment())
        if done.returncode == 0:
            with log.open("ab") as file:
                file.write(b"stacks, by py-spy:\n" + done.stdout)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _plain_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("LMSCALE_")}
