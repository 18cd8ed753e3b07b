from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.config.lengths import SampleLengths, noised_lengths
from lmscale.config.objective import T5Config
from lmscale.data.samples import Samples
from lmscale.errors import ConfigError, DataError
from lmscale.objectives.base import Arrays
from lmscale.objectives.t5 import T5, corrupted, span_mask
from tests.objectives.rows import (
    BEHIND_TEXT,
    EOS,
    FIRST_TEXT,
    PAD,
    VOCAB_SIZE,
    assert_as_the_contract_says,
    assert_rows_stand_alone,
    lengths_of,
    make_samples,
    small_vocabulary,
    within_three_sigma,
)

NOISES = ["spans", "iid", "bert", "prefix_lm", "deshuffle"]
SENTINELS = list(small_vocabulary().sentinel_ids)


def build(config: T5Config | None = None, length: int = 512, decoder: int | None = None) -> tuple[T5, SampleLengths]:
    config = config or T5Config()
    lengths = lengths_of(config, length, decoder)
    return T5(config, lengths, small_vocabulary()), lengths


def texts(batch: Arrays, row: int) -> tuple[list[int], list[int]]:
    """Inputs and labels without padding."""
    inputs = batch["tokens"][row][batch["document_ids"][row] >= 0]
    return inputs.tolist(), batch["labels"][row][batch["loss_mask"][row] > 0].tolist()


def restored(inputs: list[int], targets: list[int]) -> list[int]:
    """The text: each sentinel of the inputs replaced by what follows it in the targets."""
    assert inputs[-1] == targets[-1] == EOS
    spans: dict[int, list[int]] = {}
    for token in targets[:-1]:
        if token >= BEHIND_TEXT:
            spans[token] = []
            last = token
        else:
            spans[last].append(token)
    # No sentinel without its span, none twice, in order from the highest id.
    marks = [token for token in inputs if token >= BEHIND_TEXT]
    assert marks == list(spans) == SENTINELS[: len(marks)]
    assert all(spans.values())
    return [part for token in inputs[:-1] for part in spans.get(token, [token])]


def test_512_inputs_and_114_targets_are_made_of_568_tokens_and_filled() -> None:
    objective, lengths = build()
    assert (lengths.raw, lengths.encoder, lengths.decoder) == (568, 512, 114)
    batch = objective.make_batch(make_samples(20, lengths.raw))
    assert (batch["document_ids"] == 0).all()
    assert (batch["loss_mask"] == 1).all()
    assert (batch["tokens"][:, -1] == EOS).all()
    assert (batch["labels"][:, -1] == EOS).all()
    assert (batch["labels"][:, 0] == SENTINELS[0]).all()
    # 85 tokens of noise in 28 spans.
    assert ((batch["tokens"] >= BEHIND_TEXT).sum(axis=1) == 28).all()
    assert ((batch["labels"] >= BEHIND_TEXT).sum(axis=1) == 28).all()


@pytest.mark.parametrize("noise", ["spans", "iid"])
def test_ten_thousand_pairs_restore_their_text(noise: str) -> None:
    objective, lengths = build(T5Config(noise=noise), 64)
    samples = make_samples([1 + number % lengths.raw for number in range(10_000)], lengths.raw)
    batch = objective.make_batch(samples)
    for row, size in enumerate(samples.lengths):
        assert restored(*texts(batch, row)) == samples.tokens[row, :size].tolist()


def test_a_text_begins_without_noise_and_ends_with_it() -> None:
    sizes = np.arange(2, 90)
    mask = span_mask(sizes, make_samples(88, 90).keys, 90, 0.15, 3.0)
    assert not mask[:, 0].any()
    assert mask[np.arange(88), sizes - 1].all()
    for row, size in enumerate(sizes.tolist()):
        noise, spans, _, _ = noised_lengths(size, 0.15, 3.0)
        assert mask[row].sum() == noise
        assert (np.diff(mask[row, :size].astype(int)) == 1).sum() == spans
        assert not mask[row, size:].any()


def test_every_way_to_cut_noise_and_text_into_spans_is_equally_likely() -> None:
    # 8 tokens, 4 of noise in 2 spans: 3 ways to cut the noise times 3 for the rest.
    rows = 20_000
    mask = span_mask(np.full(rows, 8), make_samples(rows, 8).keys, 8, 0.5, 2.0)
    counts = Counter(map(tuple, mask.tolist()))
    assert len(counts) == 9
    sigma = (rows / 9 * 8 / 9) ** 0.5
    assert all(abs(count - rows / 9) < 4 * sigma for count in counts.values())


def corrupted_one_by_one(text: list[int], is_noise: list[bool]) -> tuple[list[int], list[int]]:
    inputs, targets, spans = [], [], 0
    for place, token in enumerate(text):
        if is_noise[place] and (place == 0 or not is_noise[place - 1]):
            inputs.append(SENTINELS[spans])
            targets.append(SENTINELS[spans])
            spans += 1
        (targets if is_noise[place] else inputs).append(token)
    return inputs, targets


