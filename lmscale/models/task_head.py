"""What a task puts in the place of the language-model head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import nn

from lmscale.batch import PADDING_ID
from lmscale.models.context import ModelContext
from lmscale.models.heads import Dense, first_token
from lmscale.models.wire import Packed
from lmscale.plan.adaptation import Head, has_pooler

TASK_HEAD = "task_head"
_STD = 0.02


class TaskHead(nn.Module):
    """Logits of a task: dropout and a linear layer, in encoders behind a pooler where sequences are classified.

    classes, value: of the first token in encoders (where BERT and RoBERTa have theirs: [CLS], <s>), of the last that is no
    padding in decoders. token_classes: of each token. span: of each token for the start, and for the end; padding and a
    trained prompt cannot be either. Every tensor-parallel rank computes the same.

    Shapes: hidden [b, s, h] or [s/t, b, h] -> [b, 1, c] of classes and value, [b, s, c] of token_classes, [b, 2, s] of span.
    Collectives: a gather over the tensor-parallel group under sequence parallelism.
    Source: Devlin et al. 2019, arXiv:1810.04805, sec. 4; Liu et al. 2019, arXiv:1907.11692, its code
        (fairseq: models/roberta, RobertaClassificationHead).
    """

    def __init__(self, context: ModelContext):
        super().__init__()
        assert context.head is not None
        self._context, self._head = context, context.head
        with context.weights.layer(TASK_HEAD):
            self.pooler = Dense(context, context.model.hidden_size) if has_pooler(context.model, context.head) else None
            self.classifier = _classifier(context, context.head)

    def forward(self, packed: Packed) -> torch.Tensor:
        """Make logits."""
        context = self._context
        record = context.wire.unpack(packed)
        hidden = record.hidden
        if context.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=context.groups.tp
            ).transpose(0, 1)
        if self._head.kind in ("classes", "value"):
            is_encoder = context.model.is_encoder_only
            hidden = first_token(hidden, record.prompt_places) if is_encoder else _last(hidden, record.document_ids)
        micro_batch = context.dropout.next_micro_batch(TASK_HEAD) if self.training else 0
        if self.pooler is not None:
            hidden = torch.tanh(self.pooler(hidden))
        logits: torch.Tensor = self.classifier(self._drop(hidden, micro_batch))
        if self._head.kind != "span":
            return logits
        assert record.document_ids is not None
        is_no_token = record.document_ids == PADDING_ID
        if record.prompt_places is not None:
            is_no_token = is_no_token | (record.prompt_places >= 0)
        return logits.transpose(1, 2).masked_fill(is_no_token[:, None], torch.finfo(logits.dtype).min)

    def _drop(self, hidden: torch.Tensor, micro_batch: int) -> torch.Tensor:
        probability = self._context.model.hidden_dropout
        if not self.training or not probability:
            return hidden
        self._context.dropout.seed(hidden.device, TASK_HEAD, micro_batch, "head", differs_over_tp=False)
        return F.dropout(hidden, probability)


def _classifier(context: ModelContext, head: Head) -> Dense:
    """N(0, 0.02) and 0, whatever scheme the base was drawn by."""
    made = Dense(context, head.num_outputs)
    with torch.no_grad():
        context.weights.normal(_STD)(made.weight)
    return made


def _last(hidden: torch.Tensor, document_ids: torch.Tensor | None) -> torch.Tensor:
    """Take the state of the last token that is no padding: [b, s, h] -> [b, 1, h]."""
    if document_ids is None:
        return hidden[:, -1:]
    places = torch.arange(hidden.size(1), device=hidden.device)
    last = (places * (document_ids != PADDING_ID)).argmax(dim=1)
    return hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.size(2)))
