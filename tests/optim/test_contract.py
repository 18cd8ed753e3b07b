"""Every optimizer, as the config builds it: torch's own for ten steps, its state saved and resumed, its types kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lmscale.config.optim import OptimConfig
from lmscale.config.run import ZeroChoice
from lmscale.optim.adafactor import Share
from lmscale.optim.build import blank_state, build_optimizer, set_rate, update_count
from lmscale.optim.muon import Muon

STEPS, LR, DECAY = 10, 1.0e-2, 0.1
TOLERANCE = 2.0e-6
"""Of a tensor's largest weight: fp32 roundings in another order."""
BETAS, EPS = (0.9, 0.98), 1.0e-6
ADAM: dict[str, Any] = {"adam_beta1": BETAS[0], "adam_beta2": BETAS[1], "adam_eps": EPS}
SHAPES = ((48, 40), (24, 96), (30, 16), (33,))
MATRICES = 2
"""The first two are hidden matrices, the third an embedding, the last a bias."""
Groups = list[dict[str, Any]]


def draw(seed: int, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator) for shape in SHAPES]


def groups_of(parameters: list[nn.Parameter]) -> Groups:
    matrices, embedding, bias = parameters[:MATRICES], parameters[MATRICES], parameters[-1]
    return [
        {"params": matrices, "weight_decay": DECAY, "is_hidden_matrix": True},
        {"params": [embedding], "weight_decay": DECAY, "is_hidden_matrix": False},
        {"params": [bias], "weight_decay": 0.0, "is_hidden_matrix": False},
    ]


def ours(groups: Groups, **optim: Any) -> torch.optim.Optimizer:
    optimizer = build_optimizer(groups, OptimConfig(lr=LR, **optim), torch.device("cpu"), ZeroChoice())
    set_rate(optimizer, LR)
    return optimizer


class Reference:
    """An optimizer written as its paper has it: update(p, g, state, t, decay) returns the new p, a tensor at a time."""

    def __init__(self, update: Callable[..., torch.Tensor]):
        self._update, self._states, self._count = update, {}, 0

    def __call__(self, groups: Groups) -> Reference:
        self._pairs = [(p, group["weight_decay"]) for group in groups for p in group["params"]]
        self._states = {
            p: {"m": torch.zeros_like(p).double(), "v": torch.zeros_like(p).double()} for p, _ in self._pairs
        }
        self._count = 0
        return self

    @torch.no_grad()
    def step(self) -> None:
        self._count += 1
        for p, decay in self._pairs:
            p.copy_(self._update(p.double(), p.grad.double(), self._states[p], self._count, decay))


def lion(p: torch.Tensor, g: torch.Tensor, state: dict[str, torch.Tensor], t: int, decay: float) -> torch.Tensor:
    direction = torch.sign(0.9 * state["m"] + 0.1 * g)
    state["m"] = 0.99 * state["m"] + 0.01 * g
    return p - LR * (direction + decay * p)


def adam_of(variant: str, decoupled: bool) -> Callable[..., torch.Tensor]:
    """Adam in the forms of torch, fairseq (raw) and BERT (uncorrected)."""

    def update(p: torch.Tensor, g: torch.Tensor, state: dict[str, torch.Tensor], t: int, decay: float) -> torch.Tensor:
        g = g if decoupled else g + decay * p
        state["m"] = BETAS[0] * state["m"] + (1 - BETAS[0]) * g
        state["v"] = BETAS[1] * state["v"] + (1 - BETAS[1]) * g**2
        if variant == "uncorrected":
            direction = state["m"] / (state["v"].sqrt() + EPS)
        else:  # fairseq: the corrections are folded into the rate
            rate = (1 - BETAS[1] ** t) ** 0.5 / (1 - BETAS[0] ** t)
            direction = rate * state["m"] / (state["v"].sqrt() + EPS)
        return p - LR * direction - (LR * decay * p if decoupled else 0.0)

    return update


