"""Which parameters share their optimizer settings, decided by name before anything is built."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from lmscale.config.adapt import num_adaptations
from lmscale.config.model import ModelConfig
from lmscale.config.optim import REGEX_PREFIX, GroupConfig, OptimConfig
from lmscale.config.validation import nearest
from lmscale.errors import ConfigError
from lmscale.plan.adaptation import Adaptation
from lmscale.plan.names import is_layer_matrix

_MUON, _NO_DECAY = ", muon", ", no decay"
FROZEN = "frozen"
"""The group of what an adaptation does not train."""


@dataclass(frozen=True)
class Group:
    """The settings that some parameters share."""

    name: str
    lr_multiplier: float = 1.0
    """Of the schedule's rate."""
    weight_decay_multiplier: float = 1.0
    """Of optim.weight_decay."""
    is_frozen: bool = False
    is_hidden_matrix: bool = False
    """Updated by muon's rule for matrices."""


@dataclass(frozen=True)
class GroupSize:
    """What a group holds of the whole model, over all ranks; tied and replicated parameters count once."""

    group: Group
    tensors: int
    parameters: int


def group_of(name: str, num_dims: int, optim: OptimConfig, adaptation: Adaptation | None = None) -> Group:
    """Find the group of a parameter: the first rule of optim.groups that takes it, or else the built-in ones.

    Parameters of fewer than two dimensions (biases and norms) are not decayed, under a rule of optim.groups neither,
    unless optim.decay_biases_and_norms. With muon, the matrices of the transformer layers are apart from what AdamW updates.

    Args:
        name: its logical name.
        num_dims: its dimensions.
        optim: the rules.
        adaptation: what trains a part of the model only, or at rates of its own; its rule comes before the others.
    Source: no decay on biases and norms is BERT's rule, and Megatron's reading of GPT-3's weight decay of 0.1.
    """
    if adaptation is not None:
        if not adaptation.trains(name):
            return Group(FROZEN, is_frozen=True)
        # Of several side by side the first dimension tells them apart: a bias is decayed no more than alone.
        own_dims = num_dims - (num_adaptations(adaptation.adapt) > 1)
        return _at_rate(group_of(name, own_dims, optim), adaptation.rate_multiplier(name))
    decays = num_dims >= 2 or optim.decay_biases_and_norms
    rule = next((rule for rule in optim.groups if matches(rule, name)), None)
    if rule is not None and rule.frozen:
        return Group(rule.name, is_frozen=True)
    is_hidden = optim.name == "muon" and is_layer_matrix(name, num_dims)
    if rule is None:
        if is_hidden:
            return Group("muon", is_hidden_matrix=True)
        return Group("decay") if decays else Group("no_decay", weight_decay_multiplier=0.0)
    suffix = (_MUON if is_hidden else "") if decays else _NO_DECAY
    decay = rule.weight_decay_multiplier if decays else 0.0
    return Group(rule.name + suffix, rule.lr_multiplier, decay, is_hidden_matrix=is_hidden)


def _at_rate(group: Group, multiplier: float) -> Group:
    if multiplier == 1.0 or group.is_frozen:
        return group
    return replace(group, name=f"{group.name}, rate x {multiplier:.3g}", lr_multiplier=group.lr_multiplier * multiplier)


def matches(rule: GroupConfig, name: str) -> bool:
    """Tell whether a rule is meant for a parameter: by a glob on the whole name, or a regular expression within it."""
    if rule.match.startswith(REGEX_PREFIX):
        return re.search(rule.match.removeprefix(REGEX_PREFIX), name) is not None
    return fnmatchcase(name, rule.match)


def plan_groups(model: ModelConfig, optim: OptimConfig, adaptation: Adaptation | None = None) -> list[GroupSize]:
    """Size the groups of a model that are not empty, in the order of the rules."""
    found: dict[Group, list[int]] = {}
    for name, shape in (adaptation or Adaptation(model)).shapes(padded=False).items():
        group, size = group_of(name, len(shape), optim, adaptation), math.prod(shape)
        trained = size if adaptation is None or group.is_frozen else adaptation.num_trained(name, size)
        found.setdefault(group, []).append(trained)
        if trained < size:
            found.setdefault(Group(FROZEN, is_frozen=True), []).append(size - trained)
    rank = {rule.name: number for number, rule in enumerate(optim.groups)}

    def place(group: Group) -> tuple[int, str]:
        return rank.get(group.name.removesuffix(_NO_DECAY).removesuffix(_MUON), len(rank)), group.name

    return [GroupSize(group, len(found[group]), sum(found[group])) for group in sorted(found, key=place)]


