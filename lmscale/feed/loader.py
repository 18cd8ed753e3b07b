"""Data loaders for training and for the held-out corpora."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lmscale.config.run import RunConfig
from lmscale.data.blend import Blend
from lmscale.data.indexed import IndexedCorpus
from lmscale.data.source import Source
from lmscale.errors import LmscaleError
from lmscale.feed.dataset import SampleDataset, in_order
from lmscale.feed.sampler import HeldOutSampler, MicroBatchSampler
from lmscale.feed.sources import open_held_out, open_train
from lmscale.feed.transport import SlotFiller, Slots
from lmscale.feed.vocabulary import build_vocabulary, check_full_stop
from lmscale.objectives.base import Vocabulary
from lmscale.objectives.registry import build_objective

Batch = dict[str, torch.Tensor]
"""Named, typed and shaped as in lmscale.batch; contiguous, on the CPU, pinned where there is a CUDA device."""

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
    consumed_samples: int,
    batch_size_at: Callable[[int], int],
) -> Iterator[Batch]:
    """Iterate over the micro batches of one data-parallel rank, from `consumed_samples` to the end of training.

    The samples of a step are the same for every dp_size and num_workers, and after a resume.

    Args:
        config: the run.
        dp_rank: data-parallel rank.
        dp_size: data-parallel size.
        consumed_samples: samples of the steps that are done.
        batch_size_at: samples consumed -> samples of the next step.

    Raises:
        DataError: at once, if a corpus cannot be used; on iteration, if a token is outside the vocabulary.
    """
    vocabulary = build_vocabulary(config)
    blend = build_blend(config, vocabulary)
    dataset = _dataset(config, vocabulary, blend, blend.locate)
    size = config.batch.micro_batch_size
    end_samples = -(-config.train.train_tokens // config.lengths.nominal)
    sampler = MicroBatchSampler(batch_size_at, consumed_samples, size, dp_rank, dp_size, end_samples)
    return _iterate(dataset, sampler, config, config.data.num_workers)


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
        return HeldOut(lambda: _iterate(dataset, sampler, config, num_workers=0), len(sampler))

    sources = open_held_out(config, vocabulary.document_end_id)
    check_full_stop(vocabulary, config.objective, sources.values())
    return {name: loader(source) for name, source in sources.items()}


def _dataset(config: RunConfig, vocabulary: Vocabulary, blend: Blend, locate: Callable[..., Any]) -> SampleDataset:
    objective = build_objective(config.objective, config.lengths, vocabulary)
    return SampleDataset(blend, locate, objective, config.model.vocab_size)


def _iterate(
    dataset: SampleDataset, sampler: Iterable[list[int]], config: RunConfig, num_workers: int
) -> Iterator[Batch]:
    pin = torch.cuda.is_available()
    micro_batch_size = config.batch.micro_batch_size
    # torch has this many batches asked for at most, and one more is being read.
    num_slots = num_workers * _MESSAGES_AHEAD + 1
    tokens = micro_batch_size * config.lengths.nominal
    messages = _Messages(sampler, max(1, _TOKENS_A_MESSAGE // tokens), num_slots)
    largest = next(iter(messages), None)
    if largest is None:
        return
    slots = Slots(num_slots, dataset.arrays(np.asarray(largest[1])), shared=num_workers > 0)
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
    """Joins the sample numbers of several micro batches, which a worker makes at once, and names a slot for them."""

    def __init__(self, sampler: Iterable[list[int]], micro_batches: int, num_slots: int):
        self._sampler, self._micro_batches, self._num_slots = sampler, micro_batches, num_slots

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        micro_batches, slots = iter(self._sampler), cycle(range(self._num_slots))
        while indices := list(chain.from_iterable(islice(micro_batches, self._micro_batches))):
            yield next(slots), indices


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ignore what asks the run to stop: it finishes its step and saves, and needs its workers for that.

    A worker ends when the loader or its parent does.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
