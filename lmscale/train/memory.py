"""The training state that this rank holds, counted on the tensors themselves; plan.memory has the formula."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from lmscale.config.run import RunConfig
from lmscale.models.build import logical_name
from lmscale.monitor import metrics
from lmscale.plan.memory import StateBytes, moment_bytes, zero_bytes
from lmscale.plan.names import parameter_shapes
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


class StateWatch:
    """Measures the training state over a step: the most of its gradients, and the rest after the update.

    Gradients are looked at before the update, and under ZeRO 0 and 1 before DeepSpeed reduces them, where they are still
    whole. (ZeRO 2 and 3 have them in buckets there, whose size does not depend on the model.)
    """

    def __init__(self, engine: Engine):
        self._engine, self._gradients = engine, 0
        self._watched = ("_take_model_step", *(("allreduce_gradients",) if engine.zero_stage < 2 else ()))
        for name in self._watched:
            setattr(engine.deepspeed, name, self._looking_before(getattr(engine.deepspeed, name)))

    def _looking_before(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def look_and_go_on(*args: Any, **kwargs: Any) -> Any:
            self._gradients = max(self._gradients, state_bytes(self._engine).gradients)
            return method(*args, **kwargs)

        return look_and_go_on

    def finish(self) -> StateBytes:
        """Stop watching, and return the bytes that this rank holds."""
        for name in self._watched:
            delattr(self._engine.deepspeed, name)  # the class's own shows again
        after = state_bytes(self._engine)
        return StateBytes(after.parameters, self._gradients, after.optimizer)


def describe_state(engine: Engine, held: StateBytes, config: RunConfig) -> tuple[str, dict[str, float]]:
    """Put what ranks hold beside the formula.

    Returns:
        (a line with the bytes of each kind for each parameter of a rank's part of the model, measured and by formula;
        bytes by metrics' tag), of the rank that holds most of each.
    Collectives: maxima over all ranks.
    """
    total, trainable, moments = 0, 0, 0.0
    shapes = parameter_shapes(config.model)
    for name, parameter in engine.model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        total += shape.numel()
        if parameter.requires_grad:
            trainable += shape.numel()
            logical = logical_name(engine.model, name)
            moments += shape.numel() * moment_bytes(config.optim, config.model, logical, shapes.get(logical, shape))
    expected = zero_bytes(
        total,
        engine.topology.dp_size,
        engine.zero_stage,
        config.precision,
        moment_width=moments / trainable,
        num_trainable=trainable,
    )
    parts, values = [], {}
    for tag, kind, name in (
        (metrics.MEMORY_PARAMETER_BYTES, "parameters", "parameters"),
        (metrics.MEMORY_GRADIENT_BYTES, "gradients", "gradients"),
        (metrics.MEMORY_OPTIMIZER_BYTES, "optimizer", "optimizer state"),
    ):
        values[tag] = engine.maximum(getattr(held, kind))
        measured = engine.maximum(getattr(held, kind) / total)
        parts.append(f"{name} {measured:.2f} (formula {engine.maximum(getattr(expected, kind) / total):.2f})")
    return "memory of a rank, bytes a parameter: " + ", ".join(parts), values


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
