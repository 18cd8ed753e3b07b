from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmscale.feed.sampler import HeldOutSampler, MicroBatch, MicroBatchSampler

STEPS = [(0, 8, 4), (8, 8, 4), (16, 8, 4), (24, 16, 7), (40, 16, 7)]


def numbers(sampler: Iterable[MicroBatch]) -> list[list[int]]:
    return [indices for indices, _ in sampler]


def test_micro_batches_are_dealt_to_the_ranks_in_turn() -> None:
    ranks = [numbers(MicroBatchSampler([(8, 8, 4)], 2, rank, 2)) for rank in range(2)]
    assert ranks == [[[8, 9], [12, 13]], [[10, 11], [14, 15]]]


@pytest.mark.parametrize(("micro_batch_size", "dp_size"), [(1, 1), (2, 1), (2, 4), (8, 1), (1, 8), (4, 2)])
def test_every_layout_trains_on_the_same_samples_step_by_step(micro_batch_size: int, dp_size: int) -> None:
    ranks = [iter(MicroBatchSampler(STEPS, micro_batch_size, rank, dp_size)) for rank in range(dp_size)]
    for first, size, length in STEPS:
        taken = [next(rank) for _ in range(size // (micro_batch_size * dp_size)) for rank in ranks]
        assert list(chain.from_iterable(numbers(taken))) == list(range(first, first + size))
        assert {seq_length for _, seq_length in taken} == {length}
    assert all(next(rank, None) is None for rank in ranks)


def test_a_resumed_sampler_goes_on_where_the_first_stood() -> None:
    whole = list(MicroBatchSampler(STEPS, 2, 1, 2))
    assert whole[2 * 3 :] == list(MicroBatchSampler(STEPS[3:], 2, 1, 2))


@given(num_windows=st.integers(1, 60), micro_batch_size=st.integers(1, 5), dp_size=st.integers(1, 4))
def test_held_out_windows_count_once_and_ranks_keep_step(num_windows: int, micro_batch_size: int, dp_size: int) -> None:
    ranks = [numbers(HeldOutSampler(num_windows, micro_batch_size, rank, dp_size)) for rank in range(dp_size)]
    assert len({len(rank) for rank in ranks}) == 1
    rows = [row for rank in ranks for micro_batch in rank for row in micro_batch]
    assert sorted(row for row in rows if row >= 0) == list(range(num_windows))
    assert {len(micro_batch) for rank in ranks for micro_batch in rank} == {micro_batch_size}
    assert len(rows) - num_windows < micro_batch_size * dp_size
