"""Pieces of the lists of layers that more than one architecture has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from deepspeed.runtime.pipe.module import LayerSpec, TiedLayerSpec

from lmscale.models.block import Stack, TransformerLayer
from lmscale.models.context import ModelContext
from lmscale.models.embedding import WORD_EMBEDDING, UntiedHead, WordEmbedding, tied_head
from lmscale.models.relative_bias import RelativeBias
from lmscale.models.task_head import TASK_HEAD, TaskHead
from lmscale.models.wire import Packed

NamedSpec = tuple[str, LayerSpec]
NamedSpecs = list[NamedSpec]
"""Layers in order, each with its logical name: the name of its parameters in checkpoints, whatever the layout."""


def named(name: str, spec: LayerSpec) -> NamedSpec:
    """Give a layer its logical name."""
    return name, spec


def tied_embedding(context: ModelContext, forward_fn: Callable[..., Any] | None = None) -> LayerSpec:
    """Use the word table, which all its uses share."""
    return TiedLayerSpec(WORD_EMBEDDING, WordEmbedding, context, forward_fn=forward_fn, tied_weight_attr="table.weight")


def word_embedding(context: ModelContext) -> NamedSpec:
    """Look tokens up; tied where the table has other uses."""
    is_shared = context.model.tied_head or context.model.has_decoder_stack
    return WORD_EMBEDDING, tied_embedding(context) if is_shared else LayerSpec(WordEmbedding, context)


def head(context: ModelContext) -> NamedSpec:
    """Make logits with the word table, or with a matrix of their own."""
    tied = context.model.tied_head
    return "head", tied_embedding(context, tied_head) if tied else LayerSpec(UntiedHead, context)


def task_head(context: ModelContext) -> NamedSpec:
    """Put a task's head in the place of the language-model head."""
    return TASK_HEAD, LayerSpec(TaskHead, context)


def layers(context: ModelContext, stack: Stack) -> NamedSpecs:
    """List a stack's transformer layers, each behind the stack's relative bias where it has one."""
    specs: NamedSpecs = []
    for index in range(context.model.num_layers):
        if stack.bias is not None:
            specs.append(_relative_bias(context, stack, index))
        specs.append((f"{stack.name}.{index}", LayerSpec(TransformerLayer, context, stack, index)))
    return specs


def _relative_bias(context: ModelContext, stack: Stack, index: int) -> NamedSpec:
    key = stack.name.removesuffix("layers") + "relative_bias"
    spec = TiedLayerSpec(
        key,
        RelativeBias,
        context,
        key,
        stack.bias,
        stack.masks,
        forward_fn=functools.partial(_bias_before, layer_index=index),
        tied_weight_attr="table",
    )
    return key, spec


def _bias_before(module: RelativeBias, packed: Packed, layer_index: int) -> Packed:
    """Compute the bias before a layer; the forward function of its spec."""
    out: Packed = module(packed, layer_index)
    return out
