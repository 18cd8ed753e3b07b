"""What flows between layers: a named record, packed to the tuple of tensors that a DeepSpeed pipeline sends.

One floating-point tensor (the hidden states) and, where the run needs them, integer tensors behind it. A pipeline's
backward sends a gradient for each floating-point tensor, so there is exactly one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Record:
    """Tensors that a layer reads.

    Shapes:
        hidden: [b, s, h] or [s/t, b, h]; before the embedding, tokens int64 [b, s].
        positions, document_ids: int64 [b, s], None where the run does without.
    """

    hidden: torch.Tensor
    positions: torch.Tensor | None = None
    document_ids: torch.Tensor | None = None

    def with_hidden(self, hidden: torch.Tensor) -> Record:
        """Return the record with other hidden states."""
        return replace(self, hidden=hidden)


@dataclass(frozen=True)
class Wire:
    """Which of the optional tensors this run sends."""

    isolates_documents: bool = False

    @property
    def input_names(self) -> tuple[str, ...]:
        """The fields of a batch (lmscale.batch) that make up the first layer's input, in order."""
        return ("tokens", "positions", "document_ids") if self.isolates_documents else ("tokens",)

    def unpack(self, packed: torch.Tensor | tuple[torch.Tensor, ...]) -> Record:
        """Name the tensors that came over the wire."""
        return Record(*packed) if isinstance(packed, tuple) else Record(packed)

    def pack(self, record: Record) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Put a record on the wire: a lone tensor, or a tuple."""
        if not self.isolates_documents:
            return record.hidden
        assert record.positions is not None
        assert record.document_ids is not None
        return record.hidden, record.positions, record.document_ids
