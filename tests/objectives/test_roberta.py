from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lmscale.config.lengths import SampleLengths
from lmscale.config.objective import RobertaConfig
from lmscale.data.samples import Samples
from lmscale.errors import DataError
from lmscale.objectives.base import Vocabulary
from lmscale.objectives.roberta import Roberta
from tests.objectives.rows import (
    BEHIND_TEXT,
    BOS,
    EOS,
    FIRST_TEXT,
    MASK,
    PAD,
    assert_as_the_contract_says,
    assert_rows_stand_alone,
    lengths_of,
    make_samples,
    small_vocabulary,
    within_three_sigma,
)

S = 512


def build(config: RobertaConfig | None = None, length: int = S) -> tuple[Roberta, SampleLengths]:
    config = config or RobertaConfig()
    lengths = lengths_of(config, length)
    return Roberta(config, lengths, small_vocabulary()), lengths


def test_a_text_stands_between_its_ends_and_comes_back_from_the_labels() -> None:
    objective, lengths = build(length=16)
    samples = make_samples([1, 5, 14], lengths.raw)
    batch = objective.make_batch(samples)
    tokens = batch["tokens"].copy()
    rows, places = np.nonzero(batch["loss_mask"])
    tokens[rows, batch["masked_positions"][rows, places]] = batch["labels"][rows, places]
    for row, size in enumerate([1, 5, 14]):
        text = samples.tokens[row, :size].tolist()
        assert tokens[row].tolist() == [BOS, *text, EOS, *[PAD] * (14 - size)]
        assert batch["document_ids"][row].tolist() == [0] * (size + 2) + [-1] * (14 - size)


def test_arrays_are_named_and_typed_as_the_contract_says() -> None:
    objective, lengths = build()
    names = {"tokens", "document_ids", "masked_positions", "labels", "loss_mask"}
    batch = objective.make_batch(make_samples(4, lengths.raw))
    assert_as_the_contract_says(batch, names, {"s": S, "l": lengths.labels}, 4)


def test_the_number_of_predictions_is_the_share_in_the_mean() -> None:
    objective, lengths = build()
    counts = objective.make_batch(make_samples(2000, lengths.raw))["loss_mask"].sum(axis=1)
    # 0.15 x 512 = 76.8: 77 for four samples in five, else 76.
    assert set(counts.tolist()) == {76, 77}
    assert within_three_sigma(int((counts == 77).sum()), 2000, 0.8)


def test_the_ends_are_predicted_as_often_as_other_tokens() -> None:
    objective, lengths = build(length=32)
    batch = objective.make_batch(make_samples(4000, lengths.raw))
    labels = batch["labels"][batch["loss_mask"] > 0]
    for end in (BOS, EOS):
        assert within_three_sigma(int((labels == end).sum()), 4000, 0.15)


@pytest.mark.parametrize(("kept", "random"), [(0.1, 0.1), (0.0, 0.3), (0.25, 0.0), (0.0, 0.0)])
def test_masks_kept_and_random_tokens_have_their_shares(kept: float, random: float) -> None:
    objective, lengths = build(RobertaConfig(kept_share=kept, random_share=random))
    batch = objective.make_batch(make_samples(200, lengths.raw))
    is_used = batch["loss_mask"] > 0
    labels, total = batch["labels"][is_used], int(is_used.sum())
    read = np.take_along_axis(batch["tokens"], batch["masked_positions"], axis=1)[is_used]
    # A random token can be the one that it replaces.
    changed = random * (1 - 1 / (BEHIND_TEXT - FIRST_TEXT))
    assert within_three_sigma(int((read == MASK).sum()), total, 1 - kept - random)
    is_random = (read != MASK) & (read != labels)
    assert within_three_sigma(int(is_random.sum()), total, changed)
    # Never a special one.
    assert ((read[is_random] >= FIRST_TEXT) & (read[is_random] < BEHIND_TEXT)).all()


def test_masks_differ_between_epochs_and_seeds() -> None:
    objective, lengths = build()
    plain, epoch, seed = (
        objective.make_batch(make_samples(8, lengths.raw, **which))["masked_positions"]
        for which in ({}, {"epoch": 1}, {"seed": 1})
    )
    for row in range(8):
        assert (plain[row] != epoch[row]).any()
        assert (plain[row] != seed[row]).any()


def test_whole_words_are_masked_or_left() -> None:
    objective, lengths = build(RobertaConfig(whole_words=True, kept_share=0, random_share=0), 64)
    samples = make_samples(200, lengths.raw)
    tokens = objective.make_batch(samples)["tokens"]
    is_masked = tokens[:, 1:-1] == MASK
    continues = samples.tokens[:, 1:] % 2 == 1
    assert (is_masked[:, 1:] == is_masked[:, :-1])[continues].all()
    assert abs((tokens == MASK).mean() - 0.15) < 0.01


@pytest.mark.parametrize("whole_words", [False, True])
def test_a_sample_does_not_depend_on_its_batch(whole_words: bool) -> None:
    objective, lengths = build(RobertaConfig(whole_words=whole_words), 64)
    assert_rows_stand_alone(objective, make_samples([1, 2, 9, 33, 62], lengths.raw))


def test_a_text_of_special_tokens_is_masked_like_any_other() -> None:
    objective, _ = build(length=32)
    samples = Samples(np.full((9, 30), EOS), np.full(9, 30), None, np.arange(36).reshape(9, 4))
    batch = objective.make_batch(samples)
    assert set(batch["loss_mask"].sum(axis=1).tolist()) <= {4, 5}


def test_a_vocabulary_without_text_has_no_random_tokens_to_draw() -> None:
    lengths = SampleLengths(9, 12, 0, 2)
    special = Vocabulary(4, pad_id=0, bos_id=1, eos_id=2, mask_id=3, special_ids=np.arange(4))
    with pytest.raises(DataError, match="special tokens only"):
        Roberta(RobertaConfig(), lengths, special)
    Roberta(RobertaConfig(random_share=0), lengths, special)


def test_a_tokenizer_without_the_special_tokens_is_refused_in_one_line() -> None:
    bare = dataclasses.replace(small_vocabulary(), bos_id=None, mask_id=None)
    with pytest.raises(DataError, match=r"tokenizer: has no mask token and no .*begin of a text, .* roberta needs"):
        Roberta(RobertaConfig(), SampleLengths(9, 12, 0, 2), bare)
