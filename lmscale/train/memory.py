"""The training state that this rank holds, counted on the tensors themselves; plan.memory has the formula."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from lmscale.plan.memory import StateBytes
from lmscale.train.engine import Engine

_MASTERS = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
_GRADIENTS = ("averaged_gradients", "all_grad_tensors", "fp32_groups_gradients_flat", "grad_partitions_flat_buffer")
"""Where DeepSpeed's optimizers (ZeRO 1 and 2, bf16 ZeRO 1, ZeRO 3) keep flat masters and summed gradients."""


def state_bytes(engine: Engine) -> StateBytes:
    """Count the bytes of this rank's parameters, gradients and optimizer state as they are now.

    Gradients live from a backward pass to the update: look between two micro batches. Moments come with the first
    update. A storage counts once, whole, padding included.
    """
    counted: set[int] = set()
    parameters = list(engine.model.parameters())
    weights = [parameter.data for parameter in parameters]
    shards = [parameter.ds_tensor for parameter in parameters if hasattr(parameter, "ds_tensor")]
    held = vars(engine.optimizer)
    gradients = [parameter.grad for parameter in parameters], [held.get(name) for name in _GRADIENTS]
    masters = [held.get(name) for name in _MASTERS]
    return StateBytes(
        parameters=_count((weights, shards), counted),
        gradients=_count(gradients, counted),
        optimizer=_count((masters, list(engine.basic_optimizer.state.values())), counted),
    )


def _count(held: Any, counted: set[int]) -> int:
    """Sum the bytes of the storages of all tensors in nested containers, but for those counted before."""
    total = 0
    for tensor in _tensors(held):
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _tensors(held: Any) -> Iterable[torch.Tensor]:
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, dict):
        for value in held.values():
            yield from _tensors(value)
    elif isinstance(held, list | tuple):
        for value in held:
            yield from _tensors(value)
