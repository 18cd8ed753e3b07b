"""The contract between data and model: what a micro batch holds.

A micro batch is a mapping from these names to tensors. The objective makes it (numpy), the feed batches and moves it,
the model's first stage reads the inputs and the loss, on the last stage, the labels.

Shapes: b micro batch, s sequence.
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


TOKENS = Field("tokens", "int64", "bs", "input", "token ids that the model reads")
POSITIONS = Field("positions", "int64", "bs", "input", "position of each token; absent where it is 0 .. s-1")
DOCUMENT_IDS = Field(
    "document_ids",
    "int64",
    "bs",
    "input",
    "number of the document in the window; absent where attention crosses documents",
)
LABELS = Field("labels", "int64", "bs", "label", "token ids to predict")
LOSS_MASK = Field("loss_mask", "float32", "bs", "label", "1.0 where the label counts, else 0.0")

FIELDS: tuple[Field, ...] = (TOKENS, POSITIONS, DOCUMENT_IDS, LABELS, LOSS_MASK)
"""In the order in which they travel."""

INPUT_NAMES: tuple[str, ...] = tuple(field.name for field in FIELDS if field.side == "input")
LABEL_NAMES: tuple[str, ...] = tuple(field.name for field in FIELDS if field.side == "label")
