from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmscale.data.blend import Blend
from lmscale.data.pairs import SentencePairs
from lmscale.data.part import Part
from lmscale.data.windows import Windows
from tests.data.corpora import random_documents, random_sentences, write_corpus, write_sentences

SHARE_ROUNDING = 1e-5
"""Shares are kept to 32 bits: over 2,000 samples, some 1e-6 of a sample."""

WEIGHTS = st.lists(st.floats(0.01, 10), min_size=1, max_size=6)


GOLDEN = {
    "source": [1, 0, 1, 2, 1, 0, 2, 1],
    "epoch": [0, 0, 0, 0, 0, 0, 0, 9666036289],
    "number": [5, 29, 1, 53, 22, 16, 70, 5],
}
"""Where samples were found before sources had epochs of their own sizes: a run that is resumed finds them there."""


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> list[Windows]:
    directory = tmp_path_factory.mktemp("blend")
    return [
        Windows(
            write_corpus(directory / str(number), random_documents(10 + 5 * number, seed=number)), None, 8, isolate=True
        )
        for number in range(6)
    ]


@given(weights=WEIGHTS)
def test_shares_are_exact_after_every_sample(windows: list[Windows], weights: list[float]) -> None:
    samples = np.arange(2000)
    source = Blend(windows[: len(weights)], weights, 0).locate(samples).source
    bound = math.ceil(math.log2(len(weights))) / 2 + SHARE_ROUNDING
    for number, weight in enumerate(weights):
        counts = np.cumsum(source == number)
        assert (np.abs(counts - (samples + 1) * weight / sum(weights)) <= bound).all()


@given(weights=WEIGHTS, start=st.integers(0, 1 << 45))
def test_a_sample_is_found_alone_where_it_is_found_among_others(
    windows: list[Windows], weights: list[float], start: int
) -> None:
    blend = Blend(windows[: len(weights)], weights, 0)
    together = blend.locate(np.arange(start, start + 20))
    for name in ("source", "epoch", "number"):
        alone = [int(getattr(blend.locate(np.array([start + i])), name)[0]) for i in range(20)]
        assert getattr(together, name).tolist() == alone


def test_each_source_goes_through_its_own_epochs(windows: list[Windows]) -> None:
    blend = Blend(windows[:3], [0.2, 0.5, 0.3], 1)
    located = blend.locate(np.arange(1000))
    for number, source in enumerate(windows[:3]):
        chosen = located.source == number
        epoch, window = located.epoch[chosen], located.number[chosen]
        assert (np.diff(epoch) >= 0).all()
        assert epoch[-1] > 1
        for each in range(epoch[-1]):
            assert sorted(window[epoch == each]) == list(range(source.num_samples()))
        assert window[epoch == 0].tolist() != window[epoch == 1].tolist()


def test_tokens_and_documents_are_of_the_located_windows(windows: list[Windows]) -> None:
    blend = Blend(windows[:3], [1, 2, 3], 1)
    located = blend.locate(np.arange(50))
    samples = blend.read(located)
    names = np.stack([np.ones(50, np.int64), located.source, located.epoch, located.number], axis=1)
    assert np.array_equal(samples.keys, names)
    for row in range(50):
        alone = windows[located.source[row]].read(names[row : row + 1])
        assert np.array_equal(samples.tokens[row], alone.tokens[0])
        assert samples.lengths[row] == alone.lengths[0]
        assert samples.document_ids is not None
        assert alone.document_ids is not None
        assert np.array_equal(samples.document_ids[row], alone.document_ids[0])


def test_equal_corpora_are_not_shuffled_alike(tmp_path: Path) -> None:
    same = [Windows(write_corpus(tmp_path / name, random_documents(50)), None, 8) for name in "ab"]
    located = Blend(same, [1, 1], 0).locate(np.arange(200))
    assert located.number[located.source == 0].tolist() != located.number[located.source == 1].tolist()


def test_the_order_is_that_of_former_versions(windows: list[Windows]) -> None:
    located = Blend(windows[:3], [1, 2, 0.5], 7).locate(np.array([0, 1, 2, 3, 4, 5, 500, 1 << 40]))
    assert located.source.tolist() == GOLDEN["source"]
    assert located.epoch.tolist() == GOLDEN["epoch"]
    assert located.number.tolist() == GOLDEN["number"]


@pytest.mark.parametrize("copies", [0, 3])
def test_sources_whose_epochs_differ_in_size_go_through_each_of_them(tmp_path: Path, copies: int) -> None:
    def build() -> Blend:
        parts = [Part(write_sentences(tmp_path / name, random_sentences(20, seed))) for seed, name in enumerate("ab")]
        return Blend([SentencePairs(part, 20, 0.1, copies, 1, n) for n, part in enumerate(parts)], [1, 3], 1)

    blend, samples = build(), np.arange(2000)
    located = blend.locate(samples)
    for number, source in enumerate(blend.sources):
        chosen = located.source == number
        epoch, place = located.epoch[chosen], located.number[chosen]
        assert (np.diff(epoch) >= 0).all()
        assert epoch[-1] > 4
        for each in range(epoch[-1]):
            assert sorted(place[epoch == each]) == list(range(source.num_samples(each)))
    # In the middle, and out of order, the same is found.
    for start in (1990, 777):
        alone = build().locate(samples[start : start + 10])
        assert alone.epoch.tolist() == located.epoch[start : start + 10].tolist()
        assert alone.number.tolist() == located.number[start : start + 10].tolist()
    read, keys = blend.read(located), np.stack([located.source, located.epoch, located.number], axis=1)
    assert read.is_random_next is not None
    if copies:
        keys[:, 1] %= copies
    assert np.array_equal(read.keys[:, 1:], keys)
    row = blend.sources[1].read(np.array([[1, *keys[1999]]])) if located.source[1999] else None
    assert row is None or np.array_equal(row.tokens[0], read.tokens[1999])
