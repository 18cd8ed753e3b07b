from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from lmscale.data.indexed import IndexedCorpus
from lmscale.errors import DataError
from tests.data.corpora import random_documents, write_corpus


def test_a_corpus_gives_its_documents(tmp_path: Path) -> None:
    documents = random_documents(20)
    corpus = write_corpus(tmp_path / "c", documents)
    assert corpus.num_documents == 20
    assert corpus.num_tokens == sum(map(len, documents))
    assert [corpus.document(number).tolist() for number in range(20)] == documents


def test_a_pickled_corpus_opens_its_files_again(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", random_documents(20_000))
    content = pickle.dumps(corpus)
    assert len(content) < 1000
    assert np.array_equal(pickle.loads(content).tokens, corpus.tokens)


def test_the_content_hash_is_of_the_content(tmp_path: Path) -> None:
    hashes = {
        write_corpus(tmp_path / "a", [[1, 2, 3], [4]]).content_hash,
        write_corpus(tmp_path / "b", [[1, 2, 3], [5]]).content_hash,
        write_corpus(tmp_path / "c", [[1, 2], [3, 4]]).content_hash,
    }
    assert len(hashes) == 3
    assert write_corpus(tmp_path / "d", [[1, 2, 3], [4]]).content_hash in hashes


def test_the_vocabulary_and_the_tokenizer_are_checked_against_the_manifest(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", [[1, 2, 3]], vocab_size=500, tokenizer_hash="abc")
    corpus.check_vocabulary(500)
    corpus.check_vocabulary(500, "abc")
    with pytest.raises(DataError, match=r"vocabulary of 500, and model\.vocab_size is 512"):
        corpus.check_vocabulary(512)
    with pytest.raises(DataError, match="another tokenizer"):
        corpus.check_vocabulary(500, "def")


def test_a_manifest_of_a_former_index_is_not_believed(tmp_path: Path) -> None:
    write_corpus(tmp_path / "old", [[1, 2, 3]], vocab_size=500)
    write_corpus(tmp_path / "c", [[1, 2, 3, 4]])
    (tmp_path / "c.json").write_bytes((tmp_path / "old.json").read_bytes())
    corpus = IndexedCorpus(tmp_path / "c")
    assert corpus.manifest is None
    corpus.check_vocabulary(7)
