"""On a CUDA device the same code trains as on the CPU, by the kernels that are fast there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.distributed.runs import LLAMA, largest_difference, losses, records, run_keys

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

FP32_TOLERANCE = 1.0e-4
"""Relative, over six steps: the device sums in another order, and its fp32 kernels round differently."""
BF16_TOLERANCE = 1.0e-2
COMPILED_TOLERANCE = 1.0e-3


def pretrain(keys: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """Train a run in a process of its own and return its metrics."""
    directory = Path(keys["output_dir"])
    directory.mkdir(parents=True)
    config = directory.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(keys))
    environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    if device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    command = [sys.executable, "-m", "lmscale.pretrain", "--config", str(config)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return records(keys)


@pytest.mark.parametrize("model", [{}, LLAMA], ids=["gpt", "llama"])
def test_losses_are_those_of_the_cpu(model: dict[str, Any], corpus: str, tmp_path: Path) -> None:
    changes = {"model": dict(model)} if model else {}
    cuda = pretrain(run_keys(corpus, tmp_path / "cuda", **changes), "cuda")
    cpu = pretrain(run_keys(corpus, tmp_path / "cpu", **changes), "cpu")
    assert largest_difference(losses(cuda), losses(cpu)) < FP32_TOLERANCE
    assert all(record["memory/peak_bytes"] < 2**30 for record in cuda)  # the device's, not the process's


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_follows_fp32(stage: int, corpus: str, tmp_path: Path) -> None:
    fp32 = pretrain(run_keys(corpus, tmp_path / "fp32"), "cuda")
    changes = {"precision": "bf16", "deepspeed__zero_optimization__stage": stage}
    bf16 = pretrain(run_keys(corpus, tmp_path / "bf16", **changes), "cuda")
    assert largest_difference(losses(bf16), losses(fp32)) < BF16_TOLERANCE


def test_compiled_layers_follow_the_uncompiled(corpus: str, tmp_path: Path) -> None:
    changes = {"precision": "bf16", "deepspeed__zero_optimization__stage": 1}
    eager = pretrain(run_keys(corpus, tmp_path / "eager", **changes), "cuda")
    compiled = pretrain(run_keys(corpus, tmp_path / "compiled", train__compile=True, **changes), "cuda")
    assert largest_difference(losses(compiled), losses(eager)) < COMPILED_TOLERANCE


def test_attention_takes_the_flash_kernel() -> None:
    query = torch.randn(2, 8, 256, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    choice = torch._fused_sdp_choice(query, query, query, is_causal=True)
    assert int(choice) in (
        int(torch.nn.attention.SDPBackend.FLASH_ATTENTION),
        int(torch.nn.attention.SDPBackend.CUDNN_ATTENTION),
    )


@pytest.mark.parametrize("name", ["adamw", "adam"])
@pytest.mark.parametrize("implementation", ["torch", "deepspeed", "apex"])
def test_fused_adam_takes_the_steps_of_plain_torch(name: str, implementation: str) -> None:
    from lmscale.config.nvidia_apex import apex_problem
    from lmscale.config.optim import OptimConfig
    from lmscale.config.run import ZeroChoice
    from lmscale.optim.build import build_optimizer, set_rate

    if implementation == "apex" and apex_problem("adam") is not None:
        pytest.skip(f"apex {apex_problem('adam')}")
    optim = OptimConfig(lr=1.0e-2, name=name, implementation=implementation, adam_beta2=0.98)
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 1000, device="cuda")) for _ in range(2)]
    ours = build_optimizer([{"params": weights[:1], "weight_decay": 0.1}], optim, weights[0].device, ZeroChoice())
    theirs = kind(weights[1:], lr=1.0e-2, betas=(0.9, 0.98), weight_decay=0.1, foreach=False)
    set_rate(ours, 1.0e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        grad = torch.randn(1000, generator=generator).cuda()
        for weight in weights:
            weight.grad = grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(*weights, rtol=1.0e-5, atol=1.0e-6)


@pytest.mark.parametrize("normalization", ["layernorm", "rmsnorm"])
def test_apex_norms_are_torchs(normalization: str) -> None:
    from lmscale.config.nvidia_apex import apex_problem
    from lmscale.models.norm import _apex_functions

    if apex_problem("norms") is not None:
        pytest.skip(f"apex {apex_problem('norms')}")
    layer_norm, rms_norm = _apex_functions()
    hidden, weight, bias = (torch.randn(*shape, device="cuda") for shape in ((6, 4, 64), (64,), (64,)))
    if normalization == "layernorm":
        ours = layer_norm(hidden, weight, bias, weight.shape, 1.0e-5)
        theirs = torch.nn.functional.layer_norm(hidden, weight.shape, weight, bias, 1.0e-5)
    else:
        ours = rms_norm(hidden, weight, weight.shape, 1.0e-5)
        theirs = torch.nn.functional.rms_norm(hidden, weight.shape, weight, 1.0e-5)
    torch.testing.assert_close(ours, theirs, rtol=1.0e-5, atol=1.0e-5)
