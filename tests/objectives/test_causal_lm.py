from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lmscale.batch import FIELDS
from lmscale.data.samples import Samples
from lmscale.objectives.causal_lm import CausalLM, restarting_positions
from tests.objectives.rows import assert_rows_stand_alone, make_samples, within_three_sigma

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


def test_what_follows_a_prefix_is_predicted_from_its_last_token_on() -> None:
    samples = make_samples(4000, 9)
    batch, plain = CausalLM(prefix_lm=True).make_batch(samples), CausalLM().make_batch(samples)
    assert (batch["tokens"] == plain["tokens"]).all()
    assert (batch["labels"] == plain["labels"]).all()
    sizes = batch["is_prefix"].sum(axis=1)
    for size in range(8):  # 0 .. s - 1
        assert within_three_sigma(int((sizes == size).sum()), 4000, 1 / 8)
    assert (batch["is_prefix"] == (np.arange(8) < sizes[:, None])).all()
    assert (batch["loss_mask"] == (np.arange(8) >= sizes[:, None] - 1)).all()
    assert batch["is_prefix"].dtype == np.int64


def test_prefixes_leave_the_borders_of_documents_as_they_are() -> None:
    windows, ids = np.arange(70).reshape(10, 7), np.tile([0, 0, 0, 1, 1, 1, 2], (10, 1))
    samples = Samples(windows, np.full(10, 7), ids, np.arange(40).reshape(10, 4))
    batch, plain = CausalLM(prefix_lm=True).make_batch(samples), CausalLM().make_batch(samples)
    for name in ("document_ids", "positions"):
        assert (batch[name] == plain[name]).all()
    is_behind = np.arange(6) >= batch["is_prefix"].sum(axis=1, keepdims=True) - 1
    assert (batch["loss_mask"] == plain["loss_mask"] * is_behind).all()


def test_a_prefix_does_not_depend_on_its_batch_and_differs_between_epochs() -> None:
    objective = CausalLM(prefix_lm=True)
    assert_rows_stand_alone(objective, make_samples(6, 30))
    first, second = (objective.make_batch(make_samples(20, 30, epoch=epoch))["is_prefix"] for epoch in (0, 1))
    assert (first != second).any()
