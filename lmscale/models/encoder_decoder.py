"""Models of two stacks (BART, T5) as a list of layers."""

from __future__ import annotations

from deepspeed.runtime.pipe.module import LayerSpec

from lmscale.models.block import Stack
from lmscale.models.context import ModelContext
from lmscale.models.embedding import FinalNorm, InputEmbedding, InputNames, feed_decoder
from lmscale.models.relative_bias import SharedBias
from lmscale.models.specs import NamedSpecs, head, layers, named, task_head, tied_embedding, word_embedding

ENCODER_INPUT = InputNames("encoder_embedding", "positions")
DECODER_INPUT = InputNames("decoder_embedding", "decoder_positions")
DECODER_WORDS = "word_embedding_of_decoder"
"""The layer that the decoder begins with."""


def encoder_decoder_specs(context: ModelContext) -> NamedSpecs:
    """List the layers: the encoder, then the decoder, whose layers carry the encoder's output along.

    The word table serves both stacks and, where it is tied, the head. A task's head stands behind the encoder, in the place
    of the decoder and the language-model head.
    """
    has_bias = context.model.position_embedding == "relative"
    encoder = Stack("encoder_layers", is_causal=False, bias=SharedBias() if has_bias else None)
    decoder = Stack("decoder_layers", is_causal=True, is_fed=True, bias=SharedBias() if has_bias else None)
    specs = [
        word_embedding(context),
        named("encoder_embedding", LayerSpec(InputEmbedding, context, ENCODER_INPUT)),
        *layers(context, encoder),
    ]
    if context.model.norm_position == "pre":
        specs.append(named("encoder_norm", LayerSpec(FinalNorm, context, "encoder_norm")))
    if context.head is not None:
        return [*specs, task_head(context)]
    specs += [
        named(DECODER_WORDS, tied_embedding(context, feed_decoder)),
        named("decoder_embedding", LayerSpec(InputEmbedding, context, DECODER_INPUT)),
        *layers(context, decoder),
    ]
    if context.model.norm_position == "pre":
        specs.append(named("final_norm", LayerSpec(FinalNorm, context)))
    return [*specs, head(context)]
