"""A gate between backward and update: DeepSpeed's optimizers ask us whether the weights may move.

At the gate the gradients are summed and their norm is known, and nothing has moved: no weight, no moment, no count of the
optimizer, no loss scale. Where the answer is no, DeepSpeed's own way out of an overflow is taken, which drops the
gradients; ZeRO 0 has none, and its engine drops them after every step. tests/train/test_fault_policy.py holds this for
each optimizer:

- ZeRO 1 and 2 (DeepSpeedZeroOptimizer) and 3: `step` decides by `overflow` right after it calls `_update_scale`.
- ZeRO 1 in bf16 (BF16_Optimizer) has no `_update_scale`, and calls the plain optimizer once: that call is left by an
  exception. A norm that is not finite it finds by itself; the gate is told, so that the ranks stay together.
- ZeRO 0: the plain optimizer's step, left the same way.

The norm that DeepSpeed measures leaves out what tensor-parallel ranks and tied stages hold a second time. A copy that is
not finite on its rank alone would make that rank's replicas drift apart, unseen by the norm: it is looked at here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import combine_grad_norm_groups, is_model_parallel_parameter
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils.bwc import bwc_tensor_model_parallel_rank

Ask = Callable[[torch.Tensor | float, bool], bool]
"""(global gradient norm, unscaled; whether it is not finite) -> whether the update is withheld. Every rank asks."""


class _Withheld(Exception):
    """Leaves the step of an optimizer."""


def install_gate(
    optimizer: Any, basic_optimizer: torch.optim.Optimizer, measure: Callable[[], float], ask: Ask
) -> None:
    """Put a gate into an engine's optimizer.

    Args:
        optimizer: DeepSpeed's, or the plain one under ZeRO 0.
        basic_optimizer: the plain one.
        measure: under ZeRO 0, the global gradient norm.
        ask: the gate.
    """
    if optimizer is basic_optimizer:
        _gate_plain(optimizer, measure, ask)
    elif isinstance(optimizer, BF16_Optimizer):
        _gate_bf16(optimizer, basic_optimizer, ask)
    else:
        _gate_zero(optimizer, ask)


def _gate_plain(optimizer: Any, measure: Callable[[], float], ask: Ask) -> None:
    step = optimizer.step

    def gated(*args: Any, **kwargs: Any) -> Any:
        norm = measure()
        return None if ask(norm, not _is_finite(norm)) else step(*args, **kwargs)

    optimizer.step = gated


def _gate_bf16(optimizer: Any, basic_optimizer: torch.optim.Optimizer, ask: Ask) -> None:
    step = optimizer.step

    def at_update(*_: Any) -> None:
        norm, lists = (
            optimizer._global_grad_norm,
            zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True),
        )
        if ask(norm + _nan_of(_copies(bwc_tensor_model_parallel_rank(optimizer.mpu), lists)), False):
            raise _Withheld

    basic_optimizer.register_step_pre_hook(at_update)

    def gated(*args: Any, **kwargs: Any) -> None:
        try:
            step(*args, **kwargs)
        except _Withheld:
            optimizer.overflow = True
            optimizer.clear_hp_grads()
            optimizer.clear_lp_grads()
        else:
            if optimizer.overflow:
                ask(float("inf"), True)

    optimizer.step = gated


def _gate_zero(optimizer: Any, ask: Ask) -> None:
    is_stage3 = isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3)
    name = "_get_norm_groups" if is_stage3 else "scaled_global_norm"
    measure, update_scale = getattr(optimizer, name), optimizer._update_scale
    norms: list[Any] = []

    def measured(*args: Any, **kwargs: Any) -> Any:
        found = measure(*args, **kwargs)
        norms[:] = [combine_grad_norm_groups(found) if is_stage3 else found]
        return found

    def decide(has_overflow: bool = False) -> None:
        norm = norms.pop() / optimizer.loss_scale if norms and not has_overflow else float("inf")
        if not has_overflow:
            norm = norm + _nan_of(_copies_of_zero(optimizer, is_stage3))
        if ask(norm, bool(has_overflow)):
            optimizer.overflow = True
        else:
            update_scale(has_overflow)
        norms.clear()

    setattr(optimizer, name, measured)
    optimizer._update_scale = decide


def _copies_of_zero(optimizer: Any, is_stage3: bool) -> list[torch.Tensor]:
    """List this rank's gradients that its norm leaves out, or, where they are in host memory, the norms of all."""
    if optimizer.offload_optimizer if is_stage3 else optimizer.cpu_offload:
        return [torch.as_tensor(norm) for norm in optimizer.norm_for_param_grads.values()]
    groups = optimizer.fp16_groups if is_stage3 else optimizer.params_in_partition
    found: list[torch.Tensor] = []
    for index, parameters in enumerate(groups):
        gradients = [g for g in optimizer.averaged_gradients[index] if not getattr(g, "_zero_padding", False)]
        found += _copies(optimizer.model_parallel_rank, [(parameters, gradients)])
    return found


def _copies(
    tp_rank: int, lists: Iterable[tuple[Iterable[torch.Tensor], Iterable[torch.Tensor]]]
) -> Iterator[torch.Tensor]:
    """Yield, of parameters and their gradients, the gradients that count on another rank."""
    for parameters, gradients in lists:
        for parameter, gradient in zip(parameters, gradients, strict=False):  # a partition may end in padding
            is_copy = tp_rank != 0 and not is_model_parallel_parameter(parameter)
            if is_copy or getattr(parameter, "ds_pipe_replicated", False):
                yield gradient


def _nan_of(gradients: Iterable[torch.Tensor]) -> torch.Tensor | float:
    """Return nan where a gradient is not finite, else 0: on the device, not to wait for it here."""
    found = list(gradients)
    return 0.0 * torch.stack(torch._foreach_norm(found)).sum() if found else 0.0


def _is_finite(norm: float) -> bool:
    return norm - norm == 0.0
