"""The contract between data and model: what a micro batch holds.

A micro batch is a mapping from these names to tensors. The objective makes it (numpy), the feed batches and moves it,
the model's first stage reads the inputs and the loss, on the last stage, the labels.

Shapes: b micro batch, s sequence (of the encoder, in a model with two stacks), d sequence of the decoder, l places for
labels (s for causal_lm, d for bart and t5, the most predictions of a sample for bert and roberta; of a task with a head
1 for classes and values, s for classes of tokens, 2 for a span).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Field:
    """One tensor of a micro batch."""

    name: str
    dtype: Literal["int64", "float32"]
    shape: str
    side: Literal["input", "label"]
    meaning: str


TOKENS = Field("tokens", "int64", "bs", "input", "token ids that the model, or its encoder, reads")
POSITIONS = Field("positions", "int64", "bs", "input", "position of each token; absent where it is 0 .. s-1")
DOCUMENT_IDS = Field(
    "document_ids",
    "int64",
    "bs",
    "input",
    "tokens of different numbers do not see each other, padding has -1; absent where all see all (that precede them)",
)
TOKEN_TYPES = Field("token_types", "int64", "bs", "input", "segment of each token: 0 or 1")
IS_PREFIX = Field("is_prefix", "int64", "bs", "input", "1 where a token is of the prefix, which sees all of itself")
MASKED_POSITIONS = Field("masked_positions", "int64", "bl", "input", "where the predicted tokens are; 0 fills up")
DECODER_TOKENS = Field("decoder_tokens", "int64", "bd", "input", "token ids that the decoder reads")
DECODER_POSITIONS = Field("decoder_positions", "int64", "bd", "input", "as positions, of the decoder's tokens")
DECODER_DOCUMENT_IDS = Field(
    "decoder_document_ids",
    "int64",
    "bd",
    "input",
    "as document_ids, of the decoder's tokens, which see the encoder's tokens of the same number",
)
PROMPT_PLACES = Field(
    "prompt_places",
    "int64",
    "bs",
    "input",
    "which vector of a trained prompt stands in a token's place; -1: the token's own",
)
ADAPTER_IDS = Field(
    "adapter_ids", "int64", "b", "input", "whose adaptation a row is computed with, where there are several"
)
LABELS = Field("labels", "int64", "bl", "label", "token ids to predict")
TARGETS = Field("targets", "float32", "bl", "label", "numbers to predict, of a head that gives a value")
LOSS_MASK = Field("loss_mask", "float32", "bl", "label", "1.0 where the label counts, else 0.0")
TARGETS = Field("targets", "float32", "bl", "label", "numbers to predict, in the place of labels")
IS_RANDOM_NEXT = Field(
    "is_random_next", "int64", "b", "label", "1 where segment B does not follow segment A, 0 where it does; -1: no pair"
)

FIELDS: tuple[Field, ...] = (
    TOKENS,
    POSITIONS,
    DOCUMENT_IDS,
    TOKEN_TYPES,
    IS_PREFIX,
    MASKED_POSITIONS,
    DECODER_TOKENS,
    DECODER_POSITIONS,
    DECODER_DOCUMENT_IDS,
    PROMPT_PLACES,
    ADAPTER_IDS,
    LABELS,
    TARGETS,
    LOSS_MASK,
    IS_RANDOM_NEXT,
)
"""In the order in which they travel."""

PADDING_ID = -1
"""document_ids of padding."""
