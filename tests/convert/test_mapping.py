"""The steps of the tables, on numbers that can be followed by eye."""

from __future__ import annotations

import pytest
import torch

from lmscale.convert.mapping import Cut, Entry, Interleave, PadRows, Transpose

ROWS = torch.arange(12.0).view(12, 1)


@pytest.mark.parametrize(
    ("steps", "shapes"),
    [
        ((Transpose(),), [(3, 4)]),
        ((Cut(3),), None),
        ((Interleave(2, (2, 1, 1)),), [(4, 5), (2, 5), (2, 5)]),
        ((Interleave(2, (2, 1, 1)),), [(4,), (2,), (2,)]),
        ((PadRows(end=3),), [(5, 2)]),
        ((PadRows(front=1, end=2),), [(5,)]),
        ((Transpose(), Cut(3), Interleave(2, (2, 2, 2)), PadRows(end=1)), [(5, 12)]),
    ],
)
def test_what_is_converted_and_converted_back_is_the_same(steps, shapes):
    if shapes is None:
        parts = Cut(3).to_ours([ROWS])
        assert [part.flatten().tolist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
        assert torch.equal(Cut(3).to_theirs(parts)[0], ROWS)
        return
    theirs = [torch.randn(shape) for shape in shapes]
    one = Entry("ours", tuple(f"theirs.{number}" for number in range(len(theirs))), steps)
    ours = one.to_ours(theirs)
    assert one.their_shapes(tuple(ours.shape)) == shapes
    for back, tensor in zip(one.to_theirs(ours), theirs, strict=True):
        assert torch.equal(back, tensor)


def test_query_key_and_value_are_fused_group_by_group():
    query, key, value = torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11]), torch.tensor([20, 21])
    (fused,) = Interleave(2, (2, 1, 1)).to_ours([query, key, value])
    assert fused.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_padding_is_of_zeros():
    (padded,) = PadRows(front=1, end=2).to_ours([torch.ones(2, 2)])
    assert padded.tolist() == [[0, 0], [1, 1], [1, 1], [0, 0], [0, 0]]
