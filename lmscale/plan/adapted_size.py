"""The numbers that one rank of each pipeline stage holds of an adapted model, and those that it trains."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from lmscale.config.model import ModelConfig
from lmscale.config.optim import OptimConfig
from lmscale.plan.adaptation import Adaptation, base_bias_of
from lmscale.plan.groups import group_of, trainable_fraction
from lmscale.plan.stages import StageSize, stage_layers, stage_parameters

_LAYER = re.compile(r"^(?:encoder_|decoder_)?layers\.(\d+)\.")
_SPLIT = re.compile(
    r"linear_(qkv|q|kv|fc1)\.(weight|bias)$"
    r"|linear_(proj|fc2)\.weight$"
    r"|linear_(qkv|q|kv|fc1)\.lora\.\w+\.b$"
    r"|linear_(proj|fc2)\.lora\.\w+\.a$"
    r"|^(word_embedding|head)\.table\.weight$|^word_embedding\.lora\.\w+\.a$"
    r"|relative_bias\.|^output_bias\.|core_attention\.prefix\."
)
"""Parameters that tensor parallelism splits; the others are whole on every rank."""
_FIRST = ("input_embedding", "encoder_embedding")
_BETWEEN = ("encoder_norm", "decoder_embedding")
"""Behind the encoder's last layer; what is not named here is behind the last of all."""
_HEADS = ("masked_head", "tied_head", "head", "output_bias")
_COPIED = {
    "word_embedding": ("words", "tied_head"),
    "relative_bias": ("bias",),
    "encoder_relative_bias": ("bias",),
    "decoder_relative_bias": ("bias",),
    "prefix_self": ("layer",),
    "prefix_decoder_self": ("fed_layer",),
    "prefix_cross": ("fed_layer",),
}
"""Tied layers: each stage that has an entry of these kinds holds a copy."""


def stage_sizes(
    model: ModelConfig, optim: OptimConfig, adaptation: Adaptation | None, tp_size: int, pp_size: int
) -> list[StageSize]:
    """Size the stages of a model, adapted or not.

    Where rules of optim.groups freeze a part of a model that is not adapted, each stage is taken to train the same share.

    Args:
        model: the architecture.
        optim: whose rules may freeze parameters.
        adaptation: what is done to the model, if anything.
        tp_size: tensor-parallel ranks.
        pp_size: pipeline stages.

    Raises:
        ConfigError: if the layers do not divide over the stages.
    """
    if adaptation is None:
        share = trainable_fraction(model, optim)
        return [StageSize(count, round(count * share)) for count in stage_parameters(model, tp_size, pp_size)]
    adapt = adaptation.adapt
    key = (model, "" if adapt is None else adapt.model_dump_json(), adaptation.head, str(optim.groups))
    return _sizes(_Question(key, tp_size, pp_size, adaptation, optim))


@dataclass(frozen=True)
class _Question:
    """What is sized; a key, as the sections of a config cannot be: a search asks for every layout."""

    key: tuple[object, ...]
    tp_size: int
    pp_size: int
    adaptation: Adaptation = field(compare=False)
    optim: OptimConfig = field(compare=False)


@functools.lru_cache(maxsize=256)
def _sizes(question: _Question) -> list[StageSize]:
    adaptation, pp_size = question.adaptation, question.pp_size
    stages = _stages_of(adaptation, pp_size)
    held, trained = [0] * pp_size, [0] * pp_size
    for name, shape in adaptation.shapes().items():
        is_split = _SPLIT.search(base_bias_of(name) or name) is not None
        size = math.prod(shape) // (question.tp_size if is_split else 1)
        is_trained = not group_of(name, len(shape), question.optim, adaptation).is_frozen
        for stage in stages(name):
            held[stage] += size
            trained[stage] += size if is_trained else 0
    return [StageSize(*pair) for pair in zip(held, trained, strict=True)]


def _stages_of(adaptation: Adaptation, pp_size: int) -> Callable[[str], list[int]]:
    """Return what tells the stages that hold a parameter, by its name."""
    model = adaptation.model
    is_fed = model.has_decoder_stack and adaptation.head is None
    total = model.num_layers * (2 if is_fed else 1)
    kinds = [
        {
            (layer.kind, layer.in_decoder)
            for layer in layers
            if adaptation.head is None or not (layer.kind in _HEADS or layer.in_decoder)
        }
        for layers in stage_layers(model, pp_size)
    ]

    def stages(name: str) -> list[int]:
        layer, owner = _LAYER.match(name), name.partition(".")[0]
        if layer is not None:
            index = int(layer.group(1)) + (model.num_layers if name.startswith("decoder_") else 0)
            return [index * pp_size // total]
        if owner in _COPIED:
            mine = {
                (kind, in_decoder)
                for kind in _COPIED[owner]
                for in_decoder in (False, True)
                if kind != "bias" or in_decoder == owner.startswith("decoder_")
            }
            return [stage for stage, there in enumerate(kinds) if mine & there]
        if owner in _FIRST:
            return [0]
        return [(model.num_layers - 1) * pp_size // total if owner in _BETWEEN else pp_size - 1]

    return stages