@given(seed=st.integers(0, 1 << 30), share=st.sampled_from([0.0, 0.2, 0.5, 1.0]))
@settings(max_examples=50, deadline=None)
def test_inputs_and_targets_are_those_of_a_loop_over_the_tokens(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    samples = make_samples(rng.integers(1, 13, 5).tolist(), 12)
    is_text = np.arange(12) < samples.lengths[:, None]
    is_noise = is_text & (rng.random((5, 12)) < share)
    inputs, input_sizes, targets, target_sizes = corrupted(samples.tokens, is_text, is_noise, np.array(SENTINELS))
    for row, size in enumerate(samples.lengths):
        expected = corrupted_one_by_one(samples.tokens[row, :size].tolist(), is_noise[row, :size].tolist())
        assert inputs[row, : input_sizes[row]].tolist() == expected[0]
        assert targets[row, : target_sizes[row]].tolist() == expected[1]


def test_iid_noise_has_its_share_and_neighbours_share_a_sentinel() -> None:
    objective, lengths = build(T5Config(noise="iid"))
    batch = objective.make_batch(make_samples(200, lengths.raw))
    is_label = batch["loss_mask"] > 0
    sentinels = int((batch["labels"] >= BEHIND_TEXT).sum())
    noise = int(is_label.sum()) - sentinels - 200
    total = 200 * lengths.raw
    assert within_three_sigma(noise, total, 0.15)
    assert abs(sentinels / total - 0.15 * 0.85) < 0.003


@pytest.mark.parametrize("density", [0.05, 0.15, 0.3, 0.5, 0.9])
def test_iid_noise_has_room_for_its_share(density: float) -> None:
    objective, lengths = build(T5Config(noise="iid", density=density), 128)
    samples = make_samples(400, lengths.raw)
    batch = objective.make_batch(samples)
    shares = []
    for row in range(400):
        inputs, targets = texts(batch, row)
        assert restored(inputs, targets) == samples.tokens[row].tolist()
        shares.append(sum(token < BEHIND_TEXT for token in targets[:-1]))
    assert within_three_sigma(sum(shares), 400 * lengths.raw, density)


def test_targets_without_room_for_iid_noise_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.decoder_seq_length = 20: must be at least \d+, the targets"):
        build(T5Config(noise="iid", density=0.4), 64, decoder=20)


@pytest.mark.parametrize(("density", "mean_span"), [(0.15, 1.0), (0.01, 3.0), (0.02, 3.0), (0.5, 1.0), (0.15, 3.0)])
def test_spans_fit_at_every_length(density: float, mean_span: float) -> None:
    for length in (4, 5, 7, 12, 29, 64, 65, 100):
        try:
            objective, lengths = build(T5Config(density=density, mean_span=mean_span), length)
        except (ConfigError, DataError):
            continue  # too many spans for the sentinels, or no room for one
        samples = make_samples(20, lengths.raw)
        batch = objective.make_batch(samples)
        for row in range(20):
            assert restored(*texts(batch, row)) == samples.tokens[row].tolist()
    assert build(T5Config(density=density, mean_span=mean_span), 29)[1].encoder == 29


def test_bert_noise_asks_for_the_whole_text() -> None:
    objective, lengths = build(T5Config(noise="bert"))
    samples = make_samples(200, lengths.raw)
    batch = objective.make_batch(samples)
    assert (batch["labels"][:, :-1] == samples.tokens).all()
    read, total = batch["tokens"][:, :-1], samples.tokens.size
    is_mask, is_changed = read == SENTINELS[0], read != samples.tokens
    assert within_three_sigma(int(is_mask.sum()), total, 0.15 * 0.9)
    is_random = is_changed & ~is_mask
    assert within_three_sigma(int(is_random.sum()), total, 0.15 * 0.1 * (1 - 1 / (BEHIND_TEXT - FIRST_TEXT)))
    assert ((read[is_random] >= FIRST_TEXT) & (read[is_random] < BEHIND_TEXT)).all()


def test_a_prefix_of_every_length_asks_for_the_rest() -> None:
    objective, lengths = build(T5Config(noise="prefix_lm"), 8)
    samples = make_samples(7000, lengths.raw)
    batch = objective.make_batch(samples)
    prefixes = Counter()
    for row in range(7000):
        inputs, targets = texts(batch, row)
        assert inputs[:-1] + targets[:-1] == samples.tokens[row].tolist()
        prefixes[len(inputs) - 1] += 1
    assert set(prefixes) == {1, 2, 3, 4, 5, 6}
    assert all(within_three_sigma(count, 7000, 1 / 6) for count in prefixes.values())


def test_deshuffling_asks_for_the_order() -> None:
    objective, lengths = build(T5Config(noise="deshuffle"), 32)
    samples = make_samples([31, 5, 1], lengths.raw)
    batch = objective.make_batch(samples)
    for row, size in enumerate([31, 5, 1]):
        inputs, targets = texts(batch, row)
        assert targets == [*samples.tokens[row, :size], EOS]
        assert sorted(inputs[:-1]) == sorted(targets[:-1])
    assert texts(batch, 0)[0] != texts(batch, 0)[1]


@pytest.mark.parametrize("noise", NOISES)
def test_the_decoder_reads_the_targets_behind_a_padding_token(noise: str) -> None:
    objective, lengths = build(T5Config(noise=noise), 64)
    batch = objective.make_batch(make_samples([lengths.raw, 9, 1], lengths.raw))
    names = {"tokens", "document_ids", "decoder_tokens", "decoder_document_ids", "labels", "loss_mask"}
    assert_as_the_contract_says(batch, names, {"s": 64, "d": lengths.decoder, "l": lengths.decoder}, 3)
    for row in range(3):
        inputs, targets = texts(batch, row)
        assert inputs[-1] == targets[-1] == EOS
        read = batch["decoder_tokens"][row].tolist()
        assert read == [PAD, *targets[:-1]] + [PAD] * (lengths.decoder - len(targets))
        rest = lengths.decoder - len(targets)
        assert batch["decoder_document_ids"][row].tolist() == [0] * len(targets) + [-1] * rest
        assert (batch["tokens"][row, len(inputs) :] == PAD).all()
        assert (batch["labels"][row, len(targets) :] == PAD).all()


@pytest.mark.parametrize("noise", NOISES)
def test_a_sample_does_not_depend_on_its_batch(noise: str) -> None:
    objective, lengths = build(T5Config(noise=noise), 64)
    assert_rows_stand_alone(objective, make_samples([1, 2, 3, 9, 50, lengths.raw], lengths.raw))


@pytest.mark.parametrize("noise", NOISES)
def test_epochs_and_seeds_noise_differently(noise: str) -> None:
    objective, lengths = build(T5Config(noise=noise), 64)
    plain, epoch, seed = (
        objective.make_batch(make_samples(8, lengths.raw, **which))["tokens"]
        for which in ({}, {"epoch": 1}, {"seed": 1})
    )
    for row in range(8):
        assert (plain[row] != epoch[row]).any() or noise == "prefix_lm"
        assert (plain[row] != seed[row]).any() or noise == "prefix_lm"
    assert (plain != epoch).any()
    assert (plain != seed).any()


def test_a_text_of_one_token_has_no_noise() -> None:
    objective, lengths = build(length=16)
    batch = objective.make_batch(make_samples([1], lengths.raw))
    inputs, targets = texts(batch, 0)
    assert len(inputs) == 2
    assert targets == [EOS]


def test_more_noise_than_text_leaves_one_token_between_spans() -> None:
    mask = span_mask(np.full(50, 10), make_samples(50, 10).keys, 10, 0.8, 1.0)
    assert (mask.sum(axis=1) == 8).all()
    assert ((np.diff(mask.astype(int), axis=1) == 1).sum(axis=1) == 2).all()


def test_more_spans_than_sentinels_are_refused() -> None:
    few = dataclasses.replace(small_vocabulary(), sentinel_ids=tuple(SENTINELS[:27]))
    with pytest.raises(DataError, match=r"tokenizer: has 27 sentinels, .* up to 28 spans of noise in 568 tokens"):
        T5(T5Config(), lengths_of(T5Config(), 512), few)
    with pytest.raises(DataError, match="has 27 sentinels"):
        T5(T5Config(noise="iid"), lengths_of(T5Config(noise="iid"), 512), few)
    mask = np.array([[True, False, True]])
    with pytest.raises(DataError, match="has 1 sentinels, and a sample has 2 spans"):
        corrupted(np.array([[1, 2, 3]]), np.ones((1, 3), bool), mask, np.array([VOCAB_SIZE - 1]))


def test_a_tokenizer_without_sentinels_is_refused_where_they_are_needed() -> None:
    bare = dataclasses.replace(small_vocabulary(), sentinel_ids=(), eos_id=2)
    for noise in NOISES:
        config = T5Config(noise=noise)
        if noise in ("prefix_lm", "deshuffle"):
            T5(config, lengths_of(config, 64), bare)
        else:
            with pytest.raises(DataError, match=r"tokenizer: has no sentinels .* which objective t5 needs"):
                T5(config, lengths_of(config, 64), bare)


def test_texts_of_special_tokens_work() -> None:
    objective, lengths = build(length=16)
    samples = Samples(np.full((4, lengths.raw), EOS), np.full(4, lengths.raw), None, np.arange(16).reshape(4, 4))
    assert objective.make_batch(samples)["loss_mask"].sum() > 0
