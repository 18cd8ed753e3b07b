"""Encoder-only models (BERT, RoBERTa) as a list of layers."""

from __future__ import annotations

from deepspeed.runtime.pipe.module import LayerSpec

from lmscale.models.block import Stack
from lmscale.models.context import ModelContext
from lmscale.models.embedding import FinalNorm, InputEmbedding, masked_head
from lmscale.models.heads import MaskedHead, OutputBias
from lmscale.models.specs import NamedSpecs, layers, named, task_head, tied_embedding, word_embedding


def encoder_specs(context: ModelContext) -> NamedSpecs:
    """List the layers: embeddings, transformer layers, final norm (pre-norm), masked head, word table, its bias.

    A task's head stands in the place of the last three.
    """
    specs = [
        word_embedding(context),
        named("input_embedding", LayerSpec(InputEmbedding, context)),
        *layers(context, Stack(is_causal=False)),
    ]
    if context.model.norm_position == "pre":
        specs.append(named("final_norm", LayerSpec(FinalNorm, context)))
    if context.head is not None:
        return [*specs, task_head(context)]
    return [
        *specs,
        named("masked_head", LayerSpec(MaskedHead, context)),
        named("head", tied_embedding(context, masked_head)),
        named("output_bias", LayerSpec(OutputBias, context)),
    ]