def check_groups(model: ModelConfig, optim: OptimConfig, adaptation: Adaptation | None = None) -> None:
    """Check that every rule of optim.groups takes a parameter of the model, and that some parameters are trained.

    Raises:
        ConfigError: naming the rule, and what is near to it.
    """
    names = list((adaptation or Adaptation(model)).shapes())
    for index, rule in enumerate(optim.groups):
        mine = [name for name in names if matches(rule, name)]
        if not mine:
            raise ConfigError(
                "matches no parameter of the model",
                field=f"optim.groups.{index}.match",
                value=rule.match,
                remedy=nearest(rule.match, names) if len(names) < 50 else _similar(rule.match, names),
            )
        earlier = optim.groups[:index]
        if all(any(matches(other, name) for other in earlier) for name in mine):
            raise ConfigError(
                "takes nothing: the first rule that matches decides, and those before take all of it",
                field=f"optim.groups.{index}.match",
                value=rule.match,
                remedy="put it before them",
            )
    if adaptation is not None and adaptation.is_added:
        _check_adaptation_trains(names, optim, adaptation)
    if all(size.group.is_frozen for size in plan_groups(model, optim, adaptation)):
        raise ConfigError("every parameter is frozen", field="optim.groups", remedy="leave some to train")


def _check_adaptation_trains(names: list[str], optim: OptimConfig, adaptation: Adaptation) -> None:
    """Check that no rule freezes what an adaptation is made of: its checkpoints hold what it trains, and need all of it.

    Raises:
        ConfigError: naming the rule and a parameter.
    """
    for name in filter(adaptation.trains, names):
        index = next((index for index, rule in enumerate(optim.groups) if matches(rule, name)), None)
        if index is not None and optim.groups[index].frozen:
            raise ConfigError(
                f"freezes {name}, which the adaptation is to train",
                field=f"optim.groups.{index}.match",
                value=optim.groups[index].match,
                remedy="match less; the base is frozen without a rule",
            )


def _similar(pattern: str, names: list[str]) -> str:
    """Suggest names like a pattern's: a large model has too many to list."""
    suggestion = nearest(pattern.strip("*"), names)
    return suggestion if suggestion.startswith("did") else f"names are like {names[0]}, {names[len(names) // 2]}"


def group_rows(
    model: ModelConfig, optim: OptimConfig, adaptation: Adaptation | None = None
) -> list[tuple[str, str, str, str, str, str]]:
    """Describe the groups, over all ranks: (group, rate, weight decay, tensors, parameters, share)."""
    sizes = plan_groups(model, optim, adaptation)
    total = sum(size.parameters for size in sizes)
    rows = []
    for size in sizes:
        group = size.group
        rate = "frozen" if group.is_frozen else f"{group.lr_multiplier:g} x lr"
        decay = "" if group.is_frozen else f"{optim.weight_decay * group.weight_decay_multiplier:g}"
        share = f"{size.parameters / total:.2%}"
        rows.append((group.name, rate, decay, f"{size.tensors:,}", f"{size.parameters:,}", share))
    return rows


def trainable_fraction(model: ModelConfig, optim: OptimConfig, adaptation: Adaptation | None = None) -> float:
    """Compute the share of the parameters that is trained; 1 where no rule freezes any."""
    if adaptation is None and not any(rule.frozen for rule in optim.groups):
        return 1.0
    trainable, total = num_trainable(model, optim, adaptation)
    return trainable / total


def num_trainable(model: ModelConfig, optim: OptimConfig, adaptation: Adaptation | None = None) -> tuple[int, int]:
    """Count the parameters that are not frozen, and all, over all ranks."""
    sizes = plan_groups(model, optim, adaptation)
    return sum(size.parameters for size in sizes if not size.group.is_frozen), sum(size.parameters for size in sizes)
