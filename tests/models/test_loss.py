"""The loss over a split, padded vocabulary is torch's cross entropy over the true one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lmscale.config.objective import BertConfig, CausalLMConfig, ObjectiveConfig, T5Config, TextToTextConfig
from lmscale.models import loss as loss_module
from lmscale.models.loss import LanguageModelLoss
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed

VOCAB, PADDED, BATCH, LENGTH = 200, 256, 3, 17
TOLERANCE = 1.0e-6


def _example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = 5 * torch.randn(BATCH, LENGTH, PADDED, generator=generator)
    targets = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
    return logits, targets, (torch.rand(BATCH, LENGTH, generator=generator) > 0.3).float()


def _loss_on_this_rank(
    dtype: str, chunk_bytes: int, objective: ObjectiveConfig, smoothing: float = 0.0
) -> tuple[float, torch.Tensor]:
    from lmscale.parallel.topology import init_topology

    world = torch.distributed.get_world_size()
    topology = init_topology(world, 1)
    loss_module.CHUNK_BYTES = chunk_bytes
    context: Any = SimpleNamespace(
        model=SimpleNamespace(vocab_size=VOCAB),
        groups=SimpleNamespace(tp=topology.tp_group),
        topology=topology,
        objective=objective,
        label_smoothing=smoothing,
    )
    logits, targets, mask = _example()
    shard = logits.chunk(world, dim=-1)[topology.tp_rank].contiguous().to(getattr(torch, dtype)).requires_grad_()
    # What feeds the loss is the head's product, which nothing else reads: the loss may overwrite it.
    produced = shard * 1.0
    value = LanguageModelLoss(context)(produced, (targets, mask, torch.tensor([0.25])))
    value.backward()
    assert shard.grad is not None
    return float(value), shard.grad


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("chunk_bytes", [4 * 2**20, 4096])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_loss_and_gradient_equal_torch_cross_entropy(world_size: int, chunk_bytes: int, z_loss: float) -> None:
    logits, targets, mask = _example()
    logits.requires_grad_()
    flat = logits[..., :VOCAB].flatten(0, 1)
    each = F.cross_entropy(flat, targets.flatten(), reduction="none") + z_loss * flat.logsumexp(dim=-1).square()
    expected = 0.25 * (each * mask.flatten()).sum()
    expected.backward()
    expected = expected.detach()
    objective = T5Config(z_loss=z_loss) if z_loss else CausalLMConfig()
    results = run_ranks(world_size, _loss_on_this_rank, "float32", chunk_bytes, objective)
    for value, _ in results:
        assert value == pytest.approx(expected.item(), rel=TOLERANCE)
    gradient = torch.cat([grad for _, grad in results], dim=-1)
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-5, atol=TOLERANCE)
    assert torch.equal(gradient[..., VOCAB:], torch.zeros(BATCH, LENGTH, PADDED - VOCAB))


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_label_smoothing_is_torchs_over_the_true_vocabulary(world_size: int, z_loss: float) -> None:
    logits, targets, mask = _example()
    logits.requires_grad_()
    flat = logits[..., :VOCAB].flatten(0, 1)
    each = F.cross_entropy(flat, targets.flatten(), reduction="none", label_smoothing=0.2)
    expected = 0.25 * ((each + z_loss * flat.logsumexp(dim=-1).square()) * mask.flatten()).sum()
    expected.backward()
    results = run_ranks(world_size, _loss_on_this_rank, "float32", 4096, T5Config(z_loss=z_loss), 0.2)
    for value, _ in results:
        assert value == pytest.approx(expected.item(), rel=TOLERANCE)
    gradient = torch.cat([grad for _, grad in results], dim=-1)
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-5, atol=TOLERANCE)
    assert torch.equal(gradient[..., VOCAB:], torch.zeros(BATCH, LENGTH, PADDED - VOCAB))


@pytest.mark.parametrize("world_size", [1, 2])
def test_half_precision_logits_are_reduced_in_fp32(world_size: int) -> None:
    logits, targets, mask = _example()
    rounded = logits.bfloat16().float()
    each = F.cross_entropy(rounded[..., :VOCAB].flatten(0, 1), targets.flatten(), reduction="none")
    results = run_ranks(world_size, _loss_on_this_rank, "bfloat16", 4096, CausalLMConfig())
    assert results[0][0] == pytest.approx(float(0.25 * (each * mask.flatten()).sum()), rel=1e-5)


def _held_out_loss(objective: ObjectiveConfig, smoothing: float = 0.0) -> float:
    from lmscale.parallel.topology import init_topology

    topology = init_topology(torch.distributed.get_world_size(), 1)
    context: Any = SimpleNamespace(
        model=SimpleNamespace(vocab_size=VOCAB),
        groups=SimpleNamespace(tp=topology.tp_group),
        objective=objective,
        label_smoothing=smoothing,
    )
    logits, targets, mask = _example()
    shard = logits.chunk(topology.tp_size, dim=-1)[topology.tp_rank].contiguous()
    with torch.no_grad():
        return float(LanguageModelLoss(context)(shard, (targets, mask, torch.tensor([1.0, 0.0]))))


@pytest.mark.parametrize("world_size", [1, 2])
def test_held_out_losses_leave_z_loss_and_label_smoothing_out(world_size: int) -> None:
    logits, targets, mask = _example()
    each = F.cross_entropy(logits[..., :VOCAB].flatten(0, 1), targets.flatten(), reduction="none")
    for value in run_ranks(world_size, _held_out_loss, T5Config(z_loss=0.5), 0.3):
        assert value == pytest.approx(float((each * mask.flatten()).sum()), rel=TOLERANCE)


@pytest.mark.parametrize(
    ("objective", "counted"),
    [
        (T5Config(), [3.0]),
        (T5Config(loss_denominator="padded"), [8.0]),
        (TextToTextConfig(loss_denominator="padded"), [8.0]),
        (BertConfig(), [3.0, 1.0]),
    ],
    ids=str,
)
def test_the_loss_is_a_mean_over_labels_or_over_all_places(objective: ObjectiveConfig, counted: list[float]) -> None:
    context: Any = SimpleNamespace(
        model=SimpleNamespace(vocab_size=VOCAB),
        groups=SimpleNamespace(tp=None),
        objective=objective,
        label_smoothing=0.0,
    )
    batch = {"loss_mask": torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])}
    if isinstance(objective, BertConfig):
        batch["is_random_next"] = torch.tensor([1, -1])  # the second row fills the batch
    assert LanguageModelLoss(context).counts(batch).tolist() == counted
