"""Data loaders for training and for the held-out corpora."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lmscale.config.run import RunConfig, split_shares
from lmscale.data.blend import Blend
from lmscale.data.indexed import IndexedCorpus
from lmscale.data.tokenizer import tokenizer_hash
from lmscale.data.windows import Windows, split_documents
from lmscale.errors import LmscaleError
from lmscale.feed.dataset import SampleDataset, in_order
from lmscale.feed.sampler import HeldOutSampler, MicroBatchSampler
from lmscale.feed.transport import SlotFiller, Slots
from lmscale.objectives.base import Vocabulary
from lmscale.objectives.registry import build_objective

Batch = dict[str, torch.Tensor]
"""Named, typed and shaped as in lmscale.batch; contiguous, on the CPU, pinned where there is a CUDA device."""

_TOKENS_A_MESSAGE = 1 << 17
_MESSAGES_AHEAD = 2
_TRAIN, _VALID = 0, 1


def build_blend(config: RunConfig) -> Blend:
    """Open the training part of each source. `Blend.locate` tells where a run's sample comes from.

    Raises:
        DataError: if a corpus cannot be used, or is of another vocabulary.
    """
    shares = split_shares(config.data.split)
    windows = []
    for source in config.data.train:
        corpus = _open(config, source.prefix)
        documents = split_documents(corpus.num_documents, shares)[_TRAIN]
        windows.append(Windows(corpus, documents, config.data.seq_length, "the train share"))
    return Blend(windows, [source.weight for source in config.data.train], config.train.seed)


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
    blend = build_blend(config)
    dataset = _dataset(config, blend, blend.locate)
    size = config.batch.micro_batch_size
    end_samples = -(-config.train.train_tokens // config.data.seq_length)
    sampler = MicroBatchSampler(batch_size_at, consumed_samples, size, dp_rank, dp_size, end_samples)
    return _iterate(dataset, sampler, size, config.data.num_workers)


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
    the last ones have loss_mask 0, so that each window counts once.

    Raises:
        DataError: if a corpus cannot be used, or is of another vocabulary.
    """
    limit = config.train.eval_batches * config.batch.global_batch_size
    size = config.batch.micro_batch_size

    def loader(windows: Windows) -> HeldOut:
        dataset = _dataset(config, Blend([windows], [1.0], config.train.seed), in_order)
        sampler = HeldOutSampler(min(len(windows), limit), size, dp_rank, dp_size)
        return HeldOut(lambda: _iterate(dataset, sampler, size, num_workers=0), len(sampler))

    return {name: loader(windows) for name, windows in _held_out(config).items()}


def _held_out(config: RunConfig) -> dict[str, Windows]:
    seq_length = config.data.seq_length
    if config.data.valid:
        return {v.name: Windows(_open(config, v.prefix), None, seq_length) for v in config.data.valid}
    shares = split_shares(config.data.split)
    if shares[_VALID] == 0:
        return {}
    prefixes = [source.prefix for source in config.data.train]
    held_out = {}
    for name, prefix in zip(_base_names(prefixes), prefixes, strict=True):
        corpus = _open(config, prefix)
        documents = split_documents(corpus.num_documents, shares)[_VALID]
        held_out[name] = Windows(corpus, documents, seq_length, "the valid share")
    return held_out


def _base_names(prefixes: list[str]) -> list[str]:
    """Name corpora by the last part of their prefix, numbered where that is not unique."""
    names = [Path(prefix).name for prefix in prefixes]
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name}-{number}" for number, name in enumerate(names)]


def _open(config: RunConfig, prefix: str) -> IndexedCorpus:
    corpus = IndexedCorpus(prefix)
    known = tokenizer_hash(config.tokenizer) if config.tokenizer is not None else None
    corpus.check_vocabulary(config.model.vocab_size, known)
    return corpus


def _dataset(config: RunConfig, blend: Blend, locate: Callable[..., Any]) -> SampleDataset:
    objective = build_objective(config.objective, config.lengths, Vocabulary(config.model.vocab_size))
    return SampleDataset(blend, locate, objective, config.model.vocab_size, config.data.reset_attention_mask)


def _iterate(
    dataset: SampleDataset, sampler: Iterable[list[int]], micro_batch_size: int, num_workers: int
) -> Iterator[Batch]:
    pin = torch.cuda.is_available()
    # torch has this many batches asked for at most, and one more is being read.
    num_slots = num_workers * _MESSAGES_AHEAD + 1
    seq_length = dataset.seq_length
    messages = _Messages(sampler, max(1, _TOKENS_A_MESSAGE // (micro_batch_size * seq_length)), num_slots)
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
