from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from lmscale.data.indexed import IndexedCorpus
from lmscale.data.windows import Windows, epoch_order, split_documents
from lmscale.errors import DataError
from tests.data.corpora import keys_of, random_documents, write_corpus

CHI_SQUARE_BOUND = 1.35
"""Largest chi-square over its degrees of freedom; at some 500 degrees, chance exceeds it once in a million."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> IndexedCorpus:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "c", random_documents(60))


@pytest.mark.parametrize("documents", [None, (10, 40)])
def test_windows_are_the_packed_documents_cut_with_one_token_of_overlap(
    corpus: IndexedCorpus, documents: tuple[int, int] | None
) -> None:
    theirs = IndexedDataset(corpus.prefix, mmap=True)
    first, behind = documents or (0, 60)
    flat = np.concatenate([theirs[number] for number in range(first, behind)])
    windows = Windows(corpus, documents, 16)
    assert windows.num_samples() == (len(flat) - 1) // 16
    indices = np.arange(windows.num_samples())[::-1]
    expected = np.stack([flat[16 * index : 16 * index + 17] for index in indices])
    read = windows.read(keys_of(indices)).tokens
    assert read.dtype == np.int64
    assert np.array_equal(read, expected)


def test_document_numbers_change_where_documents_do(corpus: IndexedCorpus) -> None:
    windows = Windows(corpus, (5, 55), 16)
    owner = np.repeat(np.arange(60), np.diff(corpus.document_offsets))[corpus.document_offsets[5] :]
    indices = np.arange(windows.num_samples())
    ids = windows.document_ids(indices)
    for index in indices:
        numbers = owner[16 * index : 16 * index + 17]
        assert np.array_equal(ids[index], np.unique(numbers, return_inverse=True)[1])


def test_empty_documents_count_for_nothing(tmp_path: Path) -> None:
    windows = Windows(write_corpus(tmp_path / "c", [[1, 2], [], [], [3, 4, 5], [], [6, 7]]), None, 3)
    assert windows.document_ids(np.array([0, 1])).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]


def test_a_corpus_rebuilt_at_the_same_prefix_is_read_afresh(tmp_path: Path) -> None:
    old = Windows(write_corpus(tmp_path / "c", [[1] * 50] * 4), None, 8)
    assert old.num_samples() == 24
    new = Windows(write_corpus(tmp_path / "c", [[2] * 10] * 2), None, 8)
    assert new.num_samples() == 2
    assert (new.read(keys_of(np.arange(2))).tokens == 2).all()
    # A run that reads the former corpus goes on reading it.
    assert (old.read(keys_of(np.arange(24))).tokens == 1).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.bin", "c.idx", "c.json"]


def test_a_corpus_smaller_than_one_window_is_an_error(corpus: IndexedCorpus) -> None:
    with pytest.raises(DataError, match="fewer than one window"):
        Windows(corpus, None, corpus.num_tokens)
    with pytest.raises(DataError, match="the valid share has 0 tokens in 0 documents"):
        Windows(corpus, (3, 3), 8, "the valid share")
    assert Windows(corpus, None, corpus.num_tokens - 1).num_samples() == 1


@given(num_documents=st.integers(1, 10_000), shares=st.lists(st.floats(0.01, 1), min_size=1, max_size=4))
def test_a_split_covers_every_document_once_in_its_shares(num_documents: int, shares: list[float]) -> None:
    total = sum(shares)
    parts = split_documents(num_documents, tuple(share / total for share in shares))
    assert [part[0] for part in parts] == [0, *(part[1] for part in parts[:-1])]
    assert parts[-1][1] == num_documents
    for (first, behind), share in zip(parts, shares, strict=True):
        assert abs(behind - first - share / total * num_documents) <= 1


@given(size=st.integers(1, 3000), epoch=st.integers(0, 1 << 40), seed=st.integers(0, 1 << 62))
def test_an_epoch_is_a_permutation(size: int, epoch: int, seed: int) -> None:
    assert np.array_equal(np.sort(epoch_order(epoch, np.arange(size), seed, size)), np.arange(size))


def test_an_order_is_a_function_of_seed_epoch_source_and_place_alone() -> None:
    size = 1000
    order = epoch_order(3, np.arange(size), 7, size)
    assert np.array_equal(order, epoch_order(3, np.arange(size), 7, size))
    assert order[123] == epoch_order(3, np.array([123]), 7, size)[0]
    mixed = epoch_order(np.array([3, 4]), np.array([5, 5]), 7, size)
    assert mixed.tolist() == [order[5], epoch_order(4, np.array([5]), 7, size)[0]]
    for other in (
        epoch_order(4, np.arange(size), 7, size),
        epoch_order(3, np.arange(size), 8, size),
        epoch_order(3, np.arange(size), 7, size, source=1),
    ):
        assert (order == other).mean() < 0.02


def test_orders_look_uniform() -> None:
    size, epochs = 23, 20_000
    places = epoch_order(np.arange(epochs), np.full(epochs, 11), 1, size)
    assert _chi_square(np.bincount(places, minlength=size)) < 2.5  # 22 degrees: more spread
    # Pairs of neighbours, over all ordered pairs of different samples.
    after = epoch_order(np.arange(epochs), np.full(epochs, 12), 1, size)
    pairs = np.bincount(places * size + after, minlength=size * size).reshape(size, size)
    assert _chi_square(pairs[~np.eye(size, dtype=bool)]) < CHI_SQUARE_BOUND


def test_a_long_order_has_no_runs_and_no_trend() -> None:
    size = 200_000
    order = epoch_order(0, np.arange(size), 1, size)
    steps = np.diff(order)
    assert (np.abs(steps) <= 10).mean() < 3e-4  # 1e-4 by chance
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.01
    blocks = np.histogram2d(order, np.arange(size), bins=23)[0].ravel()
    assert _chi_square(blocks) < CHI_SQUARE_BOUND


def _chi_square(counts: np.ndarray) -> float:
    expected = counts.mean()
    return float((((counts - expected) ** 2) / expected).sum() / (counts.size - 1))
