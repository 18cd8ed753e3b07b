"""Samples to noise, and the vocabularies of small tokenizers."""

from __future__ import annotations

import numpy as np

from lmscale.batch import FIELDS
from lmscale.config.data import DataConfig, TrainSource
from lmscale.config.lengths import SampleLengths, sample_lengths
from lmscale.config.objective import ObjectiveConfig
from lmscale.data.samples import Samples
from lmscale.objectives.base import Arrays, Objective, Vocabulary

VOCAB_SIZE = 1000
NUM_SENTINELS = 100
PAD, BOS, EOS, MASK, CLS, SEP, FULL_STOP = 0, 1, 2, 3, 4, 5, 10
FIRST_TEXT = 10
"""Text is the ids from this to the first sentinel."""
BEHIND_TEXT = VOCAB_SIZE - NUM_SENTINELS


def small_vocabulary() -> Vocabulary:
    """A vocabulary in which the odd ids continue words."""
    sentinels = tuple(range(VOCAB_SIZE - 1, BEHIND_TEXT - 1, -1))
    is_word_start = np.arange(VOCAB_SIZE) % 2 == 0
    special = np.array([*range(FIRST_TEXT), *sorted(sentinels)])
    return Vocabulary(VOCAB_SIZE, PAD, BOS, EOS, MASK, CLS, SEP, sentinels, special, is_word_start, FULL_STOP)


def lengths_of(objective: ObjectiveConfig, seq_length: int, decoder_seq_length: int | None = None) -> SampleLengths:
    """The lengths of an objective's samples."""
    source = TrainSource(prefix="corpus", weight=1.0)
    data = DataConfig(train=[source], seq_length=seq_length, decoder_seq_length=decoder_seq_length)
    return sample_lengths(data, objective)


def make_samples(
    lengths: list[int] | int, raw: int, seed: int = 0, epoch: int = 0, word_starts: bool = False
) -> Samples:
    """Random text. `lengths` one by one, or a number of samples that are all full."""
    rng = np.random.default_rng(1)
    sizes = np.full(lengths, raw) if isinstance(lengths, int) else np.array(lengths)
    tokens = rng.integers(FIRST_TEXT + 1, BEHIND_TEXT, (len(sizes), raw))
    if word_starts:
        tokens = tokens // 2 * 2
        tokens[tokens <= FULL_STOP] = FULL_STOP + 2
    tokens[np.arange(raw) >= sizes[:, None]] = 0
    numbers = np.arange(len(sizes))
    keys = np.stack([np.full_like(numbers, seed), 0 * numbers, np.full_like(numbers, epoch), numbers], axis=1)
    return Samples(tokens, sizes, None, keys)


def make_examples(number: int, raw: int) -> Samples:
    """Random text: in each sample two examples, whose input and target are a sixth of the raw tokens each."""
    size = raw // 6
    whole = make_samples(number, 4 * size)
    places = np.broadcast_to(np.arange(4 * size), whole.tokens.shape)
    return Samples(whole.tokens, whole.lengths, places // (2 * size), whole.keys, is_target=places // size % 2 == 1)


def make_pairs(lengths: list[int] | int, raw: int, seed: int = 0, epoch: int = 0) -> Samples:
    """As `make_samples`, each cut into two segments."""
    whole = make_samples(lengths, raw, seed, epoch)
    rng = np.random.default_rng(2)
    first = rng.integers(1, np.maximum(whole.lengths, 2))
    return Samples(whole.tokens, whole.lengths, None, whole.keys, first, rng.random(len(first)) < 0.5)


def take(samples: Samples, rows: list[int]) -> Samples:
    """Some rows of a batch, in this order."""
    optional = (samples.document_ids, samples.first_lengths, samples.is_random_next)
    documents, first, is_random = (None if array is None else array[rows] for array in optional)
    return Samples(samples.tokens[rows], samples.lengths[rows], documents, samples.keys[rows], first, is_random)


def assert_rows_stand_alone(objective: Objective, samples: Samples) -> None:
    """Each row comes out the same alone and among others, in any order."""
    together = objective.make_batch(samples)
    order = list(np.random.default_rng(3).permutation(len(samples.lengths)))
    moved = objective.make_batch(take(samples, order))
    for name, array in together.items():
        assert (moved[name] == array[order]).all(), name
    for row in range(len(order)):
        alone = objective.make_batch(take(samples, [row]))
        for name, array in together.items():
            assert (alone[name][0] == array[row]).all(), name


def assert_as_the_contract_says(batch: Arrays, names: set[str], lengths: dict[str, int], rows: int) -> None:
    """Names, types and shapes; `lengths` maps the letters of lmscale.batch to sizes."""
    assert set(batch) == names
    for field in FIELDS:
        if field.name in names:
            assert batch[field.name].dtype == field.dtype, field.name
            sizes = {"b": rows, **lengths}
            assert batch[field.name].shape == tuple(sizes[letter] for letter in field.shape), field.name


def within_three_sigma(count: int, total: int, share: float) -> bool:
    """Whether a count of independent events is as likely as it should be."""
    return bool(abs(count - total * share) <= 3 * (total * share * (1 - share)) ** 0.5)
