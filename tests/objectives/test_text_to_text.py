from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.config.lengths import SampleLengths
from lmscale.config.objective import TextToTextConfig
from lmscale.data.examples import Examples
from lmscale.data.part import Part
from lmscale.errors import DataError
from lmscale.objectives.base import Arrays, Vocabulary
from lmscale.objectives.text_to_text import TextToText
from tests.data.corpora import write_pairs, write_sentences
from tests.objectives.rows import EOS, PAD, assert_as_the_contract_says, small_vocabulary

LENGTHS = SampleLengths(24, 16, 8, 8)
TEXT = st.lists(st.integers(11, 99), min_size=1, max_size=7)
Pairs = list[tuple[list[int], list[int]]]


def source_of(prefix: Path, pairs: Pairs, packed: bool = True, eos_id: int | None = EOS) -> Examples:
    return Examples(Part(write_pairs(prefix, pairs, eos_id)), LENGTHS, packed)


def batch_of(source: Examples, packed: bool = True) -> Arrays:
    numbers = np.arange(source.num_samples())
    keys = np.stack([0 * numbers, 0 * numbers, 0 * numbers, numbers], axis=1)
    return TextToText(TextToTextConfig(packed=packed), LENGTHS, small_vocabulary()).make_batch(source.read(keys))


def test_examples_share_a_row_and_do_not_see_each_other(tmp_path: Path) -> None:
    batch = batch_of(source_of(tmp_path / "c", [([11, 12], [13]), ([14], [15, 16])]))
    assert batch["tokens"].tolist() == [[11, 12, EOS, 14, EOS] + [PAD] * 11]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 1, 1] + [-1] * 11]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1] + [0] * 11]
    assert batch["labels"].tolist() == [[13, EOS, 15, 16, EOS, PAD, PAD, PAD]]
    assert batch["decoder_tokens"].tolist() == [[PAD, 13, PAD, 15, 16, PAD, PAD, PAD]]
    assert batch["decoder_document_ids"].tolist() == [[0, 0, 1, 1, 1, -1, -1, -1]]
    assert batch["decoder_positions"].tolist() == [[0, 1, 0, 1, 2, 0, 0, 0]]
    assert batch["loss_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]]
    assert_as_the_contract_says(batch, set(batch), {"s": 16, "d": 8, "l": 8}, 1)


def test_without_packing_each_example_has_a_row(tmp_path: Path) -> None:
    batch = batch_of(source_of(tmp_path / "c", [([11, 12], [13]), ([14], [15, 16])], packed=False), packed=False)
    assert batch["tokens"][:, :3].tolist() == [[11, 12, EOS], [14, EOS, PAD]]
    assert batch["labels"][:, :3].tolist() == [[13, EOS, PAD], [15, 16, EOS]]
    assert "positions" not in batch
    assert "decoder_positions" not in batch


def test_long_examples_are_cut_and_keep_their_ends(tmp_path: Path) -> None:
    batch = batch_of(source_of(tmp_path / "c", [(list(range(20, 60)), list(range(60, 90)))]))
    assert batch["tokens"].tolist() == [[*range(20, 35), EOS]]
    assert batch["labels"].tolist() == [[*range(60, 67), EOS]]


def test_an_example_that_lacks_its_input_or_its_target_is_left_out(tmp_path: Path) -> None:
    batch = batch_of(source_of(tmp_path / "c", [([], [13]), ([11], [12]), ([14], [])]))
    assert batch["tokens"].tolist() == [[11, EOS] + [PAD] * 14]
    assert batch["labels"].tolist() == [[12, EOS] + [PAD] * 6]


def rows_one_by_one(sizes: list[tuple[int, int]]) -> list[list[int]]:
    rows: list[list[int]] = []
    for number, (inputs, targets) in enumerate(sizes):
        used = [sum(sizes[other][side] for other in rows[-1]) for side in (0, 1)] if rows else [16, 8]
        if used[0] + inputs > 16 or used[1] + targets > 8:
            rows.append([])
        rows[-1].append(number)
    return rows


@given(pairs=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=30), has_ends=st.booleans())
@settings(max_examples=60, deadline=None)
def test_packing_loses_nothing_and_keeps_the_order(pairs: Pairs, has_ends: bool) -> None:
    with TemporaryDirectory() as directory:
        batch = batch_of(source_of(Path(directory) / "c", pairs, eos_id=EOS if has_ends else None))
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


def test_samples_in_any_order_are_the_same(tmp_path: Path) -> None:
    pairs = [(list(range(11, 11 + n % 7 + 1)), [50 + n]) for n in range(20)]
    source = source_of(tmp_path / "c", pairs)
    keys = np.array([[0, 0, 0, number] for number in range(source.num_samples())])
    assert len(keys) > 3
    whole, turned = source.read(keys), source.read(keys[::-1])
    assert (whole.tokens == turned.tokens[::-1]).all()
    assert (whole.is_target == turned.is_target[::-1]).all()


def test_a_corpus_of_sentences_is_refused(tmp_path: Path) -> None:
    corpus = write_sentences(tmp_path / "c", [[[11], [12], [13]]])
    with pytest.raises(DataError, match=r"not pairs of an input and a target.*lmscale tokenize --pair"):
        Examples(Part(corpus), LENGTHS, True)


def test_pairs_are_no_sentences(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not divided into sentences"):
        Part(write_pairs(tmp_path / "c", [([11], [12])], EOS)).check_sentences("objective bert")


def test_pairs_without_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no text in 1 documents"):
        source_of(tmp_path / "c", [([], [12])])


def test_a_document_of_three_sequences_is_no_pair(tmp_path: Path) -> None:
    corpus = write_sentences(tmp_path / "c", [[[11], [12]], [[13], [14], [15]]], EOS, division="pairs")
    with pytest.raises(DataError, match="not pairs of an input and a target"):
        Examples(Part(corpus), LENGTHS, True)


def test_a_tokenizer_without_ends_is_refused() -> None:
    with pytest.raises(DataError, match=r"token for the end of a text.*text_to_text"):
        TextToText(TextToTextConfig(), LENGTHS, Vocabulary(100, pad_id=0))
