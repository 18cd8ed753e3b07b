"""What flows between layers: a named record, packed to the tuple of tensors that DeepSpeed passes on.

Floating-point tensors come first, integers behind them. A pipeline's backward runs once for each floating-point tensor
that came over the wire, so there it is exactly one: the decoder's hidden states and the encoder's output travel as one
tensor, joined along the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lmscale import batch
from lmscale.config.model import ModelConfig
from lmscale.config.objective import CausalLMConfig, ObjectiveConfig
from lmscale.plan.adaptation import Head

Packed = torch.Tensor | tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Record:
    """Tensors that a layer reads. What the run does without is None.

    Shapes:
        hidden: [b, s, h] or, under sequence parallelism, [s/t, b, h]; before the embedding, tokens int64 [b, s]; in a
            decoder that an encoder feeds, d for s.
        memory: the encoder's output, like hidden; in a decoder's layers.
        sentence_logits: [b, 2], behind the pooler.
        The others are as in lmscale.batch.
    """

    hidden: torch.Tensor
    memory: torch.Tensor | None = None
    sentence_logits: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    document_ids: torch.Tensor | None = None
    token_types: torch.Tensor | None = None
    is_prefix: torch.Tensor | None = None
    masked_positions: torch.Tensor | None = None
    decoder_tokens: torch.Tensor | None = None
    decoder_positions: torch.Tensor | None = None
    decoder_document_ids: torch.Tensor | None = None
    prompt_places: torch.Tensor | None = None
    adapter_ids: torch.Tensor | None = None

    def with_hidden(self, hidden: torch.Tensor) -> Record:
        """Return the record with other hidden states."""
        return replace(self, hidden=hidden)


@dataclass(frozen=True)
class Wire:
    """Which tensors this run sends beside the hidden states, and in which form.

    Attributes:
        carried: names of the integer tensors, in order.
        label_names: the fields of a batch that the loss reads, in order.
        joins_memory: what may come last in a stage sends hidden states and memory as one tensor, and an integer tensor
            more as a mark of it (in pipelines).
        sequence_dim: of hidden states, where they are joined.
    """

    carried: tuple[str, ...] = ()
    label_names: tuple[str, ...] = (batch.LABELS.name, batch.LOSS_MASK.name)
    joins_memory: bool = False
    sequence_dim: int = 1

    @property
    def input_names(self) -> tuple[str, ...]:
        """The fields of a batch (lmscale.batch) that make up the first layer's input, in order."""
        return (batch.TOKENS.name, *self.carried)

    def unpack(self, packed: Packed) -> Record:
        """Name the tensors that came over the wire."""
        if not isinstance(packed, tuple):
            return Record(packed)
        first, rest = packed[0], packed[1:]
        num_floats = sum(tensor.is_floating_point() for tensor in rest)
        named = dict(zip(self.carried, rest[num_floats:], strict=False))
        if num_floats == 0 and len(rest) > len(self.carried):
            encoder, decoder = named["document_ids"].size(1), named["decoder_document_ids"].size(1)
            total = first.size(self.sequence_dim)
            length = total * decoder // (encoder + decoder)  # sequence parallelism splits both alike
            hidden, memory = first.split((length, total - length), dim=self.sequence_dim)
            return Record(hidden, memory, **named)
        if num_floats == 0:
            return Record(first, **named)
        return Record(first, **{self._second: rest[0]}, **named)

    def pack(self, record: Record, *, at_border: bool = False) -> Packed:
        """Put a record on the wire: a lone tensor, or a tuple.

        Args:
            record: what goes on.
            at_border: the next layer may be another stage's.
        """
        integers = tuple(getattr(record, name) for name in self.carried)
        second = getattr(record, self._second)
        if second is None:
            return (record.hidden, *integers) if integers else record.hidden
        if not (at_border and self.joins_memory):
            return (record.hidden, second, *integers)
        joined = torch.cat((record.hidden, second), dim=self.sequence_dim)
        mark = torch.zeros(1, dtype=torch.int64, device=joined.device)
        return (joined, *integers, mark)

    @property
    def _second(self) -> str:
        """What a second floating-point tensor is."""
        return "memory" if batch.DECODER_TOKENS.name in self.carried else "sentence_logits"


def build_wire(
    model: ModelConfig,
    objective: ObjectiveConfig,
    *,
    isolates_documents: bool = False,
    packs_examples: bool = False,
    joins_memory: bool = False,
    sequence_parallel: bool = False,
    has_prompt: bool = False,
    tells_rows_apart: bool = False,
    head: Head | None = None,
) -> Wire:
    """Choose what a run's layers exchange.

    Args:
        model: the architecture.
        objective: the objective.
        isolates_documents: a decoder-only model's packed documents do not see one another.
        packs_examples: rows of an encoder-decoder model hold several examples, whose positions restart.
        joins_memory: there is a pipeline.
        sequence_parallel: hidden states are [s/t, b, h].
        has_prompt: trained vectors stand in the place of some tokens.
        tells_rows_apart: each row names the adaptation that it is computed with.
        head: in the place of the language-model head.
    """
    labels = (batch.LABELS, batch.LOSS_MASK)
    if model.has_decoder_stack and head is not None:
        carried = (batch.DOCUMENT_IDS,)
    elif model.has_decoder_stack:
        carried = (batch.DOCUMENT_IDS, batch.DECODER_TOKENS, batch.DECODER_DOCUMENT_IDS)
        carried += (batch.POSITIONS, batch.DECODER_POSITIONS) if packs_examples else ()
    elif model.is_encoder_only:
        carried = (batch.DOCUMENT_IDS,) if head else (batch.DOCUMENT_IDS, batch.MASKED_POSITIONS)
        carried += (batch.TOKEN_TYPES,) if objective.name == "bert" else ()
        labels += (batch.IS_RANDOM_NEXT,) if model.next_sentence_head and head is None else ()
    else:
        carried = (batch.POSITIONS, batch.DOCUMENT_IDS) if isolates_documents else ()
        carried += (batch.DOCUMENT_IDS,) if head and not isolates_documents else ()
        is_prefix_lm = isinstance(objective, CausalLMConfig) and objective.prefix_lm
        carried += (batch.IS_PREFIX,) if is_prefix_lm else ()
    if head is not None and head.kind == "value":
        labels = (batch.TARGETS, batch.LOSS_MASK)
    carried += (batch.PROMPT_PLACES,) if has_prompt else ()
    carried += (batch.ADAPTER_IDS,) if tells_rows_apart else ()
    return Wire(
        carried=tuple(field.name for field in carried),
        label_names=tuple(field.name for field in labels),
        joins_memory=joins_memory and model.has_decoder_stack and head is None,
        sequence_dim=0 if sequence_parallel else 1,
    )
