from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lmscale.batch import FIELDS
from lmscale.data.samples import Samples
from lmscale.objectives.causal_lm import CausalLM, restarting_positions

KEYS = np.zeros((1, 4), np.int64)


def test_each_token_is_asked_for_the_next() -> None:
    batch = CausalLM().make_batch(Samples(np.array([[5, 6, 7, 8]]), np.array([4]), None, KEYS))
    assert batch["tokens"].tolist() == [[5, 6, 7]]
    assert batch["labels"].tolist() == [[6, 7, 8]]
    assert batch["loss_mask"].tolist() == [[1, 1, 1]]
    assert set(batch) == {"tokens", "labels", "loss_mask"}


def test_isolated_documents_have_their_own_positions_and_no_label_across_a_border() -> None:
    windows, ids = np.array([[5, 6, 9, 7, 8, 9, 4]]), np.array([[0, 0, 0, 1, 1, 1, 2]])
    batch = CausalLM().make_batch(Samples(windows, np.array([windows.shape[1]]), ids, KEYS))
    assert batch["document_ids"].tolist() == [[0, 0, 0, 1, 1, 1]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1, 2]]
    # The document end, 9, is a label; the first token behind it is not.
    assert batch["loss_mask"].tolist() == [[1, 1, 0, 1, 1, 0]]


def test_arrays_are_named_and_typed_as_the_contract_says() -> None:
    windows = np.arange(10).reshape(2, 5)
    batch = CausalLM().make_batch(
        Samples(windows, np.full(2, 5), np.zeros((2, 5), np.int64), np.zeros((2, 4), np.int64))
    )
    fields = {field.name: field for field in FIELDS}
    for name, array in batch.items():
        assert array.dtype == fields[name].dtype
        assert array.shape == (2, 4)


@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_positions_restart_at_every_document(lengths: list[int]) -> None:
    ids = np.repeat(np.arange(len(lengths)), lengths)[None]
    assert restarting_positions(ids)[0].tolist() == [place for length in lengths for place in range(length)]
