from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmscale.data.tokenizer import SentencePieceTokenizer
from lmscale.data.tokenizer_training import train_tokenizer
from tests.data.corpora import TEXTS


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="session")
def tokenizer(corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    return train_tokenizer([str(corpus_file)], 450, "bpe", tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="session")
def tokenizer_path(tokenizer: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(next(tmp_path_factory.getbasetemp().glob("bpe*")))
