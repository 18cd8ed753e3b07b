"""Dropout under tensor parallelism: the same where tensors are replicated, different where they are split."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lmscale.parallel.seeds import DropoutClock
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed

CPU = torch.device("cpu")


def drawn(clock: DropoutClock, micro_batch: int, site: str, *, split: bool) -> torch.Tensor:
    clock.seed(CPU, "layers.0", micro_batch, site, differs_over_tp=split)
    return F.dropout(torch.ones(1000), 0.5)


def test_split_tensors_get_other_masks_and_replicated_ones_the_same() -> None:
    first, second = DropoutClock(1, dp_rank=0, tp_rank=0), DropoutClock(1, dp_rank=0, tp_rank=1)
    for clock in (first, second):
        clock.begin_step(5)
    assert torch.equal(drawn(first, 0, "mlp_out", split=False), drawn(second, 0, "mlp_out", split=False))
    assert not torch.equal(drawn(first, 0, "attention", split=True), drawn(second, 0, "attention", split=True))


def test_every_place_in_the_run_has_a_mask_of_its_own() -> None:
    clock, other_replica = DropoutClock(1, 0, 0), DropoutClock(1, 1, 0)
    masks = []
    for step in (1, 2):
        clock.begin_step(step)
        masks += [drawn(clock, m, site, split=False) for m in (0, 1) for site in ("attention_out", "mlp_out")]
    other_replica.begin_step(1)
    masks.append(drawn(other_replica, 0, "attention_out", split=False))
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks)


def _hidden_states(sequence_parallel: bool) -> torch.Tensor:
    """The first layer's output in training on this rank of two, for the same input on both."""
    from lmscale.config.model import ModelConfig
    from lmscale.models.build import build_model
    from lmscale.models.context import build_context
    from lmscale.models.decoder import decoder_specs
    from lmscale.models.loss import LanguageModelLoss
    from lmscale.parallel.topology import init_topology

    topology = init_topology(2, 1)
    model_config = ModelConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, vocab_size=128, hidden_dropout=0.5, attention_dropout=0.5
    )
    context = build_context(model_config, topology, seed=1, sequence_parallel=sequence_parallel)
    model = build_model(decoder_specs(context)[:3], context, LanguageModelLoss(context)).train()
    context.dropout.begin_step(1)
    return model(torch.zeros(2, 16, dtype=torch.int64)).detach()


def test_replicated_hidden_states_stay_equal_on_tensor_parallel_ranks() -> None:
    first, second = run_ranks(2, _hidden_states, False)
    assert torch.equal(first, second)


def test_sequence_parallel_ranks_drop_other_positions_independently() -> None:
    first, second = run_ranks(2, _hidden_states, True)
    assert first.shape == second.shape == (8, 2, 32)
    assert not torch.equal(first == 0, second == 0)
