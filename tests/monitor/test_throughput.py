"""Throughput, with a clock of our own."""

import pytest

from lmscale.monitor.throughput import Throughput, Work


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s

    def pass_s(self, seconds):
        self.now_s += seconds


@pytest.fixture
def clock():
    return Clock()


def fail_after(seconds, clock):
    clock.pass_s(seconds)
    raise OSError("disk full")


def make(clock, peak=1000.0):
    return Throughput(Work(4, 2.0, 3.0, peak), clock)


def test_rates_follow_from_tokens_time_and_devices(clock):
    throughput = make(clock)
    for _ in range(5):
        clock.pass_s(2.0)
        throughput.step_done(tokens=1600)
    assert throughput.window() == {
        "perf/tokens_per_second": 800.0,
        "perf/tokens_per_second_per_device": 200.0,
        "perf/model_flops_per_second_per_device": 400.0,
        "perf/mfu_fraction": 0.4,
        "perf/hfu_fraction": pytest.approx(0.6),
        "perf/step_time_s": 2.0,
        "perf/data_wait_fraction": 0.0,
    }


def test_steps_of_a_shorter_length_count_with_their_own_flops(clock):
    throughput = make(clock)
    clock.pass_s(4.0)
    throughput.step_done(1600, Work(4, 1.0, 1.5, 1000.0))
    throughput.step_done(1600)
    window = throughput.window()
    assert window["perf/model_flops_per_second_per_device"] == 1600 * (1.0 + 2.0) / 4.0 / 4
    assert window["perf/mfu_fraction"] == pytest.approx(0.3)
    assert window["perf/hfu_fraction"] == pytest.approx(0.45)


def test_evaluation_and_saving_are_left_out(clock):
    throughput = make(clock)
    clock.pass_s(4.0)
    with throughput.paused():
        clock.pass_s(50.0)
        with throughput.paused(), throughput.waiting():
            clock.pass_s(7.0)
    throughput.step_done(tokens=400)
    window = throughput.window()
    assert window["perf/step_time_s"] == 4.0
    assert window["perf/tokens_per_second"] == 100.0
    assert window["perf/data_wait_fraction"] == 0.0


def test_a_pause_ends_when_its_block_fails(clock):
    throughput = make(clock)
    with pytest.raises(OSError, match="disk full"), throughput.paused():
        fail_after(9.0, clock)
    clock.pass_s(1.0)
    throughput.step_done(tokens=4)
    assert throughput.window()["perf/step_time_s"] == 1.0


def test_waiting_for_data_is_a_share_of_the_window(clock):
    throughput = make(clock)
    with throughput.waiting():
        clock.pass_s(1.0)
    clock.pass_s(3.0)
    throughput.step_done(tokens=4)
    assert throughput.window()["perf/data_wait_fraction"] == 0.25


def test_windows_do_not_share_steps_or_time(clock):
    throughput = make(clock)
    clock.pass_s(10.0)
    throughput.step_done(tokens=10)
    throughput.window()
    clock.pass_s(1.0)
    throughput.step_done(tokens=10)
    assert throughput.window()["perf/tokens_per_second"] == 10.0


def test_a_restart_forgets_what_came_before(clock):
    throughput = make(clock)
    clock.pass_s(60.0)
    throughput.restart()
    clock.pass_s(1.0)
    throughput.step_done(tokens=10)
    assert throughput.window()["perf/tokens_per_second"] == 10.0


def test_a_window_without_steps_reports_nothing(clock):
    throughput = make(clock)
    clock.pass_s(1.0)
    assert throughput.window() == {}


def test_an_unknown_device_reports_no_mfu(clock):
    throughput = make(clock, peak=None)
    clock.pass_s(1.0)
    throughput.step_done(tokens=10)
    assert not {"perf/mfu_fraction", "perf/hfu_fraction"} & set(throughput.window())
