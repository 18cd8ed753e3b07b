"""Adafactor against transformers' and torch's, on whole tensors and on flat ranges of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor as TransformersAdafactor

from lmscale.optim.adafactor import Adafactor, Share

SHAPES = ((48, 40), (7, 130), (33,), (16, 8))
STEPS, LR = 10, 1.0e-2
TOLERANCE = 1.0e-6
"""After ten updates: fp32 sums of transformers' and torch's against our fp64 ones."""


def draw(scale: float, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator) for shape in SHAPES]


def train(optimizer_of, scale: float = 1.0, steps: int = STEPS) -> list[torch.Tensor]:
    """Update some tensors by drawn gradients, of sizes that change, and return them."""
    parameters = [nn.Parameter(values) for values in draw(scale, 0)]
    optimizer = optimizer_of(parameters)
    for step in range(1, steps + 1):
        for parameter, grad in zip(parameters, draw(math.exp(step % 4 - 2), step), strict=True):
            parameter.grad = grad
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def largest_difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Of the largest weight of each tensor."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("scale_parameter", [True, False])
@pytest.mark.parametrize("clip", [0.5, 1.0])
@pytest.mark.parametrize("scale", [1.0, 1.0e-5])  # the second below eps2
def test_it_is_transformers_adafactor_at_a_given_rate(scale_parameter: bool, clip: float, scale: float) -> None:
    ours = train(
        lambda p: Adafactor(p, lr=LR, clip=clip, scale_parameter=scale_parameter, min_dim=1),
        scale,
    )
    theirs = train(
        lambda p: TransformersAdafactor(
            p, lr=LR, clip_threshold=clip, scale_parameter=scale_parameter, relative_step=False
        ),
        scale,
    )
    assert largest_difference(ours, theirs) < TOLERANCE
    assert largest_difference(ours, draw(scale, 0)) > 100 * TOLERANCE


@pytest.mark.parametrize("scale_parameter", [True, False])
def test_first_moment_is_transformers(scale_parameter: bool) -> None:
    ours = train(lambda p: Adafactor(p, lr=LR, scale_parameter=scale_parameter, min_dim=1, beta1=0.9))
    theirs = train(
        lambda p: TransformersAdafactor(p, lr=LR, beta1=0.9, scale_parameter=scale_parameter, relative_step=False)
    )
    without = train(lambda p: Adafactor(p, lr=LR, scale_parameter=scale_parameter, min_dim=1))
    assert largest_difference(ours, theirs) < TOLERANCE
    assert largest_difference(ours, without) > 100 * TOLERANCE


def test_it_is_torchs_adafactor_with_decay() -> None:
    """torch's rate is min(lr, 1 / sqrt(step)): lr as long as that is small."""
    ours = train(lambda p: Adafactor(p, lr=LR, weight_decay=0.1, min_dim=1))
    theirs = train(lambda p: torch.optim.Adafactor(p, lr=LR, weight_decay=0.1, eps=(1.0e-30, 1.0e-3)))
    assert largest_difference(ours, theirs) < TOLERANCE


def test_matrices_with_a_small_dimension_keep_the_whole_second_moment() -> None:
    parameters = [nn.Parameter(values) for values in draw(1.0, 0)]
    optimizer = Adafactor(parameters, lr=LR, min_dim=40)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    sizes = [[len(values) for values in optimizer.state[p]["parameter"].values()] for p in parameters]
    assert sizes == [[48, 40], [7 * 130], [33], [16 * 8]]


def test_rate_is_read_and_not_written() -> None:
    parameter = nn.Parameter(torch.ones(4, 4))
    optimizer = Adafactor([parameter], lr=LR)
    parameter.grad = torch.ones(4, 4)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == LR


