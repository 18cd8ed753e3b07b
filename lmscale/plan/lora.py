"""Which matrices LoRA is added to, and the shapes of what it adds."""

from __future__ import annotations

from lmscale.config.adapt import LoraConfig
from lmscale.config.model import ModelConfig
from lmscale.config.validation import nearest
from lmscale.errors import ConfigError
from lmscale.plan.names import Shape

Target = tuple[str, str, int, int]
"""(linear layer within a transformer layer, name of the pair, outputs, inputs)."""


PARTS = {"query": 0, "key": 1, "value": 2, "cross_key": 0, "cross_value": 1, "gate": 0, "up": 1}
"""Where a matrix is among those that one tensor holds."""


def layer_targets(model: ModelConfig, is_fed: bool) -> list[Target]:
    """List everything in a transformer layer that LoRA can be added to.

    A fused tensor appears whole and by its parts.
    """
    hidden, ffn = model.hidden_size, model.ffn_size
    queries, keys = model.num_attention_heads * model.head_size, model.query_groups * model.head_size
    targets: list[Target] = [
        ("attention.linear_qkv", "query", queries, hidden),
        ("attention.linear_qkv", "key", keys, hidden),
        ("attention.linear_qkv", "value", keys, hidden),
        ("attention.linear_qkv", "qkv", queries + 2 * keys, hidden),
        ("attention.linear_proj", "proj", hidden, queries),
    ]
    if is_fed:
        targets += [
            ("cross_attention.linear_q", "cross_query", queries, hidden),
            ("cross_attention.linear_kv", "cross_key", keys, hidden),
            ("cross_attention.linear_kv", "cross_value", keys, hidden),
            ("cross_attention.linear_proj", "cross_proj", hidden, queries),
        ]
    if model.is_gated:
        targets += [("mlp.linear_fc1", "gate", ffn, hidden), ("mlp.linear_fc1", "up", ffn, hidden)]
    targets.append(("mlp.linear_fc1", "fc1", (2 if model.is_gated else 1) * ffn, hidden))
    targets.append(("mlp.linear_fc2", "fc2", hidden, ffn))
    return targets


def chosen_targets(model: ModelConfig, adapt: LoraConfig, is_fed: bool) -> list[Target]:
    """List what a config chooses in a layer."""
    return [target for target in layer_targets(model, is_fed) if target[1] in adapt.targets]


def check_targets(model: ModelConfig, adapt: LoraConfig) -> None:
    """Check that each target is there, once, and not both whole and in parts.

    Raises:
        ConfigError: naming the candidates.
    """
    candidates = {name for _, name, _, _ in layer_targets(model, model.has_decoder_stack)} | {"embedding"}
    if not adapt.targets:
        raise ConfigError("is empty", field="adapt.targets", remedy=f"name some of {', '.join(sorted(candidates))}")
    for target in adapt.targets:
        if target not in candidates:
            raise ConfigError(
                f"matches nothing in a {model.architecture} model of this shape",
                field="adapt.targets",
                value=target,
                remedy=nearest(target, candidates),
            )
        if adapt.targets.count(target) > 1:
            raise ConfigError("is given twice", field="adapt.targets", value=target)
    for whole, parts in (("qkv", ("query", "key", "value")), ("fc1", ("gate", "up"))):
        inside = [part for part in parts if part in adapt.targets]
        if whole in adapt.targets and inside:
            raise ConfigError(
                f"{whole} holds {inside[0]} already", field="adapt.targets", value=inside[0], remedy="keep one of them"
            )


def lora_shapes(model: ModelConfig, adapt: LoraConfig, padded: bool = True) -> dict[str, Shape]:
    """List the parameters: A [r, inputs] and B [outputs, r] of each pair; `padded` as of plan.names."""
    shapes: dict[str, Shape] = {}
    for place, name, outputs, inputs in lora_pairs(model, adapt, padded):
        shapes |= {f"{place}.lora.{name}.a": (adapt.rank, inputs), f"{place}.lora.{name}.b": (outputs, adapt.rank)}
    return shapes


def targets_of(model: ModelConfig, adapt: LoraConfig) -> set[str]:
    """Return the logical names of the layers that LoRA is added to."""
    return {place for place, _, _, _ in lora_pairs(model, adapt)}


def lora_scale(adapt: LoraConfig) -> float:
    """Return what B A is multiplied by.

    Source: Hu et al. 2021, arXiv:2106.09685, sec. 4.1; rslora: Kalajdzievski 2023, arXiv:2312.03732.
    """
    return adapt.alpha / (adapt.rank**0.5 if adapt.rslora else adapt.rank)


def lora_pairs(model: ModelConfig, adapt: LoraConfig, padded: bool = True) -> list[Target]:
    """List every pair with the logical name of the layer that it is beside."""
    stacks = [("encoder_layers", False), ("decoder_layers", True)] if model.has_decoder_stack else [("layers", False)]
    pairs: list[Target] = []
    if "embedding" in adapt.targets:
        vocab_size = model.padded_vocab_size if padded else model.vocab_size
        pairs.append(("word_embedding", "embedding", model.hidden_size, vocab_size))
    for stack, is_fed in stacks:
        chosen = chosen_targets(model, adapt, is_fed)
        for index in range(model.num_layers):
            pairs += [(f"{stack}.{index}.{place}", name, outputs, inputs) for place, name, outputs, inputs in chosen]
    return pairs
