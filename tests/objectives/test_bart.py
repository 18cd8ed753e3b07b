from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.config.lengths import SampleLengths
from lmscale.config.objective import BartConfig
from lmscale.data.draws import streams
from lmscale.data.samples import Samples
from lmscale.errors import ConfigError, DataError
from lmscale.objectives.bart import Bart, permute_sentences
from lmscale.objectives.base import Arrays, Vocabulary
from lmscale.objectives.infilling import cover_spans, poisson_table, span_lengths
from lmscale.objectives.masking import shuffled
from tests.objectives.rows import (
    BOS,
    EOS,
    FULL_STOP,
    MASK,
    PAD,
    VOCAB_SIZE,
    assert_as_the_contract_says,
    assert_rows_stand_alone,
    lengths_of,
    make_samples,
    small_vocabulary,
    within_three_sigma,
)

PLAIN = {"permuted_share": 0.0}
NOISES = [
    {},
    {"preset": "bart_released"},
    {"masking": "words", "replacement": "each", "random_share": 0.3},
    {"masking": "tokens", "replacement": "none"},
    {"replacement": "each", "rotated_share": 0.5, "inserted_share": 0.1, "random_share": 0.1},
    {"replacement": "none"},
]


def build(length: int = 512, **settings: object) -> tuple[Bart, SampleLengths]:
    config = BartConfig.model_validate(settings)
    lengths = lengths_of(config, length)
    return Bart(config, lengths, small_vocabulary()), lengths


def noised(batch: Arrays, row: int) -> list[int]:
    """What the encoder reads, without its ends."""
    tokens = batch["tokens"][row][batch["document_ids"][row] >= 0].tolist()
    assert (tokens[0], tokens[-1]) == (BOS, EOS)
    return tokens[1:-1]


def test_the_decoder_reads_the_text_with_its_end_moved_to_the_front() -> None:
    objective, lengths = build(8)
    batch = objective.make_batch(make_samples([6, 3], lengths.raw))
    text = make_samples([6, 3], lengths.raw).tokens
    assert batch["labels"].tolist() == [[BOS, *text[0], EOS], [BOS, *text[1, :3], EOS, PAD, PAD, PAD]]
    assert batch["decoder_tokens"].tolist() == [[EOS, BOS, *text[0]], [EOS, BOS, *text[1, :3], PAD, PAD, PAD]]
    assert batch["decoder_document_ids"].tolist() == [[0] * 8, [0] * 5 + [-1] * 3]
    assert batch["loss_mask"].tolist() == [[1] * 8, [1] * 5 + [0] * 3]
    names = {"tokens", "document_ids", "decoder_tokens", "decoder_document_ids", "labels", "loss_mask"}
    assert_as_the_contract_says(batch, names, {"s": 8, "d": 8, "l": 8}, 2)


def test_without_noise_the_encoder_reads_the_text() -> None:
    objective, lengths = build(16, masked_share=0, permuted_share=0)
    samples = make_samples([14, 1], lengths.raw)
    batch = objective.make_batch(samples)
    assert noised(batch, 0) == samples.tokens[0].tolist()
    assert noised(batch, 1) == samples.tokens[1, :1].tolist()


@pytest.mark.parametrize(
    ("preset", "share", "spans", "empty", "masks", "size"),
    [("bart_paper", 26.9, 48.8, 2.7, 42.6, 416), ("bart_released", 26.7, 42.8, 1.3, 35.8, 410)],
)
def test_infilling_has_the_statistics_of_the_original(
    preset: str, share: float, spans: float, empty: float, masks: float, size: float
) -> None:
    """510 words of one piece, 153 of them to be masked, as fairseq's own code masks them."""
    rows = 1000
    samples = make_samples(rows, 510, word_starts=True)
    mean = {"bart_paper": 3.0, "bart_released": 3.5}[preset]
    lengths, num_empty = span_lengths(streams(samples.keys, 1), np.full(rows, 153), poisson_table(mean))
    assert (lengths.sum(axis=1) == 153).all()
    assert abs((lengths > 0).sum(axis=1).mean() - spans) < 0.5
    assert abs(num_empty.mean() - empty) < 0.2
    is_start = np.ones((rows, 510), bool)
    is_begin, is_inside = cover_spans(streams(samples.keys, 2), is_start, samples.lengths, lengths)
    assert abs((is_begin | is_inside).mean() * 100 - share) < 0.2
    assert abs((is_begin & ~is_inside).sum(axis=1).mean() + num_empty.mean() - masks) < 0.5
    objective, _ = build(preset=preset, permuted_share=0)
    batch = objective.make_batch(samples)
    # In the released recipe a tenth of the masks is random.
    certain = 1.0 if preset == "bart_paper" else 0.9
    assert abs((batch["tokens"] == MASK).sum(axis=1).mean() - masks * certain) < 1.0
    assert abs((batch["document_ids"] >= 0).sum(axis=1).mean() - 2 - size) < 1.0


