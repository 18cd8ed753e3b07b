"""A small tokenizer, and runs with a task whose files a test gives as lists of columns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmscale.config.io import parse_run
from lmscale.config.run import RunConfig
from lmscale.data.tokenizer import SentencePieceTokenizer
from lmscale.data.tokenizer_training import train_tokenizer

WORDS = "the cat sat on a mat and saw an old dog run home in rain while birds sang of seven tall trees yes no maybe"
Lines = list[dict[str, Any]]
MakeRun = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    home = tmp_path_factory.mktemp("tokenizer")
    names = WORDS.split()
    texts = [" ".join(names[number::3] + names[: number % 7]) + ". User: x Assistant: 12 (4)?" for number in range(40)]
    (home / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer([str(home / "text.jsonl")], 500, "bpe", home)
    return str(home)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: str) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(tokenizer_path)


@pytest.fixture
def make_run(tmp_path: Path, tokenizer_path: str) -> MakeRun:
    """Write files, and make the config of a run that reads them."""

    def make(architecture: str, kind: str, train: Lines, dev: Lines | None = None, **keys: Any) -> RunConfig:
        lengths = {key: keys.pop(key) for key in ("seq_length", "decoder_seq_length") if key in keys}
        task: dict[str, Any] = {"kind": kind, "train": write(tmp_path / "train.jsonl", train), **keys}
        if dev is not None:
            task["dev"] = write(tmp_path / "dev.jsonl", dev)
        return parse_run(
            {
                "model": {
                    "architecture": architecture,
                    "num_layers": 2,
                    "hidden_size": 32,
                    "num_attention_heads": 4,
                    "vocab_size": 500,
                    "max_position_embeddings": 128,
                },
                "tokenizer": {"path": tokenizer_path},
                "data": {"seq_length": 48, **lengths},
                "task": task,
                "batch": {"micro_batch_size": 2, "global_batch_size": 4},
                "optim": {"lr": 1.0e-3},
                "train": {"train_tokens": 10**6},
                "output_dir": str(tmp_path / "run"),
            }
        )

    return make


def write(path: Path, lines: Lines) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)
