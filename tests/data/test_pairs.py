from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmscale.data.draws import mix, streams, uniforms
from lmscale.data.pairs import _SITE_DOCUMENT, SentencePairs, count_heads, truncated_lengths
from lmscale.data.part import Part
from lmscale.errors import DataError
from tests.data.corpora import keys_of, random_sentences, write_corpus, write_sentences

EOS, SEED, NUMBER, RAW = 3, 5, 2, 29
DEVIATIONS = 5
"""Standard deviations that a share may be off: chance exceeds them once in two million."""

Documents = list[list[list[int]]]


@pytest.fixture(scope="module")
def text() -> Documents:
    return random_sentences(60)


@pytest.fixture(scope="module")
def part(text: Documents, tmp_path_factory: pytest.TempPathFactory) -> Part:
    return Part(write_sentences(tmp_path_factory.mktemp("pairs") / "c", text, EOS), (10, 60))


def make(part: Part, short_share: float = 0.1, copies: int = 0, raw: int = RAW) -> SentencePairs:
    return SentencePairs(part, raw, short_share, copies, SEED, NUMBER)


def slow_pairs(documents: Documents, epoch: int, short_share: float) -> list[tuple[list[int], list[int], bool]]:
    """Follow create_instances_from_document of the original code, sentence by sentence; truncation is left out."""
    pairs = []
    for number, document in enumerate(documents):
        name = streams(np.array([[SEED, epoch, NUMBER, number]]), _SITE_DOCUMENT)
        is_short, length = uniforms(name, 2)[0]
        target = 2 + int(length * (RAW - 1)) if is_short < short_share else RAW
        chunk: list[list[int]] = []
        count = place = 0
        while place < len(document):
            chunk.append(document[place])
            if place == len(document) - 1 or sum(map(len, chunk)) >= target:
                drawn = uniforms(mix(name + np.uint64(count + 1)), 13)[0]
                count += 1
                a_end = 1 + int(drawn[0] * (len(chunk) - 1)) if len(chunk) >= 2 else 1
                a = [token for sentence in chunk[:a_end] for token in sentence]
                is_random = len(chunk) == 1 or drawn[1] < 0.5
                b: list[int] = []
                if is_random:
                    for draw in drawn[3:]:
                        other = int(draw * len(documents))
                        if other != number:
                            break
                    start = int(drawn[2] * len(documents[other]))
                    for sentence in documents[other][start:]:
                        b += sentence
                        if len(b) >= target - len(a):
                            break
                    place -= len(chunk) - a_end
                else:
                    b = [token for sentence in chunk[a_end:] for token in sentence]
                pairs.append((a, b, is_random))
                chunk = []
            place += 1
    return pairs


@pytest.mark.parametrize("short_share", [0.0, 0.1, 1.0])
def test_pairs_are_those_of_the_original_algorithm(text: Documents, part: Part, short_share: float) -> None:
    source = make(part, short_share)
    for epoch in (0, 1):
        expected = slow_pairs(text[10:], epoch, short_share)
        assert source.num_samples(epoch) == len(expected)
        samples = source.read(keys_of(np.arange(len(expected)), epoch))
        assert samples.first_lengths is not None
        assert samples.is_random_next is not None
        assert samples.is_random_next.tolist() == [is_random for _, _, is_random in expected]
        assert EOS not in samples.tokens
        for row, (a, b, _) in enumerate(expected):
            first, length = samples.first_lengths[row], samples.lengths[row]
            a_left, b_left = slow_truncation(len(a), len(b), RAW)
            assert (first, length) == (a_left, a_left + b_left)
            assert is_part(samples.tokens[row, :first].tolist(), a)
            assert is_part(samples.tokens[row, first:length].tolist(), b)
            assert not samples.tokens[row, length:].any()


def is_part(short: list[int], long: list[int]) -> bool:
    return any(long[start : start + len(short)] == short for start in range(len(long) - len(short) + 1))


def slow_truncation(a: int, b: int, most: int) -> tuple[int, int]:
    while a + b > most:
        a, b = (a - 1, b) if a > b else (a, b - 1)
    return a, b


@given(a=st.integers(1, 60), b=st.integers(1, 60), most=st.integers(2, 60))
def test_truncation_leaves_what_dropping_token_by_token_leaves(a: int, b: int, most: int) -> None:
    left = truncated_lengths(np.array([a]), np.array([b]), most)
    assert (left[0][0], left[1][0]) == slow_truncation(a, b, most)


def test_tokens_are_dropped_at_either_end_alike() -> None:
    names = mix(np.arange(20_000, dtype=np.uint64))
    for flips in (0, 1, 63, 64, 65, 200):
        heads = count_heads(names, 1, np.full(len(names), flips))
        assert heads.min() >= 0
        assert heads.max() <= flips
        assert abs(heads.mean() - flips / 2) <= DEVIATIONS * math.sqrt(flips / 4 / len(names))
        if flips:
            assert abs(heads.var() / (flips / 4) - 1) <= DEVIATIONS * math.sqrt(2 / len(names))


