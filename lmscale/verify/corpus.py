"""What the shrunk run reads: the run's own corpora made small, or random tokens where they are not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmscale.config.data import split_shares
from lmscale.config.run import RunConfig
from lmscale.data.indexed import IndexedCorpus
from lmscale.data.manifest import Manifest
from lmscale.data.shards import is_corpus
from lmscale.data.windows import Windows, split_documents
from lmscale.data.writer import CorpusWriter

_DTYPE = np.uint16
Documents = Iterator[NDArray[np.int64]]


def shrink_corpora(config: RunConfig, small: RunConfig, directory: Path) -> tuple[RunConfig, str]:
    """Write small corpora and let the shrunk run read them; objectives other than causal_lm read the run's own.

    Documents are shortened as the windows are, so that as many borders fall into a window, and keep their ends; token
    ids are taken modulo the small vocabulary.

    Args:
        config: the user's run.
        small: its shrunk copy.
        directory: for the corpora.

    Returns:
        The copy with the new prefixes, and a description of the data.

    Raises:
        DataError: if a corpus of the run is damaged.
    """
    if config.task is not None:
        return small, "the task's first examples"
    if config.objective.name != "causal_lm":
        return small, "the run's corpora"  # their sentences and special ids are what the objective works with
    missing = [source.prefix for source in config.data.train if not is_corpus(source.prefix)]
    num_tokens = small.train.train_tokens + small.data.seq_length
    sources = []
    for number, source in enumerate(config.data.train):
        documents = (
            _random_documents(config.train.seed + number, small)
            if missing
            else _documents(source.prefix, config, small.data.seq_length)
        )
        prefix = str(directory / f"corpus-{number}")
        _write(prefix, documents, num_tokens, small.model.vocab_size)
        sources.append({"prefix": prefix, "weight": source.weight})
    keys = small.model_dump()
    keys["data"]["train"] = sources
    description = f"random tokens, since {missing[0]} is not there" if missing else "the run's corpora, shortened"
    return RunConfig.model_validate(keys), description


def _documents(prefix: str, config: RunConfig, seq_length: int) -> Documents:
    """Shorten the documents of the train share, again and again."""
    corpus = IndexedCorpus(prefix)
    first, behind = split_documents(corpus.num_documents, split_shares(config.data.split))[0]
    Windows(corpus, (first, behind), config.data.seq_length, "the train share")  # an empty share is the user's error
    while True:
        for number in range(first, behind):
            tokens = corpus.document(number)
            length = max(1, len(tokens) * seq_length // config.data.seq_length)
            if len(tokens):
                yield np.append(tokens[: length - 1], tokens[-1]).astype(np.int64)


def _random_documents(seed: int, small: RunConfig) -> Documents:
    """Draw documents, half a window long in the mean, of tokens that small ids are frequent among."""
    rng = np.random.default_rng(seed)
    while True:
        length = int(rng.integers(1, small.data.seq_length + 1))
        yield (small.model.vocab_size * rng.random(length) ** 3).astype(np.int64)


def _write(prefix: str, documents: Documents, num_tokens: int, vocab_size: int) -> None:
    with CorpusWriter(prefix, _DTYPE) as writer:
        for tokens in documents:
            writer.append((tokens % vocab_size).astype(_DTYPE).tobytes(), np.array([len(tokens)], np.int32))
            if writer.num_tokens > num_tokens:
                break
        writer.finish(lambda digest, size: _manifest(writer, vocab_size, digest, size))


def _manifest(writer: CorpusWriter, vocab_size: int, idx_sha256: str, bin_bytes: int) -> Manifest:
    counts: dict[str, Any] = {"documents": writer.num_documents, "tokens": writer.num_tokens}
    return Manifest("", vocab_size, None, skipped={}, idx_sha256=idx_sha256, bin_bytes=bin_bytes, **counts)
