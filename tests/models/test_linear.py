"""Half precision multiplied in fp32 is what torch's own half-precision kernels compute, to their rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lmscale.models.linear import _WidenedLinear, linear
from lmscale.parallel import device

ROUNDINGS = 2
"""Units in the last place: one for each side's rounding of sums in another order."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_widened_multiplication_agrees_with_torchs_in_every_gradient(dtype: torch.dtype, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, weight, grad = draw(3, 5, 16), draw(8, 16), draw(3, 5, 8)
    bias = draw(8) if has_bias else None
    results = []
    for function in (F.linear, _WidenedLinear.apply):
        inputs = [None if tensor is None else tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        out = function(*inputs)
        out.backward(grad)
        assert out.dtype == dtype
        results.append([out.detach(), *(tensor.grad for tensor in inputs if tensor is not None)])
    for theirs, ours in zip(*results, strict=True):
        bound = ROUNDINGS * torch.finfo(dtype).eps * theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)


def test_only_what_torch_has_no_kernels_for_is_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, 4, requires_grad=True)
    weight = torch.ones(3, 4)
    monkeypatch.setattr(device, "_SLOW_ON_CPU", frozenset({torch.bfloat16}))
    assert "Widened" not in linear(x, weight).grad_fn.name()
    assert "Widened" in linear(x.bfloat16(), weight.bfloat16()).grad_fn.name()
    monkeypatch.setattr(device, "_SLOW_ON_CPU", frozenset())
    assert "Widened" not in linear(x.bfloat16(), weight.bfloat16()).grad_fn.name()
