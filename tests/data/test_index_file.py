from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from lmscale.data.index_file import bin_path, dtype_for, idx_path
from lmscale.data.indexed import IndexedCorpus
from lmscale.errors import DataError
from tests.data.corpora import random_documents, random_sentences, write_corpus, write_sentences


def test_our_files_are_megatron_cores_byte_for_byte(tmp_path: Path) -> None:
    documents = random_documents(20)
    write_corpus(tmp_path / "ours", documents)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), np.uint16)
    for document in documents:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()


@pytest.mark.parametrize("eos_id", [None, 3])
def test_sentences_are_megatron_cores_sequences_byte_for_byte(tmp_path: Path, eos_id: int | None) -> None:
    documents = random_sentences(20)
    corpus = write_sentences(tmp_path / "ours", documents, eos_id)
    if eos_id is not None:
        documents = [[*document[:-1], [*document[-1], eos_id]] for document in documents]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), np.uint16)
    for document in documents:
        builder.add_document(np.concatenate(document), [len(sentence) for sentence in document])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    theirs = IndexedDataset(str(tmp_path / "ours"), mmap=True)
    sentences = [sentence for document in documents for sentence in document]
    assert [theirs[number].tolist() for number in range(len(theirs))] == sentences
    assert theirs.document_indices.tolist() == corpus.document_sentences.tolist()
    read = np.split(corpus.tokens, corpus.sentence_offsets[1:-1])
    assert [sentence.tolist() for sentence in read] == sentences
    assert np.array_equal(corpus.sentence_offsets[corpus.document_sentences], corpus.document_offsets)


def test_megatron_core_reads_our_documents(tmp_path: Path) -> None:
    documents = random_documents(20)
    write_corpus(tmp_path / "c", documents)
    theirs = IndexedDataset(str(tmp_path / "c"), mmap=True)
    assert [theirs[number].tolist() for number in range(len(theirs))] == documents


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_documents_of_several_sequences_that_megatron_core_wrote_are_read(tmp_path: Path, dtype: type) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype)
    builder.add_document(np.array([1, 2, 3, 4, 5]), [2, 3])
    builder.add_document(np.array([6]), [1])
    builder.finalize(str(tmp_path / "c.idx"))
    corpus = IndexedCorpus(tmp_path / "c")
    assert corpus.document_offsets.tolist() == [0, 5, 6]
    assert corpus.sentence_offsets.tolist() == [0, 2, 5, 6]
    assert corpus.document_sentences.tolist() == [0, 2, 3]
    assert corpus.has_sentences
    assert corpus.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert corpus.manifest is None


def test_the_dtype_is_the_smallest_that_holds_the_vocabulary() -> None:
    assert (dtype_for(65536), dtype_for(65537)) == (np.uint16, np.int32)


def _damage(path: Path, offset: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(data)


_HEADER = 34
DAMAGES = {
    "idx missing": (idx_path, lambda path: path.unlink(), "no such file"),
    "bin missing": (bin_path, lambda path: path.unlink(), "no such file"),
    "idx empty": (idx_path, lambda path: path.write_bytes(b""), "is empty"),
    "bin empty": (bin_path, lambda path: path.write_bytes(b""), "is empty"),
    "idx cut in its header": (
        idx_path,
        lambda path: path.write_bytes(path.read_bytes()[:20]),
        "truncated in its header",
    ),
    "idx cut": (idx_path, lambda path: path.write_bytes(path.read_bytes()[:-8]), "truncated"),
    "bin cut": (bin_path, lambda path: path.write_bytes(path.read_bytes()[:-2]), "truncated, or of another index"),
    "bin grown": (bin_path, lambda path: path.write_bytes(path.read_bytes() + b"xx"), "of another index"),
    "idx foreign": (idx_path, lambda path: path.write_bytes(b"PK\x03\x04" * 30), "not an index of megatron-core"),
    "version": (idx_path, lambda path: _damage(path, 9, b"\x02"), "version 2"),
    "dtype": (idx_path, lambda path: _damage(path, 17, b"\x07"), "token type 7"),
    "pointers": (idx_path, lambda path: _damage(path, _HEADER + 4 * 5 + 8, struct.pack("<q", 1)), "without a gap"),
    "lengths": (idx_path, lambda path: _damage(path, _HEADER, struct.pack("<i", -1)), "without a gap"),
    "bounds": (idx_path, lambda path: _damage(path, _HEADER + 12 * 5 + 8, struct.pack("<q", 9)), "do not cover"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_corpus_is_an_error_that_names_the_file(tmp_path: Path, name: str) -> None:
    file_of, damage, message = DAMAGES[name]
    prefix = tmp_path / "c"
    write_corpus(prefix, random_documents(5))
    damage(file_of(prefix))
    with pytest.raises(DataError, match=message) as caught:
        IndexedCorpus(prefix)
    assert caught.value.field == str(file_of(prefix))
