"""Decoder-only models (GPT, and Llama's shape by config) as a list of layers."""

from __future__ import annotations

from deepspeed.runtime.pipe.module import LayerSpec, TiedLayerSpec

from lmscale.models.attention import DocumentMasks
from lmscale.models.block import TransformerLayer
from lmscale.models.context import ModelContext
from lmscale.models.embedding import WORD_EMBEDDING, FinalNorm, InputEmbedding, UntiedHead, WordEmbedding, tied_head

NamedSpecs = list[tuple[str, LayerSpec]]
"""Layers in order, each with its logical name: the name of its parameters in checkpoints, whatever the layout."""


def decoder_specs(context: ModelContext) -> NamedSpecs:
    """List the layers: word embedding, input embedding, transformer layers, final norm, head."""
    masks = DocumentMasks()
    layers = [
        (f"layers.{index}", LayerSpec(TransformerLayer, context, masks, index))
        for index in range(context.model.num_layers)
    ]
    if context.model.tied_head:
        embedding = TiedLayerSpec(WORD_EMBEDDING, WordEmbedding, context, tied_weight_attr="table.weight")
        head = TiedLayerSpec(
            WORD_EMBEDDING, WordEmbedding, context, forward_fn=tied_head, tied_weight_attr="table.weight"
        )
    else:
        embedding, head = LayerSpec(WordEmbedding, context), LayerSpec(UntiedHead, context)
    return [
        (WORD_EMBEDDING, embedding),
        ("input_embedding", LayerSpec(InputEmbedding, context)),
        *layers,
        ("final_norm", LayerSpec(FinalNorm, context)),
        ("head", head),
    ]
