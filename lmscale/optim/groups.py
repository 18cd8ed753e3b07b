"""Which parameters share their optimizer settings, by named rules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lmscale.config.optim import OptimConfig


@dataclass(frozen=True)
class GroupRule:
    """A group of parameters: those that the rule takes first."""

    name: str
    decays: bool
    because: str

    def takes(self, parameter: torch.nn.Parameter) -> bool:
        """Tell whether a parameter belongs here; the last rule takes the rest."""
        return self.decays or parameter.dim() < 2


RULES = (
    GroupRule("no_decay", decays=False, because="biases and norms: fewer than two dimensions"),
    GroupRule("decay", decays=True, because="matrices and embeddings"),
)


def build_groups(named: Iterable[tuple[str, torch.nn.Parameter]], optim: OptimConfig) -> list[dict[str, object]]:
    """Sort trainable parameters into groups for a torch optimizer.

    Source: no decay on biases and norms is Megatron's reading of GPT-3's weight decay of 0.1.
    """
    groups: dict[str, list[torch.nn.Parameter]] = {rule.name: [] for rule in RULES}
    for _, parameter in named:
        if parameter.requires_grad:
            groups[_rule_for(parameter).name].append(parameter)
    return [
        {"name": rule.name, "params": groups[rule.name], "weight_decay": optim.weight_decay if rule.decays else 0.0}
        for rule in RULES
        if groups[rule.name]
    ]


def group_table(named: Iterable[tuple[str, torch.nn.Parameter]], optim: OptimConfig) -> list[tuple[str, str, str, str]]:
    """Describe the groups of this rank's parameters: (group, weight decay, tensors and parameters, rule)."""
    rows = []
    kept = [parameter for _, parameter in named if parameter.requires_grad]
    for rule in RULES:
        mine = [parameter for parameter in kept if _rule_for(parameter) is rule]
        decay = optim.weight_decay if rule.decays else 0.0
        count = f"{len(mine)} tensors, {sum(_size(p) for p in mine):,} parameters on rank 0"
        rows.append((rule.name, str(decay), count, rule.because))
    return rows


def _rule_for(parameter: torch.nn.Parameter) -> GroupRule:
    return next(rule for rule in RULES if rule.takes(parameter))


def _size(parameter: torch.nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
