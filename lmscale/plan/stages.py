"""The layers of a model in their order, the stage of a pipeline that holds each, and the parameters that one rank holds.

The same list as models.build makes of modules, as numbers: what a rank holds of a model of any size is known at once.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Literal

from lmscale.config.model import ModelConfig
from lmscale.config.validation import check_divides

WORDS = "word_embedding"
"""The key under which the uses of a tied word table share it."""
Kind = Literal[
    "words", "embedding", "bias", "layer", "fed_layer", "norm", "masked_head", "tied_head", "head", "output_bias"
]


@dataclass(frozen=True)
class PlannedLayer:
    """One entry of the list of layers.

    Attributes:
        kind: what it computes.
        in_decoder: it works on the decoder's tokens.
        tied: the key of the parameters that it shares with other entries of its stage; None where it shares none.
    """

    kind: Kind
    in_decoder: bool = False
    tied: str | None = None

    @property
    def begins_stage(self) -> bool:
        """Whether the pipeline counts it when it divides the list."""
        return self.kind in ("layer", "fed_layer", "bias")


@dataclass(frozen=True)
class StageSize:
    """Numbers on one rank of a stage, before ZeRO, rows of padding included."""

    held: int
    trained: int


def planned_layers(model: ModelConfig) -> list[PlannedLayer]:
    """List the layers of a model in order: the embeddings, the stack or stacks, the head."""
    is_shared = model.tied_head or model.has_decoder_stack
    layers = [
        PlannedLayer("words", tied=WORDS if is_shared else None),
        PlannedLayer("embedding"),
        *_stack(model, False),
    ]
    if model.has_decoder_stack:
        layers += [PlannedLayer("words", True, WORDS), PlannedLayer("embedding", True), *_stack(model, True)]
    if model.is_encoder_only:
        return [
            *layers,
            PlannedLayer("masked_head"),
            PlannedLayer("tied_head", tied=WORDS),
            PlannedLayer("output_bias"),
        ]
    in_decoder = model.has_decoder_stack
    return [
        *layers,
        PlannedLayer("tied_head", in_decoder, WORDS) if model.tied_head else PlannedLayer("head", in_decoder),
    ]


def _stack(model: ModelConfig, in_decoder: bool) -> list[PlannedLayer]:
    layers: list[PlannedLayer] = []
    for _ in range(model.num_layers):
        if model.position_embedding == "relative":
            layers.append(PlannedLayer("bias", in_decoder, "decoder_bias" if in_decoder else "bias"))
        layers.append(PlannedLayer("fed_layer" if in_decoder else "layer", in_decoder))
    return [*layers, PlannedLayer("norm", in_decoder)] if model.norm_position == "pre" else layers


@functools.lru_cache(maxsize=256)
def stage_layers(model: ModelConfig, pp_size: int) -> list[list[PlannedLayer]]:
    """Divide the layers over the stages of a pipeline, as DeepSpeed's PipelineModule does.

    Transformer layers, each with the bias before it, are shared out evenly. What stands before the first belongs to the
    first stage, and what stands behind a layer to that layer's stage: DeepSpeed's partition_balanced takes, of all even
    divisions, the one whose boundaries are latest.

    Raises:
        ConfigError: if the layers, those of both stacks together, do not divide over the stages.
    """
    num_layers = model.num_layers * (2 if model.has_decoder_stack else 1)
    check_divides("model.num_layers", num_layers, pp_size, f"parallel.pp_size = {pp_size}")
    layers = planned_layers(model)
    starts = [index for index, layer in enumerate(layers) if layer.begins_stage]
    bounds = [0, *(starts[stage * len(starts) // pp_size] for stage in range(1, pp_size)), len(layers)]
    return [layers[start:stop] for start, stop in itertools.pairwise(bounds)]


@functools.lru_cache(maxsize=256)
def stage_parameters(model: ModelConfig, tp_size: int, pp_size: int) -> list[int]:
    """Count the parameters that one rank of each pipeline stage holds, padding of the vocabulary included.

    With t = tp_size and the letters of `plan.params.parameter_table` (V padded), an entry of the list holds:

        words, head      V h / t            once a stage where it is tied: the table's copies count where they are held
        embedding        (P + offset) h with learned positions, T h; c h with embedding_norm
        bias             n buckets / t      once a stage
        layer            (h (n + 2 g) d + n d h + h f' + f h) / t + 2 c h, f' = f, gated: 2 f
                         with linear_bias ((n + 2 g) d + f') / t + 2 h: the biases of row-parallel matrices are whole
        fed_layer        a layer, and 4 n d h / t + c h, with linear_bias 3 n d / t + h
        norm             c h
        masked_head      2 (h^2 + h) with the pooler, and 2 h + 2; else h^2 + h; c h
        output_bias      V / t

    Args:
        model: the architecture.
        tp_size: tensor-parallel ranks.
        pp_size: pipeline stages.

    Returns:
        A number for each stage. Every tensor-parallel rank of a stage holds as many.

    Raises:
        ConfigError: if the layers do not divide over the stages.
    """
    return [_parameters_of(model, layers, tp_size) for layers in stage_layers(model, pp_size)]


def _parameters_of(model: ModelConfig, layers: list[PlannedLayer], tp_size: int) -> int:
    seen: set[str] = set()
    counted: dict[tuple[Kind, bool], int] = {}
    total = 0
    for layer in layers:
        if layer.tied in seen:
            continue
        if layer.tied is not None:
            seen.add(layer.tied)
        if (layer.kind, layer.in_decoder) not in counted:
            counted[layer.kind, layer.in_decoder] = layer_parameters(model, layer, tp_size)
        total += counted[layer.kind, layer.in_decoder]
    return total


def layer_parameters(model: ModelConfig, layer: PlannedLayer, tp_size: int) -> int:
    """Count the parameters that a rank holds of one entry of the list, by the table of `stage_parameters`."""
    hidden, vocab_rows = model.hidden_size, model.padded_vocab_size // tp_size
    norm = (2 if model.normalization == "layernorm" else 1) * hidden
    match layer.kind:
        case "words" | "tied_head" | "head":
            return vocab_rows * hidden
        case "embedding":
            learned = model.position_embedding == "learned"
            positions = model.max_position_embeddings + model.position_offset if learned else 0
            return (positions + model.token_types) * hidden + (norm if model.embedding_norm else 0)
        case "bias":
            return model.num_attention_heads // tp_size * model.relative_buckets
        case "layer":
            return _transformer_parameters(model, tp_size) + 2 * norm
        case "fed_layer":
            return _transformer_parameters(model, tp_size) + _cross_parameters(model, tp_size) + 3 * norm
        case "norm":
            return norm
        case "masked_head":
            dense = hidden * hidden + hidden
            return dense + norm + (dense + 2 * hidden + 2 if model.next_sentence_head else 0)
        case "output_bias":
            return vocab_rows


def _transformer_parameters(model: ModelConfig, tp_size: int) -> int:
    hidden, ffn = model.hidden_size, model.ffn_size // tp_size
    width = model.num_attention_heads * model.head_size // tp_size
    qkv = width + 2 * model.query_groups * model.head_size // tp_size
    entering = 2 * ffn if model.is_gated else ffn
    biases = qkv + entering + 2 * hidden if model.linear_bias else 0
    return hidden * (qkv + width + entering + ffn) + biases


def _cross_parameters(model: ModelConfig, tp_size: int) -> int:
    width = model.num_attention_heads * model.head_size // tp_size
    return 4 * width * model.hidden_size + (3 * width + model.hidden_size if model.linear_bias else 0)