def test_lengths_are_of_the_poisson_distribution() -> None:
    table = poisson_table(3.0)
    expected = [math.exp(-3.0) * 3.0**length / math.factorial(length) for length in range(len(table))]
    assert np.allclose(np.diff(table, prepend=0.0), expected, atol=1e-7)
    assert expected[-1] < 1e-7 < expected[-2]
    # e^-3 of the draws are 0; the last draw of a row never is, so that rows with many draws are counted.
    lengths, num_empty = span_lengths(streams(np.arange(20)[:, None], 1), np.full(20, 30_000), table)
    draws = int((lengths > 0).sum() + num_empty.sum())
    assert within_three_sigma(int(num_empty.sum()), draws, math.exp(-3.0))


@pytest.mark.parametrize("mean", [0.1, 17.0, 60.0, 1000.0])
def test_rare_means_have_a_table(mean: float) -> None:
    table = poisson_table(mean)
    assert table[-1] == 1.0
    assert (np.diff(table) >= 0).all()
    assert len(table) <= 128


def test_a_mean_that_makes_almost_all_lengths_0_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"objective.span_lambda = 0.01: must be at least 0.1"):
        poisson_table(0.01)


def cover_one_by_one(starts: list[bool], size: int, begins: list[int], lengths: list[int]) -> tuple[set[int], set[int]]:
    """The loop of fairseq, span by span: a span goes on until it would begin one word too many, or the text ends."""
    inside: set[int] = set()
    for begin, length in zip(begins, lengths, strict=True):
        left, place = length - 1, begin + 1
        while place < size:
            left -= starts[place]
            if left < 0:
                break
            inside.add(place)
            place += 1
    return set(begins), inside


