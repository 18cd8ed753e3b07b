from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.data.draws import streams
from lmscale.objectives.masking import choose, choose_groups, close_up, shuffled


def streams_of(count: int) -> np.ndarray:
    return streams(np.arange(count)[:, None], 7)


def test_every_set_of_places_is_chosen_equally_often() -> None:
    rows = 20_000
    is_candidate = np.broadcast_to(np.array([True, True, False, True, True]), (rows, 5))
    chosen = choose(streams_of(rows), is_candidate, np.full(rows, 2))
    counts = Counter(map(tuple, chosen.tolist()))
    assert len(counts) == 6
    sigma = (rows / 6 * 5 / 6) ** 0.5
    assert all(abs(count - rows / 6) < 4 * sigma for count in counts.values())
    assert not chosen[:, 2].any()


def test_as_many_are_chosen_as_asked_for_or_all_there_are() -> None:
    is_candidate = np.broadcast_to(np.arange(6) < 4, (5, 6))
    chosen = choose(streams_of(5), is_candidate, np.array([0, 1, 3, 4, 9]))
    assert chosen.sum(axis=1).tolist() == [0, 1, 3, 4, 4]


def test_a_shuffle_holds_each_place_once_candidates_first() -> None:
    is_candidate = np.random.default_rng(0).random((50, 30)) < 0.5
    order = shuffled(streams_of(50), is_candidate)
    assert (np.sort(order, axis=1) == np.arange(30)).all()
    for row, places in enumerate(order):
        count = int(is_candidate[row].sum())
        assert set(places[:count]) == set(np.flatnonzero(is_candidate[row]))


def test_a_wider_row_changes_no_choice() -> None:
    is_candidate = np.random.default_rng(0).random((40, 30)) < 0.5
    wide = np.pad(is_candidate, ((0, 0), (0, 11)))
    counts = np.full(40, 5)
    assert (choose(streams_of(40), wide, counts)[:, :30] == choose(streams_of(40), is_candidate, counts)).all()


def walk_one_by_one(order: list[int], groups: dict[int, list[int]], budget: int) -> set[int]:
    """The loop of google-research/bert."""
    taken: list[int] = []
    for head in order:
        if len(taken) >= budget:
            break
        if len(taken) + len(groups[head]) > budget:
            continue
        taken += groups[head]
    return set(taken)


@given(seed=st.integers(0, 1 << 30), share=st.sampled_from([0.1, 0.3, 0.9]))
@settings(max_examples=60, deadline=None)
def test_groups_are_walked_as_the_original_loop_walks_them(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    rows, width = 6, 40
    is_candidate, is_head = rng.random((rows, width)) < 0.8, rng.random((rows, width)) < share
    is_candidate[0] = False
    budgets = rng.integers(0, 20, rows)
    names = streams(rng.integers(0, 1 << 40, (rows, 1)), 7)
    chosen = choose_groups(names, is_candidate, is_head, budgets)
    heads_of_rows = np.zeros_like(is_candidate)
    for row in range(rows):
        groups: dict[int, list[int]] = {}
        for place in np.flatnonzero(is_candidate[row]).tolist():
            if is_head[row, place] or not groups:
                head = place
                groups[head] = []
            groups[head].append(place)
        heads_of_rows[row, list(groups)] = True
        order = [place for place in shuffled(names, heads_of_rows)[row].tolist() if place in groups]
        assert set(np.flatnonzero(chosen[row])) == walk_one_by_one(order, groups, budgets[row])


def test_what_is_kept_closes_up_in_order() -> None:
    values, is_kept = np.array([[1, 2, 3], [4, 5, 6]]), np.array([[True, False, True], [False, False, True]])
    closed, counts = close_up(values, is_kept, 4, -1)
    assert closed.tolist() == [[1, 3, -1, -1], [6, -1, -1, -1]]
    assert counts.tolist() == [2, 1]
