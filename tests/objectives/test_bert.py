from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from lmscale.config.lengths import SampleLengths
from lmscale.config.objective import BertConfig
from lmscale.data.samples import Samples
from lmscale.errors import DataError
from lmscale.objectives.base import Arrays, Vocabulary
from lmscale.objectives.bert import NEXT_SENTENCE_FOLLOWS, NEXT_SENTENCE_IS_RANDOM, Bert
from lmscale.objectives.masking import choose_groups
from tests.objectives.rows import (
    CLS,
    MASK,
    PAD,
    SEP,
    VOCAB_SIZE,
    assert_as_the_contract_says,
    assert_rows_stand_alone,
    lengths_of,
    make_pairs,
    small_vocabulary,
    within_three_sigma,
)

S = 128


def build(config: BertConfig | None = None, length: int = S) -> tuple[Bert, SampleLengths]:
    config = config or BertConfig()
    lengths = lengths_of(config, length)
    return Bert(config, lengths, small_vocabulary()), lengths


def originals(batch: Arrays) -> np.ndarray:
    """The tokens before they were masked, put together from the labels."""
    tokens = batch["tokens"].copy()
    rows, places = np.nonzero(batch["loss_mask"])
    tokens[rows, batch["masked_positions"][rows, places]] = batch["labels"][rows, places]
    return tokens


def test_a_pair_is_joined_by_special_tokens_as_in_the_original() -> None:
    objective, _ = build(BertConfig(max_predictions=1), 12)
    samples = Samples(
        np.array([[11, 12, 13, 14, 15, 0, 0, 0, 0]]),
        np.array([5]),
        None,
        np.zeros((1, 4), np.int64),
        np.array([2]),
        np.array([True]),
    )
    batch = objective.make_batch(samples)
    assert originals(batch)[0].tolist() == [CLS, 11, 12, SEP, 13, 14, 15, SEP, PAD, PAD, PAD, PAD]
    assert batch["token_types"][0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]
    assert batch["document_ids"][0].tolist() == [0] * 8 + [-1] * 4


def test_arrays_are_named_and_typed_as_the_contract_says() -> None:
    objective, lengths = build()
    names = {
        "tokens",
        "token_types",
        "document_ids",
        "masked_positions",
        "labels",
        "loss_mask",
        "is_random_next",
    }
    batch = objective.make_batch(make_pairs(4, lengths.raw))
    assert_as_the_contract_says(batch, names, {"s": S, "l": lengths.labels}, 4)


def test_as_many_tokens_are_predicted_as_pythons_rounding_says() -> None:
    sizes = list(range(2, S - 2))
    objective, lengths = build(BertConfig(max_predictions=15))
    batch = objective.make_batch(make_pairs(sizes, lengths.raw))
    wanted = [min(15, max(1, round((size + 3) * 0.15))) for size in sizes]
    assert batch["loss_mask"].sum(axis=1).tolist() == wanted
    # 10 tokens at 15 % are 1.5, 30 are 4.5: halves go to the even number.
    assert (wanted[10 - 3 - 2], wanted[30 - 3 - 2]) == (2, 4)


def test_no_special_token_is_predicted_and_positions_rise() -> None:
    objective, lengths = build()
    batch = objective.make_batch(make_pairs(200, lengths.raw))
    is_used = batch["loss_mask"] > 0
    assert not np.isin(batch["labels"][is_used], [CLS, SEP, PAD]).any()
    rows, _ = np.nonzero(is_used)
    steps = np.diff(batch["masked_positions"][is_used])
    assert (steps[rows[1:] == rows[:-1]] > 0).all()
    for name in ("masked_positions", "labels"):
        assert (batch[name][~is_used] == 0).all()