@given(seed=st.integers(0, 1 << 30), share=st.sampled_from([0.2, 0.6, 1.0]))
@settings(max_examples=60, deadline=None)
def test_spans_cover_what_the_original_loop_covers(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    rows, width = 5, 30
    sizes = rng.integers(1, width + 1, rows)
    is_start = (rng.random((rows, width)) < share) & (np.arange(width) < sizes[:, None])
    num_words = is_start.sum(axis=1)
    budgets = np.ceil(num_words * 0.4).astype(int)
    lengths, _ = span_lengths(streams(rng.integers(0, 99, (rows, 1)), 1), budgets, poisson_table(2.0))
    names = streams(rng.integers(0, 1 << 40, (rows, 1)), 7)
    is_begin, is_inside = cover_spans(names, is_start, sizes, lengths)
    order = shuffled(names, np.arange(max(num_words)) < num_words[:, None])
    for row in range(rows):
        spans = lengths[row][lengths[row] > 0].tolist()
        begins = [int(np.flatnonzero(is_start[row])[word]) for word in order[row, : len(spans)]]
        expected = cover_one_by_one(is_start[row].tolist(), int(sizes[row]), begins, spans)
        assert (set(np.flatnonzero(is_begin[row])), set(np.flatnonzero(is_inside[row]))) == expected


def test_one_mask_stands_for_a_span_and_what_is_left_is_in_order() -> None:
    objective, lengths = build(64, **PLAIN)
    samples = make_samples([62, 40, 9, 1] * 20, lengths.raw)
    batch = objective.make_batch(samples)
    for row, size in enumerate(samples.lengths):
        text = samples.tokens[row, :size].tolist()
        left = [token for token in noised(batch, row) if token != MASK]
        rest = iter(text)
        assert all(token in rest for token in left)  # a subsequence


def test_masks_for_each_token_keep_the_length_and_nothing_leaves_no_mask() -> None:
    for masking in ("words", "tokens"):
        objective, lengths = build(64, masking=masking, replacement="each", **PLAIN)
        samples = make_samples(50, lengths.raw)
        batch = objective.make_batch(samples)
        is_mask = batch["tokens"][:, 1:-1] == MASK
        assert ((batch["tokens"][:, 1:-1] == samples.tokens) | is_mask).all()
        if masking == "tokens":
            assert (is_mask.sum(axis=1) == math.ceil(62 * 0.3)).all()
        else:
            words = (samples.tokens % 2 == 0).sum(axis=1)
            masked = (is_mask & (samples.tokens % 2 == 0)).sum(axis=1)
            assert (masked == np.ceil(words * 0.3)).all()
            # A word is masked with all of its pieces; pieces before the first one are not.
            continues = samples.tokens[:, 1:] % 2 == 1
            assert (is_mask[:, 1:] == is_mask[:, :-1])[continues].all()
    objective, lengths = build(64, masking="tokens", replacement="none", **PLAIN)
    batch = objective.make_batch(make_samples(50, lengths.raw))
    assert not (batch["tokens"] == MASK).any()
    assert ((batch["document_ids"] >= 0).sum(axis=1) == 64 - math.ceil(62 * 0.3)).all()


def test_random_tokens_have_their_share_and_spare_the_first_id() -> None:
    objective, lengths = build(512, masking="tokens", replacement="each", random_share=0.25, **PLAIN)
    samples = make_samples(200, lengths.raw)
    read = objective.make_batch(samples)["tokens"][:, 1:-1]
    total = 200 * math.ceil(lengths.raw * 0.3)
    is_mask = read == MASK
    assert within_three_sigma(int(is_mask.sum()), total, 0.75 + 0.25 / VOCAB_SIZE)
    is_random = (read != samples.tokens) & ~is_mask
    assert abs(int(is_random.sum()) - total * 0.25) < 3 * (total * 0.25 * 0.75) ** 0.5
    assert read[is_random].min() == 1


def sentence_ends(text: list[int]) -> list[int]:
    stops = [token == FULL_STOP for token in text]
    stops[-1] = True
    return [place + 1 for place in range(len(text)) if stops[place] and not (place and stops[place - 1])]


def permuted_one_by_one(text: list[int], order: tuple[int, ...]) -> list[int]:
    """The slices of fairseq's permute_sentences, without <s> and </s>."""
    ends, result, index = sentence_ends(text), list(text), 0
    for number in order:
        sentence = text[(ends[number - 1] if number > 0 else 0) : ends[number]]
        result[index : index + len(sentence)] = sentence
        index += len(sentence)
    return result


@given(
    seed=st.integers(0, 1 << 30), stops=st.sampled_from([0.0, 0.2, 0.5, 1.0]), share=st.sampled_from([0.0, 0.5, 1.0])
)
@settings(max_examples=60, deadline=None)
def test_sentences_are_cut_as_the_original_cuts_them_and_permuted(seed: int, stops: float, share: float) -> None:
    rng = np.random.default_rng(seed)
    samples = make_samples(rng.integers(1, 13, 5).tolist(), 12, seed)
    is_stop = (rng.random((5, 12)) < stops) & (np.arange(12) < samples.lengths[:, None])
    # Tokens that differ tell where each came from.
    text = np.where(is_stop, FULL_STOP, np.arange(100, 112))
    permuted = permute_sentences(text, samples.lengths, samples.keys, FULL_STOP, share)
    for row, size in enumerate(samples.lengths):
        plain = text[row, :size].tolist()
        assert sorted(permuted[row, :size]) == sorted(plain)
        number = len(sentence_ends(plain))
        if number <= 5:
            orders = [
                order for order in itertools.permutations(range(number)) if moved(order) <= math.ceil(number * share)
            ]
            assert permuted[row, :size].tolist() in [permuted_one_by_one(plain, order) for order in orders]


def moved(order: tuple[int, ...]) -> int:
    return sum(place != number for place, number in enumerate(order))


def test_every_order_of_sentences_is_equally_likely_and_a_half_moves_at_most_a_half() -> None:
    rows = 6000
    keys = make_samples(rows, 7).keys
    text = np.broadcast_to([100, FULL_STOP, 101, 102, FULL_STOP, 103, 104], (rows, 7))
    counts: dict[tuple[int, ...], int] = {}
    for order in permute_sentences(text, np.full(rows, 7), keys, FULL_STOP, 1.0).tolist():
        counts[tuple(order)] = counts.get(tuple(order), 0) + 1
    assert len(counts) == 6
    assert all(within_three_sigma(count, rows, 1 / 6) for count in counts.values())
    # Of 3 sentences, a third is one: it keeps its place.
    assert (permute_sentences(text, np.full(rows, 7), keys, FULL_STOP, 1 / 3) == text).all()


def test_rotation_begins_anywhere_and_keeps_the_cycle() -> None:
    objective, lengths = build(8, masked_share=0, permuted_share=0, rotated_share=0.5)
    samples = make_samples(4000, lengths.raw)
    batch = objective.make_batch(samples)
    read = batch["tokens"][:, 1:-1]
    turns = [[(read[row] == np.roll(samples.tokens[row], -turn)).all() for turn in range(6)] for row in range(4000)]
    assert all(map(any, turns))
    # The cut falls before each of the 6 tokens or behind the last one; at both ends nothing changes.
    assert within_three_sigma(sum(turn[0] for turn in turns), 4000, 0.5 + 0.5 * 2 / 7)
    assert within_three_sigma(sum(turn[3] for turn in turns), 4000, 0.5 / 7)


def test_insertion_puts_masks_between_the_ends() -> None:
    objective, lengths = build(64, masked_share=0, permuted_share=0, inserted_share=0.1, random_share=0.3)
    samples = make_samples([40, 10, 1], lengths.raw)
    batch = objective.make_batch(samples)
    for row, size in enumerate([40, 10, 1]):
        count = math.ceil((size + 2) * 0.1)
        read = noised(batch, row)
        assert len(read) == size + count
        assert read.count(MASK) >= count - math.ceil(count * 0.3)
        rest = iter(read)
        assert all(token in rest for token in samples.tokens[row, :size])


def test_a_noised_text_that_is_too_long_is_cut_and_keeps_its_end() -> None:
    objective, lengths = build(16, masked_share=0, permuted_share=0, inserted_share=0.5)
    batch = objective.make_batch(make_samples(3, lengths.raw))
    assert (batch["tokens"][:, 0] == BOS).all()
    assert (batch["tokens"][:, -1] == EOS).all()
    assert (batch["document_ids"] == 0).all()


@pytest.mark.parametrize("noise", NOISES)
def test_a_sample_does_not_depend_on_its_batch(noise: dict[str, object]) -> None:
    objective, lengths = build(64, **noise)
    samples = make_samples([1, 2, 3, 20, 50, lengths.raw], lengths.raw)
    samples.tokens[:, 5::9] = FULL_STOP
    assert_rows_stand_alone(objective, samples)


def test_epochs_and_seeds_noise_differently() -> None:
    objective, lengths = build(64)
    plain, epoch, seed = (
        objective.make_batch(make_samples(8, lengths.raw, **which))["tokens"]
        for which in ({}, {"epoch": 1}, {"seed": 1})
    )
    for row in range(8):
        assert (plain[row] != epoch[row]).any()
        assert (plain[row] != seed[row]).any()


def test_a_text_without_a_begin_of_a_word_is_left_alone() -> None:
    objective, _ = build(16, **PLAIN)
    samples = Samples(np.full((2, 14), 11), np.array([14, 1]), None, np.zeros((2, 4), np.int64))
    batch = objective.make_batch(samples)
    assert noised(batch, 0) == [11] * 14
    assert noised(batch, 1) == [11]


def test_a_text_of_full_stops_and_the_smallest_vocabulary_work() -> None:
    vocabulary = Vocabulary(5, 0, 1, 2, 3, is_word_start=np.ones(5, bool), full_stop_id=4)
    config = BartConfig(random_share=1.0)
    samples = Samples(np.full((9, 14), 4), np.full(9, 14), None, np.arange(36).reshape(9, 4))
    batch = Bart(config, lengths_of(config, 16), vocabulary).make_batch(samples)
    assert ((batch["tokens"] >= 0) & (batch["tokens"] < 5)).all()


def test_a_tokenizer_without_what_the_noise_needs_is_refused_in_one_line() -> None:
    bare = dataclasses.replace(small_vocabulary(), full_stop_id=None, is_word_start=None, mask_id=None)
    lengths = lengths_of(BartConfig(), 16)
    message = r"tokenizer: has no mask token and no piece that is objective.full_stop and no mark .* bart needs"
    with pytest.raises(DataError, match=message):
        Bart(BartConfig(), lengths, bare)
    Bart(
        BartConfig(masking="tokens", permuted_share=0),
        lengths,
        dataclasses.replace(bare, mask_id=MASK),
    )
