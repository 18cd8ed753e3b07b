"""The watchdog of a rank, in this process: what counts as progress, what may take long, and that it does not cry wolf."""

import threading
import time

import pytest
import torch

from lmscale.train.pulse import Phase, Pulse
from lmscale.train.watchdog import Watchdog

HANG_S, SLOW_S = 0.4, 30.0
DEADLINE_S = 20.0


class Watched:
    """A watchdog whose end of the process is noted only."""

    def __init__(self, tmp_path, hang_s=HANG_S, slow_s=SLOW_S):
        self.pulse, self.beats, self.errors, self.log = Pulse(), [], [], tmp_path / "rank-0000.log"
        self.has_ended = threading.Event()
        self.watchdog = Watchdog(self.pulse, hang_s, slow_s, self.log, self._hear, self._end)

    def _hear(self, beat) -> bool:
        self.beats.append(beat)
        return True

    def _end(self, error, is_heard) -> None:
        self.errors.append(error)
        self.has_ended.set()

    def steps(self, last: int) -> None:
        for step in range(1, last + 1):
            self.pulse.enter(Phase.DATA, step)
            self.pulse.enter(Phase.TRAIN)
            self.pulse.enter(Phase.AGREE)


@pytest.mark.parametrize("phase", [Phase.START, Phase.SAVE, Phase.EVALUATE, Phase.FINISH])
def test_what_may_take_long_outlives_the_short_time_out(tmp_path, phase):
    watched = Watched(tmp_path)
    with watched.watchdog:
        if phase is not Phase.START:
            watched.steps(3)
            watched.pulse.enter(phase)
        time.sleep(3 * HANG_S)
    assert watched.errors == []


def test_the_first_step_has_the_long_time_out_and_the_second_the_short_one(tmp_path):
    watched = Watched(tmp_path)
    with watched.watchdog:
        watched.pulse.enter(Phase.DATA, 41)  # as after a resume
        time.sleep(3 * HANG_S)
        assert watched.errors == []
        watched.pulse.enter(Phase.DATA, 42)
        assert watched.has_ended.wait(DEADLINE_S)
    (error,) = watched.errors
    assert (error.exit_status, error.field, error.value) == (76, "train.hang_timeout_s", HANG_S)
    assert "step 42, waiting for data" in str(error)
    assert watched.beats[-1].is_hung
    assert "test_watchdog.py" in watched.log.read_text()


def test_the_long_time_out_ends_a_first_step_too(tmp_path):
    watched = Watched(tmp_path, slow_s=0.5)
    with watched.watchdog:
        assert watched.has_ended.wait(DEADLINE_S)
    assert watched.errors[0].field == "train.first_step_timeout_s"


def test_each_forward_and_each_update_is_progress(tmp_path):
    watched = Watched(tmp_path)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched.pulse.follow(model, optimizer)
    with watched.watchdog:
        watched.steps(2)
        watched.pulse.enter(Phase.DATA, 3)
        until = time.monotonic() + 3 * HANG_S
        while time.monotonic() < until:
            model(torch.ones(1, 2)).sum().backward()
            assert watched.pulse.place.phase is Phase.TRAIN
            optimizer.step()
            assert watched.pulse.place[:2] == (3, Phase.UPDATE)
            time.sleep(0.01)
        assert watched.errors == []
        watched.pulse.enter(Phase.EVALUATE)
        model(torch.ones(1, 2))
        assert watched.pulse.place.phase is Phase.EVALUATE


def test_zero_switches_the_watchdog_off(tmp_path):
    watched = Watched(tmp_path, hang_s=0.0, slow_s=0.1)
    before = threading.active_count()
    with watched.watchdog:
        assert threading.active_count() == before
        time.sleep(0.3)
    assert watched.errors == watched.beats == []


def test_the_users_hooks_at_the_end_may_take_as_long_as_they_do(tmp_path):
    watched = Watched(tmp_path, slow_s=0.3)
    with watched.watchdog:
        watched.pulse.enter(Phase.CLOSE)
        time.sleep(1.0)
    assert watched.errors == []


def test_zero_lets_what_takes_long_take_as_long_as_it_does(tmp_path):
    watched = Watched(tmp_path, slow_s=0.0)
    with watched.watchdog:
        time.sleep(3 * HANG_S)
        assert watched.errors == []
        watched.steps(2)
        assert watched.has_ended.wait(DEADLINE_S)


def test_the_supervisor_is_told_from_time_to_time(tmp_path):
    watched = Watched(tmp_path, hang_s=1.0)
    with watched.watchdog:
        watched.steps(1)
        end = time.monotonic() + DEADLINE_S
        while len(watched.beats) < 4:
            assert time.monotonic() < end
            time.sleep(0.02)
    assert watched.beats[0].phase is Phase.START
    assert (watched.beats[-1].step, watched.beats[-1].phase, watched.beats[-1].limit_s) == (1, Phase.AGREE, SLOW_S)