class TorchMuon:
    """torch's Muon for the matrices, torch's AdamW for the rest."""

    def __init__(self, groups: Groups):
        plain = [{key: group[key] for key in ("params", "weight_decay")} for group in groups]
        self._parts = (
            torch.optim.Muon(plain[:1], lr=LR, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(plain[1:], lr=LR, betas=BETAS, eps=EPS),
        )

    def step(self) -> None:
        for part in self._parts:
            part.step()


def torchs(kind: Any, **options: Any) -> Callable[[Groups], Any]:
    def build(groups: Groups) -> Any:
        return kind([{key: group[key] for key in ("params", "weight_decay")} for group in groups], lr=LR, **options)

    return build


CASES: dict[str, tuple[dict[str, Any], Callable[[Groups], Any]]] = {
    "sgd": ({"name": "sgd"}, torchs(torch.optim.SGD)),
    "sgd-momentum": ({"name": "sgd", "sgd_momentum": 0.9}, torchs(torch.optim.SGD, momentum=0.9)),
    "sgd-nesterov": (
        {"name": "sgd", "sgd_momentum": 0.9, "sgd_nesterov": True},
        torchs(torch.optim.SGD, momentum=0.9, nesterov=True),
    ),
    "adamw": ({"name": "adamw", **ADAM}, torchs(torch.optim.AdamW, betas=BETAS, eps=EPS)),
    "adam": ({"name": "adam", **ADAM}, torchs(torch.optim.Adam, betas=BETAS, eps=EPS)),
    **{
        f"{name}-{variant}": ({"name": name, **ADAM, **options}, Reference(adam_of(variant, name == "adamw")))
        for name in ("adamw", "adam")
        for variant, options in (
            ("uncorrected", {"adam_bias_correction": False}),
            ("raw", {"adam_eps_mode": "raw"}),
        )
    },
    "adamw-deepspeed": (
        {"name": "adamw", "implementation": "deepspeed", **ADAM},
        torchs(torch.optim.AdamW, betas=BETAS, eps=EPS),
    ),
    "adam-deepspeed": (
        {"name": "adam", "implementation": "deepspeed", **ADAM},
        torchs(torch.optim.Adam, betas=BETAS, eps=EPS),
    ),
    "adamw-deepspeed-uncorrected": (
        {"name": "adamw", "implementation": "deepspeed", "adam_bias_correction": False, **ADAM},
        Reference(adam_of("uncorrected", True)),
    ),
    "adafactor": (
        {"name": "adafactor", "adafactor_min_dim": 1},
        torchs(torch.optim.Adafactor, eps=(1.0e-30, 1.0e-3)),
    ),
    "lion": ({"name": "lion"}, Reference(lion)),
    "muon": ({"name": "muon", **ADAM}, TorchMuon),
}


def train(parameters: list[nn.Parameter], optimizer: Any, steps: range) -> list[torch.Tensor]:
    for step in steps:
        for parameter, grad in zip(parameters, draw(step, 1.0e-2), strict=True):
            parameter.grad = grad
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


def begin(build: Callable[[Groups], Any]) -> tuple[list[nn.Parameter], Any]:
    parameters = [nn.Parameter(values) for values in draw(0)]
    return parameters, build(groups_of(parameters))


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_are_those_of_an_independent_implementation(case: str) -> None:
    optim, reference = CASES[case]
    steps = range(1, STEPS + 1)
    theirs = train(*begin(reference), steps)
    for mine, other, start in zip(train(*begin(lambda g: ours(g, **optim)), steps), theirs, draw(0), strict=True):
        assert mine.dtype == torch.float32
        assert (mine - other).abs().max() <= TOLERANCE * other.abs().max()
        assert (other - start).abs().max() > 100 * TOLERANCE * other.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_state_put_into_a_blank_one_goes_on_as_before(case: str) -> None:
    optim, _ = CASES[case]
    parameters, optimizer = begin(lambda groups: ours(groups, **optim))
    train(parameters, optimizer, range(1, 5))
    saved = [parameter.detach().clone() for parameter in parameters]
    states = [copy.deepcopy(optimizer.state[parameter]) for parameter in parameters]
    assert update_count(optimizer) == 4
    reference = train(parameters, optimizer, range(5, STEPS + 1))

    resumed, fresh = begin(lambda groups: ours(groups, **optim))
    for parameter, values, state in zip(resumed, saved, states, strict=True):
        parameter.data.copy_(values)
        fresh.state[parameter] = blank = blank_state(fresh, parameter, 4)
        assert blank.keys() == state.keys()
        _copy_tensors(state, blank)
    # DeepSpeed's CPU Adam multiplies beta^t up step by step, and begins with a power where it is resumed.
    tolerance = TOLERANCE if case.endswith("-deepspeed") else 0.0
    for mine, whole in zip(train(resumed, fresh, range(5, STEPS + 1)), reference, strict=True):
        assert (mine - whole).abs().max() <= tolerance * whole.abs().max()


def _copy_tensors(source: dict[str, Any], target: dict[str, Any]) -> None:
    for name, values in source.items():
        if isinstance(values, dict):
            _copy_tensors(values, target[name])
        elif torch.is_tensor(values):
            assert values.dtype == target[name].dtype == torch.float32
            target[name].copy_(values)
        else:
            assert values == target[name]


@pytest.mark.parametrize("case", CASES)
def test_a_parameter_without_a_gradient_stays_as_it_is(case: str) -> None:
    parameters, optimizer = begin(lambda groups: ours(groups, **CASES[case][0]))
    for parameter, grad in zip(parameters[1:], draw(1)[1:], strict=True):
        parameter.grad = grad
    optimizer.step()
    assert torch.equal(parameters[0].detach(), draw(0)[0])
    assert not torch.equal(parameters[1].detach(), draw(0)[1])


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize(
    ("options", "eps", "moved"),
    [
        ({}, 1.0e-8, 0.909),
        ({}, 1.0e-6, 0.0909),
        ({"adam_eps_mode": "raw"}, 1.0e-8, 0.586),
        ({"adam_eps_mode": "raw"}, 1.0e-6, 0.0139),
        ({"adam_bias_correction": False}, 1.0e-8, 0.414),
        ({"adam_bias_correction": False}, 1.0e-6, 0.00986),
        ({"implementation": "deepspeed"}, 1.0e-8, 0.909),
        ({"implementation": "deepspeed", "adam_bias_correction": False}, 1.0e-6, 0.00986),
    ],
)
def test_first_move_for_a_small_gradient_has_the_published_three_digits(
    name: str, options: dict[str, Any], eps: float, moved: float
) -> None:
    """torch and the paper, fairseq, BERT: for a gradient of 1e-7 with beta2 0.98, in units of the rate."""
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.full((1,), 1.0e-7)
    optim = OptimConfig(lr=1.0, name=name, adam_beta2=0.98, adam_eps=eps, **options)
    optimizer = build_optimizer([{"params": [weight], "weight_decay": 0.0}], optim, weight.device, ZeroChoice())
    set_rate(optimizer, 1.0)
    optimizer.step()
    assert float(f"{-weight.item():.3g}") == moved


def test_decay_is_coupled_for_adam_and_sgd_and_decoupled_for_the_rest() -> None:
    """Coupled decay meets Adam's normalization: with no gradient but the decay's, Adam moves by the whole rate."""
    moves = {}
    for name in ("adam", "adamw", "lion", "muon"):
        weight = nn.Parameter(torch.ones(4, 4))
        weight.grad = torch.zeros(4, 4)
        group = {"params": [weight], "weight_decay": DECAY, "is_hidden_matrix": name == "muon"}
        ours([group], name=name).step()
        moves[name] = 1.0 - weight[0, 0].item()
    assert moves["adam"] == pytest.approx(LR, rel=1e-4)
    for name in ("adamw", "lion", "muon"):
        assert moves[name] == pytest.approx(LR * DECAY, rel=1e-4)


def test_muon_takes_the_matrices_of_a_fused_tensor_apart() -> None:
    draw = torch.Generator().manual_seed(3)
    parts, groups, columns = (4, 2, 2), 3, 6  # queries, keys and values of three groups of heads
    fused = torch.randn(groups * sum(parts), columns, generator=draw)
    grads = [torch.randn(fused.shape, generator=draw) for _ in range(3)]

    def split(tensor: torch.Tensor) -> list[torch.Tensor]:
        blocks = tensor.view(groups, sum(parts), columns).split(parts, dim=1)
        return [block.reshape(-1, columns).clone() for block in blocks]

    def train(weights: list[torch.Tensor], gradients: list[list[torch.Tensor]], is_fused: bool) -> None:
        options = {"params": weights, "weight_decay": 0.1, "is_hidden_matrix": True}
        optimizer = Muon([options], lr=0.02, dtype=torch.float32)
        if is_fused:
            shape = tuple(weights[0].shape)
            share = Share(
                "fused", shape, shape, None, 0, weights[0].numel(), weights[0], 0, parts, is_hidden_matrix=True
            )
            optimizer.describe([share], None, None)
        for step in gradients:
            for weight, grad in zip(weights, step, strict=True):
                weight.grad = grad.clone()
            optimizer.step()

    whole, apart = fused.clone(), split(fused)
    train([whole], [[grad] for grad in grads], is_fused=True)
    train(apart, [split(grad) for grad in grads], is_fused=False)
    for ours, theirs in zip(split(whole), apart, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert (whole - fused).abs().max() > 0.01
