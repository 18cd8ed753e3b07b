from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmscale.feed.sampler import HeldOutSampler, MicroBatchSampler


def ramped(consumed: int) -> int:
    return 8 if consumed < 24 else 16


def test_micro_batches_are_dealt_to_the_ranks_in_turn() -> None:
    ranks = [list(MicroBatchSampler(lambda consumed: 8, 8, 2, rank, 2, 16)) for rank in range(2)]
    assert ranks == [[[8, 9], [12, 13]], [[10, 11], [14, 15]]]


@pytest.mark.parametrize(("micro_batch_size", "dp_size"), [(1, 1), (2, 1), (2, 4), (8, 1), (1, 8), (4, 2)])
def test_every_layout_trains_on_the_same_samples_step_by_step(micro_batch_size: int, dp_size: int) -> None:
    steps = [(0, 8), (8, 16), (16, 24), (24, 40), (40, 56)]
    ranks = [iter(MicroBatchSampler(ramped, 0, micro_batch_size, rank, dp_size, 50)) for rank in range(dp_size)]
    for first, behind in steps:
        micro_batches = (behind - first) // (micro_batch_size * dp_size)
        taken = [next(rank) for _ in range(micro_batches) for rank in ranks]
        assert list(chain.from_iterable(taken)) == list(range(first, behind))
    assert all(next(rank, None) is None for rank in ranks)


def test_a_resumed_sampler_goes_on_where_the_first_stood() -> None:
    whole = list(MicroBatchSampler(ramped, 0, 2, 1, 2, 100))
    assert whole[2 * 3 :] == list(MicroBatchSampler(ramped, 24, 2, 1, 2, 100))


@given(num_windows=st.integers(1, 60), micro_batch_size=st.integers(1, 5), dp_size=st.integers(1, 4))
def test_held_out_windows_count_once_and_ranks_keep_step(num_windows: int, micro_batch_size: int, dp_size: int) -> None:
    ranks = [list(HeldOutSampler(num_windows, micro_batch_size, rank, dp_size)) for rank in range(dp_size)]
    assert len({len(rank) for rank in ranks}) == 1
    rows = [row for rank in ranks for micro_batch in rank for row in micro_batch]
    assert sorted(row for row in rows if row >= 0) == list(range(num_windows))
    assert {len(micro_batch) for rank in ranks for micro_batch in rank} == {micro_batch_size}
    assert len(rows) - num_windows < micro_batch_size * dp_size
