from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lmscale.data.blend import Blend
from lmscale.data.windows import Windows
from lmscale.errors import DataError
from lmscale.feed.dataset import SampleDataset, in_order
from lmscale.objectives.base import Arrays, Samples
from lmscale.objectives.causal_lm import CausalLM
from tests.data.corpora import keys_of, random_documents, write_corpus


@pytest.fixture
def blend(tmp_path: Path) -> Blend:
    return Blend([Windows(write_corpus(tmp_path / n, random_documents(20)), None, 16) for n in "ab"], [1, 1], 0)


def test_the_objective_is_given_what_names_each_sample(blend: Blend) -> None:
    seen: list[Samples] = []

    class Spy(CausalLM):
        def make_batch(self, samples: Samples) -> Arrays:
            seen.append(samples)
            return super().make_batch(samples)

    indices = np.array([0, 5, 301])
    SampleDataset(blend, blend.locate, Spy(), 1000).arrays(indices)
    located = blend.locate(indices)
    seeds = np.full(3, blend.seed)
    assert seen[0].keys.tolist() == np.stack([seeds, located.source, located.epoch, located.number], 1).tolist()
    assert seen[0].document_ids is None


def test_rows_that_fill_a_batch_do_not_count(blend: Blend) -> None:
    arrays = SampleDataset(blend, in_order, CausalLM(), 1000).arrays(np.array([3, -1]))
    assert np.array_equal(arrays["tokens"][0], blend.sources[0].read(keys_of([3])).tokens[0, :-1])
    assert arrays["loss_mask"][0].sum() > 0
    assert arrays["loss_mask"][1].sum() == 0


def test_a_token_outside_the_vocabulary_names_its_corpus(tmp_path: Path) -> None:
    documents = [[1] * 50, [1] * 20 + [777] + [1] * 20]
    blend = Blend([Windows(write_corpus(tmp_path / "c", documents), None, 8)], [1], 0)
    dataset = SampleDataset(blend, in_order, CausalLM(), 777)
    dataset.arrays(np.arange(3))
    with pytest.raises(DataError, match=r"token 777 is outside model\.vocab_size = 777") as caught:
        dataset.arrays(np.arange(10))
    assert caught.value.field == str(tmp_path / "c")
