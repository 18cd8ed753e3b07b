from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmscale.data.blend import Blend
from lmscale.data.windows import Windows
from tests.data.corpora import random_documents, write_corpus

SHARE_ROUNDING = 1e-5
"""Shares are kept to 32 bits: over 2,000 samples, some 1e-6 of a sample."""

WEIGHTS = st.lists(st.floats(0.01, 10), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> list[Windows]:
    directory = tmp_path_factory.mktemp("blend")
    return [
        Windows(write_corpus(directory / str(number), random_documents(10 + 5 * number, seed=number)), None, 8)
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
    for name in ("source", "epoch", "window"):
        alone = [int(getattr(blend.locate(np.array([start + i])), name)[0]) for i in range(20)]
        assert getattr(together, name).tolist() == alone


def test_each_source_goes_through_its_own_epochs(windows: list[Windows]) -> None:
    blend = Blend(windows[:3], [0.2, 0.5, 0.3], 1)
    located = blend.locate(np.arange(1000))
    for number, source in enumerate(windows[:3]):
        chosen = located.source == number
        epoch, window = located.epoch[chosen], located.window[chosen]
        assert (np.diff(epoch) >= 0).all()
        assert epoch[-1] > 1
        for each in range(epoch[-1]):
            assert sorted(window[epoch == each]) == list(range(len(source)))
        assert window[epoch == 0].tolist() != window[epoch == 1].tolist()


def test_tokens_and_documents_are_of_the_located_windows(windows: list[Windows]) -> None:
    blend = Blend(windows[:3], [1, 2, 3], 1)
    located = blend.locate(np.arange(50))
    tokens, ids = blend.read(located), blend.document_ids(located)
    for row in range(50):
        source, window = windows[located.source[row]], located.window[row : row + 1]
        assert np.array_equal(tokens[row], source.read(window)[0])
        assert np.array_equal(ids[row], source.document_ids(window)[0])


def test_equal_corpora_are_not_shuffled_alike(tmp_path: Path) -> None:
    same = [Windows(write_corpus(tmp_path / name, random_documents(50)), None, 8) for name in "ab"]
    located = Blend(same, [1, 1], 0).locate(np.arange(200))
    assert located.window[located.source == 0].tolist() != located.window[located.source == 1].tolist()
