"""A small run's config for the tests of the feed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmscale.config.io import parse_run
from lmscale.config.run import RunConfig
from tests.data.corpora import random_documents, write_corpus


def make_run(directory: Path, num_corpora: int = 2, overrides: tuple[str, ...] = (), **data: Any) -> RunConfig:
    """Write corpora of 200 documents each and configure a run over them: sequences of 16, batches of 8."""
    train = []
    for number in range(num_corpora):
        prefix = directory / f"c{number}"
        write_corpus(prefix, random_documents(200, seed=number))
        train.append({"prefix": str(prefix), "weight": 1.0 + number})
    keys: dict[str, Any] = {
        "model": {
            "architecture": "gpt",
            "num_layers": 1,
            "hidden_size": 8,
            "num_attention_heads": 1,
            "vocab_size": 1000,
        },
        "data": {"train": train, "seq_length": 16, "num_workers": 0, "split": "80,10,10", **data},
        "batch": {"micro_batch_size": 2, "global_batch_size": 8},
        "optim": {"lr": 1e-3},
        "train": {"train_tokens": 16 * 8 * 5, "eval_batches": 2},
        "output_dir": str(directory / "run"),
    }
    return parse_run(keys, overrides)


def make_encoder_run(
    directory: Path, prefix: Path, tokenizer: Path, objective: dict[str, Any], overrides: tuple[str, ...] = ()
) -> RunConfig:
    """Configure a run of another objective over one corpus: sequences of 64, batches of 8."""
    keys: dict[str, Any] = {
        "model": {
            "architecture": objective["name"],
            "num_layers": 1,
            "hidden_size": 8,
            "num_attention_heads": 1,
            "vocab_size": 420,
        },
        "tokenizer": {"path": str(tokenizer)},
        "objective": objective,
        "data": {"train": [{"prefix": str(prefix)}], "seq_length": 64, "num_workers": 0, "split": "80,20,0"},
        "batch": {"micro_batch_size": 2, "global_batch_size": 8},
        "optim": {"lr": 1e-3},
        "train": {"train_tokens": 64 * 8 * 160, "eval_batches": 2},
        "output_dir": str(directory / "run"),
    }
    return parse_run(keys, overrides)
