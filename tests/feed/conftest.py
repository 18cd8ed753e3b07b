from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmscale.data.readers import TextReader
from lmscale.data.sentences import SentenceSplitter
from lmscale.data.tokenizer_training import train_tokenizer

TEXTS = [
    f"Fox {number} jumps. The lazy dog, number {number * 7}, sleeps on! Does it? Yes.\n" * 9 for number in range(60)
]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of several sentences."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text[number % 50 :]}) + "\n" for number, text in enumerate(TEXTS)))
    return path


@pytest.fixture(scope="session")
def tokenizer_path(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 420 ids."""
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([str(text)], 420, "bpe", path)
    return path


@pytest.fixture(scope="session")
def prefix(text: Path, tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text as a corpus of sentences."""
    from lmscale.config.data import TokenizerConfig
    from lmscale.data.encode import encode_corpus

    path = tmp_path_factory.mktemp("corpus") / "c"
    config = TokenizerConfig(path=str(tokenizer_path))
    encode_corpus([str(text)], config, path, workers=1, reader=TextReader(splitter=SentenceSplitter("split")))
    return path
