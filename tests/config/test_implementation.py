"""Whose code updates and normalizes: every reason to refuse, and what auto takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lmscale.config.implementation import choose_implementation, choose_norms
from lmscale.config.optim import OptimConfig
from lmscale.config.run import ZeroChoice
from lmscale.config.train import TrainConfig
from lmscale.errors import ConfigError
from tests.config.fake_apex import install_apex

OFFLOAD = ZeroChoice(stage=2, offload_optimizer=True)


def optim(**keys: Any) -> OptimConfig:
    return OptimConfig(lr=1.0, **keys)


@pytest.mark.parametrize(
    ("keys", "zero", "has_gpu", "apex", "expected", "because"),
    [
        ({}, ZeroChoice(), False, True, "torch", "on the CPU"),
        ({}, ZeroChoice(), True, False, "torch", "apex is not installed"),
        ({}, ZeroChoice(stage=2), True, True, "apex", "installed"),
        ({"name": "adam"}, ZeroChoice(stage=1), True, True, "apex", "installed"),
        ({}, ZeroChoice(stage=3), True, True, "torch", "ZeRO 3"),
        ({"adam_eps_mode": "raw"}, ZeroChoice(), True, True, "torch", "raw"),
        ({}, OFFLOAD, True, True, "deepspeed", "host memory"),
        ({"adam_bias_correction": False}, OFFLOAD, True, True, "deepspeed", "host memory"),
        ({"adam_eps_mode": "raw"}, OFFLOAD, True, True, "torch", "raw"),
        *(
            ({"name": name}, ZeroChoice(), True, True, "torch", "no other")
            for name in ("sgd", "adafactor", "lion", "muon")
        ),
    ],
)
def test_auto_takes_what_can_serve(
    keys: Any, zero: Any, has_gpu: bool, apex: bool, expected: str, because: str, monkeypatch: Any, tmp_path: Path
) -> None:
    if apex:
        install_apex(monkeypatch, tmp_path)
    chosen = choose_implementation(optim(**keys), zero, has_gpu=has_gpu)
    assert chosen.name == expected
    assert because in chosen.because


@pytest.mark.parametrize(
    ("keys", "zero", "has_gpu", "rule"),
    [
        ({"implementation": "apex", "adam_eps_mode": "raw"}, ZeroChoice(), True, "adam_eps_mode: raw"),
        ({"implementation": "apex"}, ZeroChoice(stage=3), None, "ZeRO 3"),
        ({"implementation": "apex"}, OFFLOAD, None, "host memory"),
        ({"implementation": "apex"}, ZeroChoice(), False, "on the CPU"),
        ({"implementation": "apex", "name": "lion"}, ZeroChoice(), None, "has no lion"),
        ({"implementation": "deepspeed", "name": "lion"}, ZeroChoice(), None, "without a gradient in its Lion"),
        ({"implementation": "deepspeed", "adam_eps_mode": "raw"}, OFFLOAD, None, "adam_eps_mode: raw"),
        ({"implementation": "deepspeed", "name": "lion"}, OFFLOAD, None, "values without a gradient"),
        ({"implementation": "deepspeed", "name": "sgd"}, OFFLOAD, None, "has no sgd"),
    ],
)
def test_what_cannot_serve_is_refused(
    keys: Any, zero: Any, has_gpu: Any, rule: str, monkeypatch: Any, tmp_path: Path
) -> None:
    install_apex(monkeypatch, tmp_path)
    with pytest.raises(ConfigError, match=rule):
        choose_implementation(optim(**keys), zero, has_gpu=has_gpu)


@pytest.mark.parametrize(
    ("package", "rule"),
    [
        (None, "is not installed"),
        ({"nvidia": False}, "the package of that name on PyPI is another"),
        ({"extensions": False}, "built without its extension amp_C"),
    ],
)
def test_apex_that_is_not_there_is_refused_before_the_ranks_know_their_device(
    package: Any, rule: str, monkeypatch: Any, tmp_path: Path
) -> None:
    if package is not None:
        install_apex(monkeypatch, tmp_path, **package)
    with pytest.raises(ConfigError, match=rule):
        choose_implementation(optim(implementation="apex"), ZeroChoice(), has_gpu=None)
    with pytest.raises(ConfigError, match=r"train\.fused_norms = .apex."):
        choose_norms(TrainConfig(train_tokens=1, fused_norms="apex"), has_gpu=None)


def test_norms_are_apexs_on_a_gpu_only_and_not_when_compiled(monkeypatch: Any, tmp_path: Path) -> None:
    install_apex(monkeypatch, tmp_path)
    assert choose_norms(TrainConfig(train_tokens=1), has_gpu=True).name == "apex"
    assert choose_norms(TrainConfig(train_tokens=1), has_gpu=False).name == "torch"
    assert choose_norms(TrainConfig(train_tokens=1, compile=True), has_gpu=True).name == "torch"
    assert choose_norms(TrainConfig(train_tokens=1, fused_norms="torch"), has_gpu=True).name == "torch"
    with pytest.raises(ConfigError, match="compiled"):
        choose_norms(TrainConfig(train_tokens=1, compile=True, fused_norms="apex"), has_gpu=None)


def test_apex_gets_the_settings_and_its_count_of_updates(monkeypatch: Any, tmp_path: Path) -> None:
    from lmscale.optim import build

    install_apex(monkeypatch, tmp_path)
    weight = torch.nn.Parameter(torch.ones(3))
    groups = [{"params": [weight], "weight_decay": 0.1}]
    made = build._build_adam(groups, optim(name="adam", adam_bias_correction=False), "apex", False)
    assert type(made).__module__ == "apex.optimizers.fused_adam"
    assert (made.adam_w_mode, made.param_groups[0]["bias_correction"]) == (False, False)
    assert build.blank_state(made, weight, 7).keys() == {"exp_avg", "exp_avg_sq"}
    assert build.update_count(made) == 7  # apex counts in its groups


@pytest.mark.parametrize("normalization", ["layernorm", "rmsnorm"])
def test_norm_calls_apex_where_the_context_says_so(normalization: str, monkeypatch: Any, tmp_path: Path) -> None:
    from types import SimpleNamespace

    from lmscale.models.norm import Norm

    install_apex(monkeypatch, tmp_path)
    model = SimpleNamespace(hidden_size=8, norm_eps=1.0e-5, normalization=normalization)
    contexts = [SimpleNamespace(model=model, sequence_parallel=False, apex_norms=apex) for apex in (True, False)]
    hidden = torch.randn(2, 3, 8)
    ours, theirs = (Norm(context)(hidden) for context in contexts)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    from apex.normalization import fused_layer_norm

    assert fused_layer_norm.calls == [normalization]
