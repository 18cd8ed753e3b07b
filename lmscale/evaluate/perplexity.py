"""Held-out loss of a checkpoint on a tokenized corpus."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from lmscale.batch import LABELS, LOSS_MASK
from lmscale.data.blend import Blend
from lmscale.data.source import Source
from lmscale.evaluate.model import TrainedModel
from lmscale.feed.dataset import SampleDataset, in_order
from lmscale.feed.sources import open_whole
from lmscale.feed.vocabulary import build_vocabulary
from lmscale.models.loss import LanguageModelLoss
from lmscale.objectives.base import Arrays
from lmscale.objectives.registry import build_objective


@dataclass(frozen=True)
class HeldOutLoss:
    """What a model makes of a corpus.

    Attributes:
        prefix: of the corpus.
        num_windows: samples of seq_length that were read, each once.
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
    """Measure a model on every window of a corpus, as training measures its held-out corpora.

    loss = sum over all windows' counted labels of -log p(label | what precedes it in its window) / number of them. The
    windows follow one another without overlap and have the seq_length of the model's run, and see other documents in
    them or not, as its data.reset_attention_mask says. What is left behind the last whole window is not read.

    Args:
        model: on all ranks.
        prefix: PREFIX of PREFIX.bin and PREFIX.idx.
        batch_size: windows read at a time; left out, the run's micro_batch_size.
        show_progress: draw a bar on stderr, on rank 0 and where it is a terminal.

    Raises:
        DataError: if the corpus cannot be used, is smaller than a window or of another vocabulary.
    Collectives: over the model's ranks; all must call.
    """
    config = model.config
    windows = open_whole(config, prefix)
    size = batch_size or config.batch.micro_batch_size
    console = Console(stderr=True)
    batches = track(
        _batches(model, windows, size),
        description=f"reading {prefix}",
        total=-(-windows.num_samples() // size),
        console=console,
        transient=True,
        disable=not (show_progress and console.is_terminal and model.context.topology.rank == 0),
    )
    total, count = 0.0, 0
    for batch in batches:
        total += _summed_loss(model, batch)
        count += int(batch[LOSS_MASK.name].sum())
    return HeldOutLoss(str(prefix), windows.num_samples(), count, total / max(1, count))


def _batches(model: TrainedModel, windows: Source, size: int) -> Iterator[Arrays]:
    config = model.config
    blend = Blend([windows], [1.0], config.train.seed)
    objective = build_objective(config.objective, config.lengths, build_vocabulary(config))
    dataset = SampleDataset(blend, in_order, objective, config.model.vocab_size)
    for first in range(0, windows.num_samples(), size):
        yield dataset.arrays(np.arange(first, min(first + size, windows.num_samples()), dtype=np.int64))


@torch.no_grad()
def _summed_loss(model: TrainedModel, batch: Arrays) -> float:
    """Sum the cross entropy of a batch's counted labels, in nats, the same on every rank."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)).to(model.device) for name, array in batch.items()}
    tokens = tensors["tokens"]
    positions = tensors.get("positions", torch.arange(tokens.size(1), device=model.device).expand_as(tokens))
    document_ids = tensors.get("document_ids", torch.zeros_like(tokens))
    loss = LanguageModelLoss(model.context)
    weight = torch.ones(1, device=model.device)
    logits = model.module((tokens, positions, document_ids))
    return float(loss(logits, (tensors[LABELS.name], tensors[LOSS_MASK.name], weight)))
