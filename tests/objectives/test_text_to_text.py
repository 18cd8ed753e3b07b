from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.config.lengths import SampleLengths
from lmscale.errors import DataError
from lmscale.objectives.text_to_text import pack_examples, text_to_text
from tests.objectives.rows import EOS, PAD, assert_as_the_contract_says, small_vocabulary

LENGTHS = SampleLengths(16, 16, 8, 8)
TEXT = st.lists(st.integers(11, 99), max_size=7)


def test_a_prefix_stands_before_the_input_and_ends_close_both() -> None:
    examples = text_to_text([([11], [12, 13], [14]), ([11], [15], [16, 17])], LENGTHS, small_vocabulary())
    assert examples.inputs.tolist() == [[11, 12, 13, EOS], [11, 15, EOS, 0]]
    assert examples.targets.tolist() == [[14, EOS, 0], [16, 17, EOS]]
    assert examples.input_lengths.tolist() == [4, 3]
    assert examples.target_lengths.tolist() == [2, 3]


def test_long_examples_are_cut_and_keep_their_ends() -> None:
    examples = text_to_text([([11], list(range(20, 60)), list(range(60, 90)))], LENGTHS, small_vocabulary())
    assert examples.inputs.tolist() == [[11, *range(20, 34), EOS]]
    assert examples.targets.tolist() == [[*range(60, 67), EOS]]


def test_examples_share_a_row_and_do_not_see_each_other() -> None:
    examples = text_to_text([([], [11, 12], [13]), ([], [14], [15, 16])], LENGTHS, small_vocabulary())
    batch = pack_examples(examples, LENGTHS, small_vocabulary())
    assert batch["tokens"].tolist() == [[11, 12, EOS, 14, EOS] + [PAD] * 11]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 1, 1] + [-1] * 11]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1] + [0] * 11]
    assert batch["labels"].tolist() == [[13, EOS, 15, 16, EOS, PAD, PAD, PAD]]
    assert batch["decoder_tokens"].tolist() == [[PAD, 13, PAD, 15, 16, PAD, PAD, PAD]]
    assert batch["decoder_document_ids"].tolist() == [[0, 0, 1, 1, 1, -1, -1, -1]]
    assert batch["decoder_positions"].tolist() == [[0, 1, 0, 1, 2, 0, 0, 0]]
    assert batch["loss_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]]
    assert_as_the_contract_says(batch, set(batch), {"s": 16, "d": 8, "l": 8}, 1)


def rows_one_by_one(sizes: list[tuple[int, int]]) -> list[list[int]]:
    rows: list[list[int]] = []
    for number, (inputs, targets) in enumerate(sizes):
        used = [sum(sizes[other][side] for other in rows[-1]) for side in (0, 1)] if rows else [16, 8]
        if used[0] + inputs > 16 or used[1] + targets > 8:
            rows.append([])
        rows[-1].append(number)
    return rows


@given(pairs=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_packing_loses_nothing_and_keeps_the_order(pairs: list[tuple[list[int], list[int]]]) -> None:
    examples = text_to_text([([], inputs, targets) for inputs, targets in pairs], LENGTHS, small_vocabulary())
    batch = pack_examples(examples, LENGTHS, small_vocabulary())
    sizes = [(len(inputs) + 1, len(targets) + 1) for inputs, targets in pairs]
    rows = rows_one_by_one(sizes)
    assert len(batch["tokens"]) == len(rows)
    for row, numbers in enumerate(rows):
        for segment, number in enumerate(numbers):
            inside = batch["document_ids"][row] == segment
            assert batch["tokens"][row][inside].tolist() == [*pairs[number][0], EOS]
            assert batch["positions"][row][inside].tolist() == list(range(inside.sum()))
            inside = batch["decoder_document_ids"][row] == segment
            assert batch["labels"][row][inside].tolist() == [*pairs[number][1], EOS]
            assert batch["decoder_tokens"][row][inside].tolist() == [PAD, *pairs[number][1]]
            assert batch["decoder_positions"][row][inside].tolist() == list(range(inside.sum()))
        assert batch["document_ids"][row].max() == len(numbers) - 1
        ids = batch["document_ids"][row]
        assert (np.sort(ids[ids >= 0]) == ids[ids >= 0]).all()


def test_no_examples_make_no_rows() -> None:
    batch = pack_examples(text_to_text([], LENGTHS, small_vocabulary()), LENGTHS, small_vocabulary())
    assert batch["tokens"].shape == (0, 16)
    assert batch["labels"].shape == (0, 8)


def test_an_example_longer_than_a_row_is_refused() -> None:
    examples = text_to_text([([], [11] * 7, [12] * 7)], LENGTHS, small_vocabulary())
    with pytest.raises(DataError, match=r"data.decoder_seq_length = 4: is shorter than an example of 8 tokens"):
        pack_examples(examples, dataclasses.replace(LENGTHS, decoder=4), small_vocabulary())
