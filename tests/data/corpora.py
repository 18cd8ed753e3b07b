"""Small corpora for the tests of data and feed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmscale.data.indexed import IndexedCorpus
from lmscale.data.manifest import Manifest
from lmscale.data.writer import CorpusWriter

TEXTS = [
    "def f(x):\n\treturn  x + 1\n",
    "A line, and another.\n\n    Indented four;   and three spaces inside.\r\nnaïve — “quoted” 漢字 🙂\n",
    "The quick brown fox jumps over the lazy dog.\n" * 5,
    "for i in range(10):\n    print(i)\n" * 5,
] * 4


def write_corpus(
    prefix: str | Path, documents: Sequence[Sequence[int]], vocab_size: int = 1000, tokenizer_hash: str = "none"
) -> IndexedCorpus:
    """Write documents of token ids as a corpus with a manifest, and open it."""
    with CorpusWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.append(np.array(document, np.uint16).tobytes(), np.array([len(document)], np.int32))
        writer.finish(
            lambda sha256, size: Manifest(
                tokenizer_hash, vocab_size, None, writer.num_documents, writer.num_tokens, {}, sha256, size
            )
        )
    return IndexedCorpus(prefix)


def write_pairs(
    prefix: str | Path, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], eos_id: int | None
) -> IndexedCorpus:
    """Write pairs of inputs and targets of token ids, eos_id behind each target, and open the corpus."""
    return write_sentences(prefix, pairs, eos_id, division="pairs")


def write_sentences(
    prefix: str | Path,
    documents: Sequence[Sequence[Sequence[int]]],
    eos_id: int | None = None,
    vocab_size: int = 1000,
    tokenizer_hash: str = "none",
    division: str = "split",
) -> IndexedCorpus:
    """Write documents of sentences of token ids, end each document with eos_id, and open the corpus."""
    end = [] if eos_id is None else [eos_id]
    with CorpusWriter(prefix, np.uint16) as writer:
        for document in documents:
            sentences = [*document[:-1], [*document[-1], *end]]
            lengths = np.array([len(sentence) for sentence in sentences], np.int32)
            tokens = np.array([token for sentence in sentences for token in sentence], np.uint16)
            writer.append(tokens.tobytes(), lengths, np.array([len(sentences)], np.int32))
        writer.finish(
            lambda sha256, size: Manifest(
                *(tokenizer_hash, vocab_size, eos_id, writer.num_documents, writer.num_tokens),
                *({}, sha256, size, division),
            )
        )
    return IndexedCorpus(prefix)


def random_sentences(num_documents: int, seed: int = 0, most: int = 12, longest: int = 20) -> list[list[list[int]]]:
    """Draw documents of 1 .. most sentences of 1 .. longest ids in 10 .. 999."""
    rng = np.random.default_rng(seed)
    return [
        [rng.integers(10, 1000, rng.integers(1, longest + 1)).tolist() for _ in range(rng.integers(1, most + 1))]
        for _ in range(num_documents)
    ]


def keys_of(numbers: Any, epoch: int = 0, seed: int = 0, source: int = 0) -> NDArray[np.int64]:
    """Name samples of one epoch of a source."""
    numbers = np.asarray(numbers)
    return np.stack([np.full_like(numbers, value) for value in (seed, source, epoch)] + [numbers], axis=1)


def random_documents(num_documents: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    """Draw documents of 1 .. longest ids below 1,000."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 1000, rng.integers(1, longest + 1)).tolist() for _ in range(num_documents)]
