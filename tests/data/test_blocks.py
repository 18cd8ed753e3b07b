from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmscale.data.blocks import Blocks, SentenceBlocks, SentencePacking
from lmscale.data.part import Part
from lmscale.data.samples import Samples
from lmscale.errors import DataError
from tests.data.corpora import keys_of, random_sentences, write_corpus, write_sentences

EOS = 3
LEAST_FILL = 0.95
"""FULL-SENTENCES fills blocks of 512 with sentences of some 25 tokens at least so far."""

Documents = list[list[list[int]]]


def read_all(source: Blocks | SentenceBlocks) -> Samples:
    return source.read(keys_of(np.arange(source.num_samples())))


def blocks_of(source: Blocks | SentenceBlocks) -> list[list[int]]:
    samples = read_all(source)
    assert (samples.tokens[np.arange(source.raw) >= samples.lengths[:, None]] == 0).all()
    assert samples.tokens.shape == (source.num_samples(), source.raw)
    assert (samples.lengths >= 1).all()
    return [row[:length].tolist() for row, length in zip(samples.tokens, samples.lengths, strict=True)]


def slow_blocks(documents: Documents, raw: int, packing: SentencePacking) -> list[list[int]]:
    """Pack sentence by sentence; a document end is put in front of the sentence that follows it in its block."""
    blocks: list[list[int]] = []
    block: list[int] = []
    is_between = False
    for document in documents:
        for sentence in document:
            pieces = [sentence[start : start + raw] for start in range(0, len(sentence), raw)]
            for piece in pieces:
                separator = [EOS] if is_between and block else []
                if block and (packing == "sentences" or len(block) + len(separator) + len(piece) > raw):
                    blocks.append(block)
                    block, separator = [], []
                block = block + separator + piece
                is_between = False
        is_between = True
        if packing != "full_sentences" and block:
            blocks.append(block)
            block = []
    return [*blocks, block] if block else blocks


@pytest.mark.parametrize("packing", ["full_sentences", "doc_sentences", "sentences"])
@pytest.mark.parametrize("raw", [1, 7, 30, 1000])
@pytest.mark.parametrize("documents", [None, (5, 30)])
def test_sentence_blocks_are_those_of_packing_sentence_by_sentence(
    tmp_path: Path, packing: SentencePacking, raw: int, documents: tuple[int, int] | None
) -> None:
    text = random_sentences(40)
    part = Part(write_sentences(tmp_path / "c", text, EOS), documents)
    first, behind = documents or (0, 40)
    assert blocks_of(SentenceBlocks(part, raw, packing)) == slow_blocks(text[first:behind], raw, packing)


@pytest.mark.parametrize("packing", ["full_sentences", "doc_sentences", "sentences"])
def test_every_token_of_text_is_in_one_block(tmp_path: Path, packing: SentencePacking) -> None:
    text = random_sentences(200, longest=90)
    source = SentenceBlocks(Part(write_sentences(tmp_path / "c", text, EOS)), 40, packing)
    read = [token for block in blocks_of(source) for token in block if token != EOS]
    assert read == [token for document in text for sentence in document for token in sentence]


def test_full_sentences_fill_their_blocks(tmp_path: Path) -> None:
    text = random_sentences(2000, most=40, longest=50)
    source = SentenceBlocks(Part(write_sentences(tmp_path / "c", text, EOS)), 510, "full_sentences")
    assert read_all(source).lengths[:-1].mean() >= LEAST_FILL * 510


def test_a_document_as_long_as_a_block_is_one_block(tmp_path: Path) -> None:
    part = Part(write_sentences(tmp_path / "c", [[[11, 12], [13, 14]], [[15]]], EOS))
    assert blocks_of(SentenceBlocks(part, 4, "doc_sentences")) == [[11, 12, 13, 14], [15]]
    assert blocks_of(SentenceBlocks(part, 4, "full_sentences")) == [[11, 12, 13, 14], [15]]
    assert blocks_of(SentenceBlocks(part, 6, "full_sentences")) == [[11, 12, 13, 14, EOS, 15]]


