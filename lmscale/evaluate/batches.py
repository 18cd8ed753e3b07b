"""Sequences of different lengths as one batch: padded on the left to be continued, on the right to be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lmscale.batch import PADDING_ID
from lmscale.config.model import ModelConfig
from lmscale.errors import ConfigError

_PADDING, _TEXT = 0, 1
"""Document ids: text does not see padding."""


@dataclass(frozen=True)
class Padded:
    """What the model reads. The last token of each sequence stands last, so that all continue in the same column.

    Shapes: all int64 [b, s]. A sequence's positions count from 0 at its own first token.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    document_ids: torch.Tensor

    @property
    def packed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The record as the first layer takes it off the wire."""
        return self.tokens, self.positions, self.document_ids

    def without_last(self) -> Padded:
        """Drop the last token of each sequence."""
        return Padded(self.tokens[:, :-1], self.positions[:, :-1], self.document_ids[:, :-1])

    def after(self, tokens: torch.Tensor) -> Padded:
        """Make the record of one new token for each sequence, to be read behind this one.

        Shapes: tokens int64 [b].
        """
        new = tokens[:, None]
        return Padded(new, self.positions[:, -1:] + 1, torch.full_like(new, _TEXT))


def pad_left(sequences: Sequence[Sequence[int]], device: torch.device) -> Padded:
    """Pad token ids on the left to the longest of them.

    Args:
        sequences: none of them empty.
        device: of the result.
    """
    longest = max(map(len, sequences))
    rows = [F.pad(torch.tensor(sequence, dtype=torch.int64), (longest - len(sequence), 0)) for sequence in sequences]
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    places = torch.arange(longest) - (longest - lengths)[:, None]
    document_ids = torch.where(places >= 0, _TEXT, _PADDING)
    return Padded(torch.stack(rows).to(device), places.clamp(min=0).to(device), document_ids.to(device))


def pad_right(sequences: Sequence[Sequence[int]], device: torch.device, pad_id: int = 0) -> Padded:
    """Pad token ids on the right to the longest of them: document ids are 0, those of padding -1, as in training.

    Args:
        sequences: any may be empty, but not all.
        device: of the result.
        pad_id: what the padding holds; nothing sees it.
    """
    longest = max(map(len, sequences))
    rows = [[*sequence, *[pad_id] * (longest - len(sequence))] for sequence in sequences]
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    positions = torch.arange(longest).repeat(len(rows), 1)
    document_ids = torch.where(positions < lengths[:, None], 0, PADDING_ID)
    tokens = torch.tensor(rows, dtype=torch.int64)
    return Padded(tokens.to(device), positions.to(device), document_ids.to(device))


def check_sequences(
    sequences: Sequence[Sequence[int]], model: ModelConfig, num_new: int = 0, taken: Sequence[int] | None = None
) -> None:
    """Check that a model can read sequences and write num_new tokens behind each.

    Args:
        sequences: token ids.
        model: the architecture.
        num_new: tokens to be written.
        taken: positions of each sequence that an adaptation's prefix or prompt has.

    Raises:
        ConfigError: if one is empty, has an id outside the vocabulary, or is too long; with relative positions none is.
    """
    for ids, used in zip(sequences, taken or [0] * len(sequences), strict=True):
        if not ids:
            raise ConfigError("holds no token", field="text", remedy="give at least one character")
        wrong = next((number for number in ids if not 0 <= number < model.vocab_size), None)
        if wrong is not None:
            rule = f"is outside the model's vocabulary of {model.vocab_size}"
            raise ConfigError(rule, field="token id", value=wrong, remedy="use the tokenizer of the model's run")
        has_limit = model.position_embedding != "relative"
        if has_limit and used + len(ids) + num_new > model.max_position_embeddings:
            new = f" and {num_new} new ones are" if num_new else ", which is"
            own = f" behind {used} of the adaptation" if used else ""
            raise ConfigError(
                f"{len(ids)} tokens{own}{new} more than model.max_position_embeddings = {model.max_position_embeddings}",
                field="text",
                remedy="shorten the text" + (" or ask for fewer new tokens" if num_new else ""),
            )