def test_of_the_predicted_tokens_80_in_100_are_masks_10_kept_10_random() -> None:
    objective, lengths = build(length=512)
    batch = objective.make_batch(make_pairs(250, lengths.raw))
    is_used = batch["loss_mask"] > 0
    labels = batch["labels"][is_used]
    read = np.take_along_axis(batch["tokens"], batch["masked_positions"], axis=1)[is_used]
    total = len(labels)
    assert within_three_sigma(int((read == MASK).sum()), total, 0.8 + 0.1 / VOCAB_SIZE)
    assert within_three_sigma(int((read == labels).sum()), total, 0.1 + 0.1 / VOCAB_SIZE)
    others = read[(read != MASK) & (read != labels)]
    assert within_three_sigma(len(others), total, 0.1)
    # Of the whole vocabulary, special ids too, equally: a tenth of it each time.
    for tenth in range(10):
        assert within_three_sigma(int((others * 10 // VOCAB_SIZE == tenth).sum()), len(others), 0.1)


def test_whole_words_are_masked_or_left_and_the_budget_holds() -> None:
    objective, lengths = build(BertConfig(whole_words=True, max_predictions=19))
    samples = make_pairs(100, lengths.raw)
    batch = objective.make_batch(samples)
    tokens = originals(batch)
    is_chosen = np.zeros(tokens.shape, bool)
    rows, places = np.nonzero(batch["loss_mask"])
    is_chosen[rows, batch["masked_positions"][rows, places]] = True
    assert batch["loss_mask"].sum() > 100 * 18
    first = samples.first_lengths
    assert first is not None
    for row in range(100):
        # Without the special tokens a word that B continues hangs together.
        text = [place for place in range(S) if tokens[row, place] not in (CLS, SEP, PAD)]
        for before, here in itertools.pairwise(text):
            if tokens[row, here] % 2 == 1:
                assert is_chosen[row, here] == is_chosen[row, before]


def test_the_next_sentence_label_is_1_for_a_random_one() -> None:
    objective, lengths = build()
    samples = make_pairs(50, lengths.raw)
    batch = objective.make_batch(samples)
    assert samples.is_random_next is not None
    assert (NEXT_SENTENCE_IS_RANDOM, NEXT_SENTENCE_FOLLOWS) == (1, 0)
    assert batch["is_random_next"].tolist() == [1 if is_random else 0 for is_random in samples.is_random_next]


def test_masks_differ_between_epochs_unless_copies_are_static() -> None:
    for copies, same in ((0, False), (2, True)):
        objective, lengths = build(BertConfig(static_copies=copies))
        batches = [objective.make_batch(make_pairs(8, lengths.raw, epoch=epoch)) for epoch in (0, 1, 2)]
        positions = [batch["masked_positions"] for batch in batches]
        assert (positions[0] != positions[1]).any()
        assert (positions[0] == positions[2]).all() == same


def test_another_seed_masks_other_tokens() -> None:
    objective, lengths = build()
    batches = [objective.make_batch(make_pairs(8, lengths.raw, seed=seed)) for seed in (0, 1)]
    for row in range(8):
        assert (batches[0]["masked_positions"][row] != batches[1]["masked_positions"][row]).any()


@pytest.mark.parametrize("whole_words", [False, True])
def test_a_sample_does_not_depend_on_its_batch(whole_words: bool) -> None:
    objective, lengths = build(BertConfig(whole_words=whole_words))
    assert_rows_stand_alone(objective, make_pairs([2, 3, 9, 50, 100, lengths.raw], lengths.raw))


def test_the_shortest_pair_and_the_smallest_vocabulary_work() -> None:
    config = BertConfig()
    lengths = lengths_of(config, 5)
    vocabulary = Vocabulary(5, pad_id=0, mask_id=1, cls_id=2, sep_id=3)
    samples = Samples(
        np.full((3, 2), 4), np.full(3, 2), None, np.zeros((3, 4), np.int64), np.ones(3, np.int64), np.zeros(3, bool)
    )
    batch = Bert(config, lengths, vocabulary).make_batch(samples)
    assert (originals(batch) == [2, 4, 3, 4, 3]).all()
    assert (batch["loss_mask"] == 1).all()


def test_a_row_without_candidates_gets_no_group() -> None:
    nothing = np.zeros((1, 4), bool)
    assert not choose_groups(np.zeros(1, np.uint64), nothing, nothing, np.array([2])).any()


def test_a_tokenizer_without_the_special_tokens_is_refused_in_one_line() -> None:
    lengths = SampleLengths(9, 12, 0, 2)
    bare = dataclasses.replace(small_vocabulary(), cls_id=None, mask_id=None, is_word_start=None)
    with pytest.raises(DataError, match="tokenizer: has no mask token and no cls token, which objective bert needs"):
        Bert(BertConfig(), lengths, bare)
    with pytest.raises(DataError, match="mask token and no cls token and no mark of which pieces begin a word"):
        Bert(BertConfig(whole_words=True), lengths, bare)
