"""The parameters of this rank in the groups that plan.groups decided, for a torch optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import nn

from lmscale.config.optim import OptimConfig
from lmscale.models.build import add_idle_parameter, logical_name, untie_frozen
from lmscale.plan.adaptation import Adaptation
from lmscale.plan.groups import Group, group_of


def freeze(model: nn.Module, optim: OptimConfig, adaptation: Adaptation | None = None) -> None:
    """Turn gradients off for the parameters that the rules freeze; before the engine is built."""
    if adaptation is None and not any(rule.frozen for rule in optim.groups):
        return
    for name, parameter in model.named_parameters():
        if group_of(logical_name(model, name), _num_dims(parameter), optim, adaptation).is_frozen:
            parameter.requires_grad_(False)
    untie_frozen(model)


def build_groups(model: nn.Module, optim: OptimConfig, adaptation: Adaptation | None = None) -> list[dict[str, Any]]:
    """Sort the trainable parameters into groups for a torch optimizer.

    Every rank has the groups that any has, in the same order, since DeepSpeed reduces norms group by group: a pipeline stage
    without a parameter of a group gets an idle one.

    Returns:
        The groups, those left out that are empty on all ranks, each with name, params, weight_decay, and the multipliers of
        the rate and of optim.weight_decay that `set_rate` and the decay follow.
    Collectives: every rank must call.
    """
    found: dict[Group, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = group_of(logical_name(model, name), _num_dims(parameter), optim, adaptation)
            found.setdefault(group, []).append(parameter)
    for group in _of_all_ranks(found):
        if group not in found:
            found[group] = [add_idle_parameter(model)]
    return [
        {
            "name": group.name,
            "params": found[group],
            "weight_decay": optim.weight_decay * group.weight_decay_multiplier,
            "weight_decay_multiplier": group.weight_decay_multiplier,
            "lr_multiplier": group.lr_multiplier,
            "is_hidden_matrix": group.is_hidden_matrix,
        }
        for group in sorted(found, key=lambda group: group.name)
    ]


def _of_all_ranks(mine: Iterable[Group]) -> set[Group]:
    """Return the groups of all ranks.

    Collectives: a gather over all ranks, where there are several.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return set(mine)
    everyone: list[set[Group]] = [set()] * dist.get_world_size()
    dist.all_gather_object(everyone, set(mine))
    return set().union(*everyone)


def _num_dims(parameter: nn.Parameter) -> int:
    """Count the dimensions of a parameter, which ZeRO 3 may have flattened."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
