"""Of what ranks hold alike, one writes it into each directory; every directory gets all that its own ranks need."""

from __future__ import annotations

import itertools

import pytest

from lmscale.train.slices import Place, _Kind, _writes

LAYOUTS = [(1, 1, 4), (2, 1, 2), (2, 2, 2), (4, 2, 1)]
KINDS = [
    _Kind(tied, replicated, split, False) for tied, replicated, split in itertools.product((False, True), repeat=3)
]


def ranks_of(tp, pp, dp, hosts):
    """Number the ranks of a layout over hosts, neighbours together, that each have a directory."""
    size = tp * pp * dp
    leaders = [rank // (size // hosts) * (size // hosts) for rank in range(size)]
    return tuple(Place(rank % tp, rank // (tp * dp), rank // tp % dp, leader) for rank, leader in enumerate(leaders))


def value_of(kind, place, last_stage):
    """Name the value that a rank holds; ranks with the same name hold the same."""
    return (
        place.tp_rank if kind.is_split else None,
        None if kind.is_replicated else place.dp_rank,
        0 if kind.is_tied_copy and place.pp_rank == last_stage else place.pp_rank,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_each_value_is_written_once_into_each_directory_that_needs_it(layout, hosts, kind):
    ranks = ranks_of(*layout, hosts)
    last_stage = layout[1] - 1
    written, needed = [], set()
    for place in ranks:
        # A tied parameter is a copy on the last stage and the original on the first.
        own = _Kind(kind.is_tied_copy and 0 < place.pp_rank == last_stage, *kind_rest(kind))
        name = (place.leader, *value_of(own, place, last_stage))
        needed.add(name)
        if _writes(own, place, ranks):
            written.append(name)
    assert len(written) == len(set(written))
    assert set(written) == needed


def kind_rest(kind):
    return kind.is_replicated, kind.is_split, kind.is_copy


def test_copies_of_what_the_first_part_holds_are_written_where_it_may_be_elsewhere():
    copy = _Kind(False, False, False, True)
    for place in ranks_of(1, 1, 4, 1):
        assert not _writes(copy, place, ranks_of(1, 1, 4, 1))
    for place in ranks_of(1, 1, 4, 2):
        assert _writes(copy, place, ranks_of(1, 1, 4, 2))
