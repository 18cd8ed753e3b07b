"""The batch-size ramp and the steps that follow from it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.config.data import SeqLengthStage
from lmscale.config.optim import BatchConfig, BatchStage, RampConfig
from lmscale.errors import ConfigError
from lmscale.optim.batch_ramp import Sizes, batch_size_at
from lmscale.optim.steps import StepPlan, Steps, num_steps, step_plan


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


def plan_of(batch: BatchConfig) -> StepPlan:
    return step_plan(Sizes(batch, 1))


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
    assert num_steps(Sizes(batch, 2048), 300_000_000_000) == 572_205
    assert num_steps(Sizes(batch, 2048), 256 * 2048) == 1
    assert num_steps(Sizes(batch, 2048), 256 * 2048 + 1) == 2


def test_gpt3_175b_ramp_takes_the_steps_that_walking_takes():
    batch = ramped(16, 16, 5_859_375, 1536)
    steps = num_steps(Sizes(batch, 2048), 12_000_000_000)
    consumed = walk(batch, steps)
    assert consumed[steps - 1] * 2048 < 12_000_000_000 <= consumed[steps] * 2048
    assert len(plan_of(batch).stages) == 96


def test_a_stage_shorter_than_a_step_is_passed_over():
    batch = ramped(8, 1, 4, 12)
    assert [stage.batch_size for stage in plan_of(batch).stages] == [8, 12]


def test_a_ramp_that_starts_full_is_no_ramp():
    assert batch_size_at(0, ramped(8, 8, 100, 8)) == 8
    assert len(plan_of(ramped(8, 8, 100, 8)).stages) == 1


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
        assert all((s.batch_size - batch.ramp.start) % batch.ramp.increment == 0 for s in plan_of(batch).stages)


@settings(deadline=None)  # a busy machine is no failure
@given(batches())
def test_closed_forms_agree_with_stepping_one_by_one(batch):
    consumed, plan = walk(batch, 120), plan_of(batch)
    assert [plan.samples_after(step) for step in range(121)] == consumed
    for samples in range(consumed[-1] + 1):
        steps = plan.steps_until(samples)
        assert consumed[steps] >= samples
        assert steps == 0 or consumed[steps - 1] < samples


@settings(deadline=None)  # a busy machine is no failure
@given(batches(), st.integers(1, 50), st.integers(0, 5000))
def test_a_run_ends_with_the_first_step_that_reaches_its_tokens(batch, seq_length, train_tokens):
    steps = num_steps(Sizes(batch, seq_length), train_tokens)
    assert plan_of(batch).samples_after(steps) * seq_length >= train_tokens
    assert steps == 0 or plan_of(batch).samples_after(steps - 1) * seq_length < train_tokens


@pytest.mark.parametrize("ask", [lambda b: batch_size_at(-1, b), lambda b: plan_of(b).samples_after(-1)])
def test_negative_progress_is_refused(ask):
    with pytest.raises(ConfigError, match="= -1: must be at least 0"):
        ask(BatchConfig(micro_batch_size=1, global_batch_size=4))


@st.composite
def sizes(draw):
    """Batches by a ramp or by stages, lengths by a curriculum; borders that fall together, or inside a step, included."""
    full_length = draw(st.integers(1, 6))
    batch = draw(batches())
    if draw(st.booleans()):
        ends = sorted(draw(st.sets(st.integers(1, 800), max_size=4)))
        stages = [BatchStage(batch_size=draw(st.integers(1, 12)), until_tokens=end) for end in ends]
        batch = BatchConfig(micro_batch_size=1, global_batch_size=draw(st.integers(1, 12)), stages=stages)
    ends = sorted(draw(st.sets(st.integers(1, 800), max_size=4)))
    lengths = tuple(SeqLengthStage(seq_length=draw(st.integers(1, full_length)), until_tokens=end) for end in ends)
    return Sizes(batch, full_length, lengths)


def walk_sizes(sizes, steps=120):
    """Step one by one, by the definitions: what a step's batch and length are, and that it consumes their product."""
    samples = tokens = 0
    walked = [(0, 0, None)]
    for _ in range(steps):
        length = next((s.seq_length for s in sizes.stages if tokens < s.until_tokens), sizes.seq_length)
        batch = next((s.batch_size for s in sizes.batch.stages if tokens < s.until_tokens), None)
        batch = batch or batch_size_at(samples, sizes.batch.model_copy(update={"stages": []}))
        samples, tokens = samples + batch, tokens + batch * length
        walked.append((samples, tokens, (batch, length)))
    return walked


@settings(deadline=None)  # a busy machine is no failure
@given(sizes())
def test_plan_of_ramp_and_curriculum_agrees_with_stepping_one_by_one(sizes):
    walked, plan = walk_sizes(sizes), step_plan(sizes)
    for number, (after, tokens_after, size) in enumerate(walked):
        assert (plan.samples_after(number), plan.tokens_after(number)) == (after, tokens_after)
        assert size is None or plan.stage_of(number).size == size
    for number in range(1, len(walked)):
        for wanted in {walked[number - 1][0] + 1, walked[number][0]}:
            assert plan.steps_until(wanted) == number
        for wanted in {walked[number - 1][1] + 1, walked[number][1]}:
            assert plan.steps_until_tokens(wanted) == number


@settings(deadline=None)  # a busy machine is no failure
@given(sizes(), st.integers(1, 2000), st.integers(0, 60))
def test_steps_of_the_loader_are_those_of_the_plan(sizes, train_tokens, done):
    plan, total = step_plan(sizes), num_steps(sizes, train_tokens)
    done = min(done, total)
    left = list(Steps(sizes, plan.samples_after(done), plan.tokens_after(done), train_tokens))
    assert [step.first_sample for step in left] == [plan.samples_after(n) for n in range(done, total)]
    assert [(s.batch_size, s.seq_length) for s in left] == [plan.stage_of(n + 1).size for n in range(done, total)]


def test_batch_stages_hold_until_their_tokens_and_the_step_that_passes_them_keeps_its_size():
    stages = [BatchStage(batch_size=2, until_tokens=30), BatchStage(batch_size=4, until_tokens=100)]
    batch = BatchConfig(micro_batch_size=1, global_batch_size=8, stages=stages)
    assert [batch_size_at(0, batch, tokens) for tokens in (0, 29, 30, 99, 100)] == [2, 2, 4, 4, 8]
    plan = step_plan(Sizes(batch, 10))
    assert [(s.first_step, s.first_token, s.batch_size) for s in plan.stages] == [(1, 0, 2), (3, 40, 4), (5, 120, 8)]
