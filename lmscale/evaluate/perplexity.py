"""Held-out loss of a checkpoint on a tokenized corpus."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from lmscale import batch as fields
from lmscale.data.blend import Blend
from lmscale.data.source import Source
from lmscale.evaluate.model import TrainedModel
from lmscale.feed.dataset import SampleDataset, in_order
from lmscale.feed.sources import open_whole
from lmscale.feed.vocabulary import build_vocabulary, check_full_stop
from lmscale.models.loss import LanguageModelLoss
from lmscale.objectives.base import Arrays, Vocabulary
from lmscale.objectives.registry import build_objective


@dataclass(frozen=True)
class HeldOutLoss:
    """What a model makes of a corpus.

    Attributes:
        prefix: of the corpus.
        num_windows: samples that were read, each once: windows of seq_length, or what the objective cuts.
        num_tokens: tokens that were predicted.
        loss: mean cross entropy over them, in nats.
    """

    prefix: str
    num_windows: int
    num_tokens: int
    loss: float

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(min(self.loss, 700.0))


def measure_corpus(
    model: TrainedModel, prefix: str, batch_size: int | None = None, show_progress: bool = False
) -> HeldOutLoss:
    """Measure a model on every sample of a corpus, as training measures its held-out corpora.

    loss = sum over all samples' counted labels of -log p(label | what the model reads) / number of them. The samples are
    those of the run's objective in epoch 0, in order, noised as its seed says: masks and spans are the same each time.
    BERT's next-sentence loss and T5's z-loss are left out.

    gpt: the samples are windows of seq_length that follow one another without overlap, and see other documents in them
    or not, as data.reset_attention_mask says. What is left behind the last whole window is not read.

    Args:
        model: on all ranks.
        prefix: PREFIX of PREFIX.bin and PREFIX.idx.
        batch_size: samples read at a time; left out, the run's micro_batch_size.
        show_progress: draw a bar on stderr, on rank 0 and where it is a terminal.

    Raises:
        DataError: if the corpus cannot be used, is smaller than a sample or of another vocabulary.
    Collectives: over the model's ranks; all must call.
    """
    config = model.config
    vocabulary = build_vocabulary(config)
    windows = open_whole(config, prefix, vocabulary.document_end_id)
    check_full_stop(vocabulary, config.objective, [windows])
    size = batch_size or config.batch.micro_batch_size
    console = Console(stderr=True)
    batches = track(
        _batches(model, windows, vocabulary, size),
        description=f"reading {prefix}",
        total=-(-windows.num_samples() // size),
        console=console,
        transient=True,
        disable=not (show_progress and console.is_terminal and model.context.topology.rank == 0),
    )
    total, count = 0.0, 0
    for batch in batches:
        total += _summed_loss(model, batch)
        count += int(batch[fields.LOSS_MASK.name].sum())
    return HeldOutLoss(str(prefix), windows.num_samples(), count, total / max(1, count))


def _batches(model: TrainedModel, windows: Source, vocabulary: Vocabulary, size: int) -> Iterator[Arrays]:
    config = model.config
    blend = Blend([windows], [1.0], config.train.seed)
    objective = build_objective(config.objective, config.text_lengths, vocabulary)
    dataset = SampleDataset(blend, in_order, objective, config.model.vocab_size)
    for first in range(0, windows.num_samples(), size):
        yield dataset.arrays(np.arange(first, min(first + size, windows.num_samples()), dtype=np.int64))


@torch.no_grad()
def _summed_loss(model: TrainedModel, batch: Arrays) -> float:
    """Sum the cross entropy of a batch's counted labels, in nats, the same on every rank."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)).to(model.device) for name, array in batch.items()}
    wire = model.context.wire
    num_labels = tensors[fields.LABELS.name].size(1)
    outputs = model.module(model.inputs_of(_with_defaults(tensors)))
    if isinstance(outputs, torch.Tensor):
        outputs = outputs[:, -num_labels:]  # without the places of a trained prompt
    weight = torch.tensor([1.0, 0.0], device=model.device)  # of tokens; sentence pairs are left out
    labels = (*(tensors[name] for name in wire.label_names), weight)
    return float(LanguageModelLoss(model.context)(outputs, labels))


def _with_defaults(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add what the objective does not give: positions and documents are on the model's wire always."""
    tokens = tensors[fields.TOKENS.name]
    decoder = tensors.get(fields.DECODER_TOKENS.name, tokens)
    defaults = {
        fields.POSITIONS.name: torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens),
        fields.DECODER_POSITIONS.name: torch.arange(decoder.size(1), device=tokens.device).expand_as(decoder),
        fields.DOCUMENT_IDS.name: torch.zeros_like(tokens),
    }
    return {**defaults, **tensors}
