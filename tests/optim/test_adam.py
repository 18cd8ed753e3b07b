"""Adam's variants against torch's, and against the formulas of the papers' code in plain Python."""

from __future__ import annotations

import pytest
import torch

from lmscale.optim.adam import Adam

SETTINGS = {"lr": 1.0e-2, "betas": (0.9, 0.98), "eps": 1.0e-6, "weight_decay": 0.1}


def trained(optimizer_of: object, steps: int = 10) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(7, 5, generator=generator, dtype=torch.float64))
    optimizer = optimizer_of([weight])  # type: ignore[operator]
    for _ in range(steps):
        weight.grad = torch.randn(7, 5, generator=generator, dtype=torch.float64) * 1.0e-3
        optimizer.step()
    return weight.detach()


def test_with_correction_it_is_torchs_adamw() -> None:
    ours = trained(lambda params: Adam(params, **SETTINGS))
    torch.testing.assert_close(ours, trained(lambda params: torch.optim.AdamW(params, **SETTINGS)), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("options", "eps", "moved"),
    [
        ({}, 1.0e-8, 0.909),
        ({}, 1.0e-6, 0.0909),
        ({"raw_eps": True}, 1.0e-8, 0.586),
        ({"raw_eps": True}, 1.0e-6, 0.0139),
        ({"bias_correction": False}, 1.0e-8, 0.414),
        ({"bias_correction": False}, 1.0e-6, 0.00986),
    ],
)
def test_the_first_update_for_a_small_gradient_is_that_of_each_reference(
    options: dict[str, bool], eps: float, moved: float
) -> None:
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    weight.grad = torch.full((1,), 1.0e-7, dtype=torch.float64)
    Adam([weight], lr=1.0, betas=(0.9, 0.98), eps=eps, **options).step()
    assert -weight.item() == pytest.approx(moved, rel=5e-3)


def test_no_gradient_no_update() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    Adam([weight], lr=1.0, weight_decay=0.1).step()
    assert torch.equal(weight.detach(), torch.ones(3))
