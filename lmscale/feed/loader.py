"""Data loaders for training and for the held-out corpora."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, cycle, groupby, islice
from operator import itemgetter
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from lmscale.config.adapt import prompt_length
from lmscale.config.run import RunConfig
from lmscale.data.blend import Blend
from lmscale.data.indexed import IndexedCorpus
from lmscale.data.source import Source
from lmscale.errors import LmscaleError
from lmscale.feed.dataset import SampleDataset, in_order
from lmscale.feed.sampler import HeldOutSampler, MicroBatch, MicroBatchSampler, StepSamples
from lmscale.feed.sources import open_held_out, open_train
from lmscale.feed.transport import SlotFiller, Slots
from lmscale.feed.vocabulary import build_vocabulary, check_full_stop
from lmscale.objectives.base import Arrays, Vocabulary
from lmscale.objectives.registry import build_objective

Batch = dict[str, torch.Tensor]
"""Named, typed and shaped as in lmscale.batch; contiguous, on the CPU, pinned where there is a CUDA device."""


class ArrayMaker(Protocol):
    """Makes the arrays of a batch from sample numbers."""

    def arrays(self, indices: NDArray[np.int64], seq_length: int | None = None) -> Arrays:
        """Make them; see `SampleDataset.arrays`."""
        ...


_TOKENS_A_MESSAGE = 1 << 17
_MESSAGES_AHEAD = 2


def build_blend(config: RunConfig, vocabulary: Vocabulary | None = None) -> Blend:
    """Open the training part of each source. `Blend.locate` tells where a run's sample comes from.

    Raises:
        DataError: if a corpus cannot be used, or is of another vocabulary.
    """
    vocabulary = vocabulary or build_vocabulary(config)
    sources = open_train(config, vocabulary.document_end_id)
    check_full_stop(vocabulary, config.objective, sources)
    return Blend(sources, [source.weight for source in config.data.train], config.train.seed)


def build_train_loader(
    config: RunConfig,
    dp_rank: int,
    dp_size: int,
    steps: Iterable[StepSamples],
) -> Iterator[Batch]:
    """Iterate over the micro batches of one data-parallel rank, from a checkpoint to the end of training.

    The samples of a step are the same for every dp_size and num_workers, and after a resume.

    Args:
        config: the run.
        dp_rank: data-parallel rank.
        dp_size: data-parallel size.
        steps: what is left to do, in order; walked more than once.

    Raises:
        DataError: at once, if a corpus cannot be used; on iteration, if a token is outside the vocabulary.
    """
    vocabulary = build_vocabulary(config)
    blend = build_blend(config, vocabulary)
    dataset = _dataset(config, vocabulary, blend, blend.locate)
    size = config.batch.micro_batch_size
    sampler = MicroBatchSampler(steps, size, dp_rank, dp_size)
    return iterate(dataset, sampler, config, config.data.num_workers)


@dataclass(frozen=True)
class HeldOut:
    """A held-out corpus: a way to read it from its start, and how many micro batches that gives each rank."""

    read: Callable[[], Iterator[Batch]]
    num_micro_batches: int


def corpus_hashes(config: RunConfig) -> dict[str, str]:
    """Hash the content of every corpus that a run reads, for its manifest: prefix -> hash."""
    prefixes = [source.prefix for source in config.data.train] + [source.prefix for source in config.data.valid]
    return {prefix: IndexedCorpus(prefix).content_hash for prefix in prefixes}


def build_valid_loaders(config: RunConfig, dp_rank: int, dp_size: int) -> dict[str, HeldOut]:
    """Provide, for each held-out corpus, the means to read it from the start, in order.

    Held out are data.valid, or, where that is empty, the valid share of each training source under the base name of its
    prefix; of each, train.eval_batches global batches at most. Every rank gets as many micro batches; rows that fill
    the last ones have loss_mask 0, so that each sample counts once. Samples are those of epoch 0, unshuffled.

    Raises:
        DataError: if a corpus cannot be used, or is of another vocabulary.
    """
    limit = config.train.eval_batches * config.batch.global_batch_size
    size = config.batch.micro_batch_size

    vocabulary = build_vocabulary(config)

    def loader(source: Source) -> HeldOut:
        dataset = _dataset(config, vocabulary, Blend([source], [1.0], config.train.seed), in_order)
        sampler = HeldOutSampler(min(source.num_samples(), limit), size, dp_rank, dp_size)
        return HeldOut(lambda: iterate(dataset, sampler, config, num_workers=0), len(sampler))

    sources = open_held_out(config, vocabulary.document_end_id)
    check_full_stop(vocabulary, config.objective, sources.values())
    return {name: loader(source) for name, source in sources.items()}


def _dataset(config: RunConfig, vocabulary: Vocabulary, blend: Blend, locate: Callable[..., Any]) -> SampleDataset:
    objective = build_objective(config.objective, config.text_lengths, vocabulary)
    return SampleDataset(blend, locate, objective, config.model.vocab_size, prompt_length(config.adapt))


def iterate(dataset: ArrayMaker, sampler: Iterable[MicroBatch], config: RunConfig, num_workers: int) -> Iterator[Batch]:
    """Iterate over micro batches, prepared ahead by worker processes.

    Args:
        dataset: makes the arrays of sample numbers.
        sampler: the sample numbers of each micro batch.
        config: of the run.
        num_workers: 0 prepares them in this process.
    """
    pin = torch.cuda.is_available()
    micro_batch_size = config.batch.micro_batch_size
    # torch has this many batches asked for at most, and one more is being read.
    num_slots = num_workers * _MESSAGES_AHEAD + 1
    tokens = micro_batch_size * config.lengths.nominal
    cuts = bool(config.data.seq_length_stages)
    messages = _Messages(sampler, max(1, _TOKENS_A_MESSAGE // tokens), num_slots, cuts)
    largest = messages.largest()
    if largest is None:
        return
    slots = Slots(num_slots, dataset.arrays(np.asarray(largest)), shared=num_workers > 0)
    loader: DataLoader[Any] = DataLoader(
        cast(Dataset[Any], SlotFiller(dataset.arrays, slots)),  # torch asks for __getitems__ alone
        batch_sampler=cast(Iterable[list[Any]], messages),
        num_workers=num_workers,
        collate_fn=_as_it_is,
        prefetch_factor=_MESSAGES_AHEAD if num_workers else None,
        worker_init_fn=_leave_signals_to_the_trainer,
    )
    for message in loader:
        if isinstance(message, LmscaleError):
            raise message
        yield from slots.take(message, micro_batch_size, pin)


class _Messages:
    """Joins the sample numbers of several micro batches, which a worker makes at once, and names a slot for them.

    With `cuts`, those of one message are of one length, and the length goes with them.
    """

    def __init__(self, sampler: Iterable[MicroBatch], micro_batches: int, num_slots: int, cuts: bool):
        self._sampler, self._micro_batches, self._num_slots, self._cuts = sampler, micro_batches, num_slots, cuts

    def __iter__(self) -> Iterator[tuple[int, list[int], int | None]]:
        slots = cycle(range(self._num_slots))
        for length, group in groupby(self._sampler, itemgetter(1) if self._cuts else _no_length):
            while indices := list(chain.from_iterable(part[0] for part in islice(group, self._micro_batches))):
                yield next(slots), indices, length

    def largest(self) -> list[int] | None:
        """Return the sample numbers of a message that none is larger than; None where there is no message."""
        if self._cuts:  # a message ends where the length changes: later ones may be larger than the first
            first = next(iter(self._sampler), None)
            return None if first is None else first[0] * self._micro_batches
        message = next(iter(self), None)
        return None if message is None else message[1]


def _no_length(micro_batch: MicroBatch) -> None:
    return None


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ignore what asks the run to stop: it finishes its step and saves, and needs its workers for that.

    A worker ends when the loader or its parent does.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