def test_documents_without_ends_are_packed_without_separators(tmp_path: Path) -> None:
    part = Part(write_sentences(tmp_path / "c", [[[11, 12], [13]], [[15]]]))
    assert blocks_of(SentenceBlocks(part, 9, "full_sentences")) == [[11, 12, 13, 15]]


def test_empty_sentences_and_documents_make_no_block(tmp_path: Path) -> None:
    text: Documents = [[[]], [[11], [], [12]], [[]], [[13], []]]
    part = Part(write_sentences(tmp_path / "c", text, EOS))
    assert blocks_of(SentenceBlocks(part, 1, "full_sentences")) == [[11], [12], [13]]
    assert blocks_of(SentenceBlocks(part, 9, "doc_sentences")) == [[11, 12], [13]]
    assert blocks_of(SentenceBlocks(part, 9, "sentences")) == [[11], [12], [13]]


@pytest.mark.parametrize("packing", ["full_sentences", "doc_sentences", "sentences"])
def test_a_corpus_without_sentences_or_text_is_refused(tmp_path: Path, packing: SentencePacking) -> None:
    with pytest.raises(DataError, match=rf"{packing} is made of; make it again: lmscale tokenize --sentences split"):
        SentenceBlocks(Part(write_corpus(tmp_path / "c", [[11, 12], [13]])), 8, packing)
    empty = Part(write_sentences(tmp_path / "e", [[[]], [[]]], EOS), None, "the train share")
    with pytest.raises(DataError, match="the train share has no text in 2 documents"):
        SentenceBlocks(empty, 8, packing)


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=20), raw=st.integers(2, 12), first=st.integers(0, 19))
def test_blocks_without_ends_are_the_text_cut_evenly(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], raw: int, first: int
) -> None:
    tokens = iter(range(10, 1000))
    text = [[next(tokens) for _ in range(length)] for length in lengths]
    first = min(first, len(text) - 1)
    flat = [token for document in text[first:] for token in document]
    directory = tmp_path_factory.mktemp("blocks")
    part = Part(write_sentences(directory / "c", [[document] for document in text], EOS), (first, len(text)))
    if len(flat) < 2:
        with pytest.raises(DataError, match="fewer than 2"):
            Blocks(part, raw, keep_ends=False)
        return
    expected = [flat[start : start + raw] for start in range(0, len(flat), raw)]
    assert blocks_of(Blocks(part, raw, keep_ends=False)) == [block for block in expected if len(block) > 1]


@pytest.mark.parametrize("raw", [1, 2, 5, 16])
def test_blocks_with_ends_are_the_corpus_cut_evenly_but_for_an_end_that_comes_last(tmp_path: Path, raw: int) -> None:
    corpus = write_sentences(tmp_path / "c", random_sentences(30), EOS)
    flat = corpus.tokens[corpus.document_offsets[4] : corpus.document_offsets[20]].tolist()
    pieces = [flat[start : start + raw] for start in range(0, len(flat), raw)]
    expected = [piece[:-1] if piece[-1] == EOS and raw > 1 else piece for piece in pieces if len(piece) > 1 or raw == 1]
    assert blocks_of(Blocks(Part(corpus, (4, 20)), raw, keep_ends=True)) == expected[: len(flat) // raw + 1]


def test_the_document_ends_of_another_tool_are_found_by_their_id(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", [[11, 12, EOS], [13, EOS]])
    (tmp_path / "c.json").unlink()
    corpus = type(corpus)(corpus.prefix)
    assert Part(corpus, None, "c", EOS).has_ends
    assert not Part(corpus, None, "c", 12).has_ends
    assert not Part(corpus).has_ends
    assert blocks_of(Blocks(Part(corpus, None, "c", EOS), 9, keep_ends=False)) == [[11, 12, 13]]