@pytest.mark.parametrize("start", [0, 1, 5, 6, 24, 31])
@pytest.mark.parametrize("end", [32, 33, 36, 45, 58, 60])
@pytest.mark.parametrize("parts", [(), (2, 1, 1), (6, 6)])
def test_blocks_cover_a_range_of_each_matrix_once(start: int, end: int, parts: tuple[int, ...]) -> None:
    matrix = torch.arange(60).view(12, 5)
    share = Share("", (12, 5), (12, 5), None, start, end, matrix, start, parts)
    periods = matrix.view(-1, sum(parts) or 12, 5)
    part_of_row = torch.repeat_interleave(torch.tensor(parts or (12,))).tolist()
    blocks = list(share.blocks(share.of(matrix)))
    assert len(blocks) <= 9 * share.num_parts
    for block in blocks:
        assert torch.equal(periods[block.groups, block.rows, block.columns], block.view)
        assert set(part_of_row[block.rows]) == {block.part}
    covered = torch.cat([block.view.flatten() for block in blocks])
    assert sorted(covered.tolist()) == list(range(start, end))


@pytest.mark.parametrize("min_dim", [1, 1000], ids=["factored", "whole"])
def test_fused_matrices_are_updated_as_if_they_were_apart(min_dim: int) -> None:
    """Two groups of queries (4 rows), keys and values (2 rows each), the queries a tenth of the others in size."""
    parts, groups, width = (4, 2, 2), 2, 20
    generator = torch.Generator().manual_seed(0)
    apart = [nn.Parameter(torch.randn(groups, rows, width, generator=generator)) for rows in parts]
    apart[0].data.mul_(0.1)
    fused = nn.Parameter(torch.cat([p.data for p in apart], dim=1).flatten(0, 1))
    matrices = [nn.Parameter(p.data.flatten(0, 1)) for p in apart]
    ours = Adafactor([fused], lr=LR, min_dim=min_dim)
    shape = tuple(fused.shape)
    ours.describe([Share("fused", shape, shape, None, 0, fused.numel(), fused, 0, parts)], None, None)
    theirs = Adafactor(matrices, lr=LR, min_dim=min_dim)
    for step in range(STEPS):
        grads = [math.exp(step % 3) * torch.randn(p.shape, generator=generator) for p in apart]
        for matrix, grad in zip(matrices, grads, strict=True):
            matrix.grad = grad.flatten(0, 1)
        fused.grad = torch.cat(grads, dim=1).flatten(0, 1)
        ours.step()
        theirs.step()
    cut = fused.detach().view(groups, sum(parts), width).split(parts, dim=1)
    for mine, matrix in zip(cut, matrices, strict=True):
        assert (mine.flatten(0, 1) - matrix.detach()).abs().max() < TOLERANCE * matrix.abs().max()
    sizes = {kind: len(values) for kind, values in ours.state[fused]["fused"].items()}
    assert sizes == ({"row": 16, "column": 3 * width} if min_dim == 1 else {"second": 16 * width})


def test_padding_around_the_ranges_of_a_flat_tensor_is_left_alone() -> None:
    """As ZeRO holds parameters: two in one tensor, behind each some padding."""
    whole = [nn.Parameter(values) for values in draw(1.0, 0)[:2]]
    flat = nn.Parameter(torch.zeros(48 * 40 + 3 + 7 * 130 + 5))
    shares, offset = [], 0
    for number, (parameter, padding) in enumerate(zip(whole, (3, 5), strict=True)):
        shape, size = tuple(parameter.shape), parameter.numel()
        shares.append(Share(str(number), shape, shape, None, 0, size, flat, offset))
        flat.data[offset : offset + size] = parameter.detach().view(-1)
        offset += size + padding
    plain, ranged = Adafactor(whole, lr=LR, min_dim=1), Adafactor([flat], lr=LR, min_dim=1)
    ranged.describe(shares, None, None)
    for parameter in (*whole, flat):
        parameter.grad = torch.ones_like(parameter)
    plain.step()
    ranged.step()
    assert all(torch.equal(share.of(flat.data), p.data.view(-1)) for share, p in zip(shares, whole, strict=True))
    assert not flat.data[48 * 40 : 48 * 40 + 3].any()
    assert not flat.data[-5:].any()