def test_random_segments_are_half_and_those_of_single_sentences(tmp_path: Path) -> None:
    # Of 8 tokens, four sentences make a chunk, so that single ones are the rest of a document only.
    documents = [[[10 + number, 1, 2, 3, 4, 5, 6, 7]] * 8 for number in range(900)]
    source = SentencePairs(Part(write_sentences(tmp_path / "c", documents, EOS)), 32, 0.0, 0, SEED, 0)
    samples = source.read(keys_of(np.arange(source.num_samples())))
    assert samples.first_lengths is not None
    assert samples.is_random_next is not None
    a = samples.tokens[:, 0]
    b = samples.tokens[np.arange(len(a)), samples.first_lengths]
    # Chance finds the own document ten times in 10^30.
    assert np.array_equal(a != b, samples.is_random_next)
    share = samples.is_random_next.mean()
    assert 0.5 < share < 0.75
    full = samples.is_random_next[np.flatnonzero(np.diff(a, prepend=0))]  # a document's first pair has four sentences
    assert abs(full.mean() - 0.5) <= DEVIATIONS * math.sqrt(0.25 / len(full))
    others = np.bincount(b[samples.is_random_next] - 10, minlength=900)
    assert (others > 0).mean() > 0.6


def test_a_document_of_one_sentence_has_a_random_segment_always(tmp_path: Path) -> None:
    source = make(Part(write_sentences(tmp_path / "c", [[[11, 12]], [[13]], [[14, 15, 16]]], EOS)), 0.0)
    samples = source.read(keys_of(np.arange(source.num_samples())))
    assert len(samples.tokens) == 3
    assert samples.is_random_next is not None
    assert samples.is_random_next.all()


def test_epochs_differ_and_come_again_as_they_were(part: Part) -> None:
    source, other = make(part), make(part)
    sizes = [source.num_samples(epoch) for epoch in range(6)]
    assert len(set(sizes)) > 1
    assert [other.num_samples(epoch) for epoch in reversed(range(6))] == sizes[::-1]
    keys = np.concatenate([keys_of(np.arange(20), epoch) for epoch in (5, 0, 3)])
    assert np.array_equal(source.read(keys).tokens, other.read(keys).tokens)
    assert np.array_equal(source.read(keys).keys, keys)
    first, last = (source.read(keys_of(np.arange(20), epoch)).tokens for epoch in (0, 5))
    assert not np.array_equal(first, last)


def test_static_copies_repeat_with_their_keys(part: Part) -> None:
    source = make(part, copies=2)
    assert source.period == 2
    assert source.num_samples(5) == source.num_samples(1)
    first, again = (source.read(keys_of(np.arange(9), epoch)) for epoch in (1, 5))
    assert np.array_equal(first.tokens, again.tokens)
    assert np.array_equal(first.keys, again.keys)
    assert np.array_equal(first.tokens, make(part).read(keys_of(np.arange(9), 1)).tokens)


def test_documents_cut_in_several_chunks_are_cut_alike(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = keys_of(np.arange(make(part).num_samples()))
    together = make(part).read(keys)
    monkeypatch.setattr("lmscale.data.pairs._DOCUMENTS_AT_ONCE", 7)
    assert np.array_equal(make(part).read(keys).tokens, together.tokens)


def test_long_sentences_are_truncated_and_lose_nothing_else(tmp_path: Path) -> None:
    documents = [[list(range(10, 310))], [list(range(400, 900)), [1]]]
    source = make(Part(write_sentences(tmp_path / "c", documents, EOS)))
    samples = source.read(keys_of(np.arange(source.num_samples())))
    assert samples.lengths.max() == RAW
    for row, first in zip(samples.tokens, samples.first_lengths, strict=True):  # type: ignore[arg-type]
        assert set(np.diff(row[:first])) <= {1}


def test_what_cannot_be_paired_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="objective bert is made of; make it again: lmscale tokenize --sentences split"):
        make(Part(write_corpus(tmp_path / "a", [[11, 12], [13]])))
    one = write_sentences(tmp_path / "b", [[[11], [12]], [[13]]], EOS)
    with pytest.raises(DataError, match="the valid share has 1 document with text, and a random segment B"):
        make(Part(one, (0, 1), "the valid share"))
    blank = Part(write_sentences(tmp_path / "d", [[[11], [12]], [[]]], EOS))
    with pytest.raises(DataError, match="has 1 document with text"):
        make(blank).num_samples()


def test_a_corpus_in_which_one_document_has_text_is_refused_before_it_is_cut(tmp_path: Path) -> None:
    corpus = write_sentences(tmp_path / "c", [[[11], [12]], [[]], [[]]], eos_id=2)
    with pytest.raises(DataError, match="has 1 document with text, and a random segment B is taken from another"):
        SentencePairs(Part(corpus), 16, 0.1, 0, 0, 0)
