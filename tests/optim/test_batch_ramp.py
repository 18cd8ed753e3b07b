"""The batch-size ramp and the steps that follow from it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.config.optim import BatchConfig, RampConfig
from lmscale.errors import ConfigError
from lmscale.optim.batch_ramp import batch_size_at, num_steps, progress_at_step, step_plan


def ramped(start, increment, ramp_samples, full):
    ramp = RampConfig(start=start, increment=increment, ramp_samples=ramp_samples)
    return BatchConfig(micro_batch_size=1, global_batch_size=full, ramp=ramp)


@st.composite
def batches(draw):
    start, increment = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    full = start + increment * draw(st.integers(0, 12))
    if draw(st.booleans()):
        return BatchConfig(micro_batch_size=1, global_batch_size=full)
    return ramped(start, increment, draw(st.integers(1, 600)), full)


def walk(batch, steps):
    """Step one by one: the truth that the closed forms have to meet."""
    consumed = [0]
    for _ in range(steps):
        consumed.append(consumed[-1] + batch_size_at(consumed[-1], batch))
    return consumed


@pytest.mark.parametrize(
    ("ramp_samples", "full", "tokens"),
    [(1_953_125, 256, 4.0e9), (4_882_812, 1024, 10.0e9), (5_859_375, 1536, 12.0e9)],
)
def test_published_ramps_end_at_their_tokens(ramp_samples, full, tokens):
    batch = ramped(16, 16, ramp_samples, full)
    assert ramp_samples * 2048 == pytest.approx(tokens, rel=1e-6)
    assert batch_size_at(0, batch) == 16
    assert batch_size_at(ramp_samples - 1, batch) == full - 16
    assert batch_size_at(ramp_samples, batch) == full
    assert batch_size_at(10**9, batch) == full


def test_stages_share_the_ramp_equally():
    batch = ramped(2, 2, 90, 8)
    assert [batch_size_at(n, batch) for n in (0, 29, 30, 59, 60, 89, 90, 91)] == [2, 2, 4, 4, 6, 6, 8, 8]


def test_number_of_steps_without_a_ramp_is_a_division_rounded_up():
    batch = BatchConfig(micro_batch_size=4, global_batch_size=256)
    assert num_steps(batch, 2048, 300_000_000_000) == 572_205
    assert num_steps(batch, 2048, 256 * 2048) == 1
    assert num_steps(batch, 2048, 256 * 2048 + 1) == 2


def test_gpt3_175b_ramp_takes_the_steps_that_walking_takes():
    batch = ramped(16, 16, 5_859_375, 1536)
    steps = num_steps(batch, 2048, 12_000_000_000)
    consumed = walk(batch, steps)
    assert consumed[steps - 1] * 2048 < 12_000_000_000 <= consumed[steps] * 2048
    assert len(step_plan(batch).stages) == 96


def test_a_stage_shorter_than_a_step_is_passed_over():
    batch = ramped(8, 1, 4, 12)
    assert [stage.batch_size for stage in step_plan(batch).stages] == [8, 12]


def test_a_ramp_that_starts_full_is_no_ramp():
    assert batch_size_at(0, ramped(8, 8, 100, 8)) == 8
    assert len(step_plan(ramped(8, 8, 100, 8)).stages) == 1


@settings(deadline=None)  # a busy machine is no failure
@given(batches(), st.integers(0, 2000), st.integers(0, 2000))
def test_ramp_is_monotone_and_stays_between_start_and_full(batch, one, other):
    early, late = sorted((one, other))
    start = batch.ramp.start if batch.ramp else batch.global_batch_size
    assert start <= batch_size_at(early, batch) <= batch_size_at(late, batch) <= batch.global_batch_size


@settings(deadline=None)  # a busy machine is no failure
@given(batches())
def test_every_size_is_start_plus_whole_increments(batch):
    # So a start and an increment that divide over micro batch x dp_size make every stage divide.
    if batch.ramp:
        assert all((s.batch_size - batch.ramp.start) % batch.ramp.increment == 0 for s in step_plan(batch).stages)


@settings(deadline=None)  # a busy machine is no failure
@given(batches())
def test_closed_forms_agree_with_stepping_one_by_one(batch):
    consumed, plan = walk(batch, 120), step_plan(batch)
    assert [plan.samples_after(step) for step in range(121)] == consumed
    for samples in range(consumed[-1] + 1):
        steps = plan.steps_until(samples)
        assert consumed[steps] >= samples
        assert steps == 0 or consumed[steps - 1] < samples


@settings(deadline=None)  # a busy machine is no failure
@given(batches(), st.integers(1, 50), st.integers(0, 5000))
def test_a_run_ends_with_the_first_step_that_reaches_its_tokens(batch, seq_length, train_tokens):
    steps = num_steps(batch, seq_length, train_tokens)
    assert progress_at_step(steps, batch) * seq_length >= train_tokens
    assert steps == 0 or progress_at_step(steps - 1, batch) * seq_length < train_tokens


@pytest.mark.parametrize("ask", [lambda b: batch_size_at(-1, b), lambda b: progress_at_step(-1, b)])
def test_negative_progress_is_refused(ask):
    with pytest.raises(ConfigError, match="= -1: must be at least 0"):
        ask(BatchConfig(micro_batch_size=1, global_batch_size=4))
