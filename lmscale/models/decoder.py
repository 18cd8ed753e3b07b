"""Decoder-only models (GPT, and Llama's shape by config) as a list of layers."""

from __future__ import annotations

from deepspeed.runtime.pipe.module import LayerSpec

from lmscale.models.block import Stack
from lmscale.models.context import ModelContext
from lmscale.models.embedding import FinalNorm, InputEmbedding
from lmscale.models.specs import NamedSpecs, head, layers, named, task_head, word_embedding


def decoder_specs(context: ModelContext) -> NamedSpecs:
    """List the layers: word embedding, input embedding, transformer layers, final norm (pre-norm), head or a task's head."""
    specs = [
        word_embedding(context),
        named("input_embedding", LayerSpec(InputEmbedding, context)),
        *layers(context, Stack()),
    ]
    if context.model.norm_position == "pre":
        specs.append(named("final_norm", LayerSpec(FinalNorm, context)))
    return [*specs, head(context) if context.head is None else task_head(context)]
