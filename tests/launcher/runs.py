"""A small run on disk, for the tests of the launcher and of the console."""

import json
import struct
from pathlib import Path

import yaml

from lmscale.config.io import parse_run
from lmscale.config.run import RunConfig


def write_corpus(prefix: Path, lengths=(40, 24)) -> None:
    """Write a .bin/.idx of uint16 zeros, by the format's definition and not by lmscale's writer."""
    pointers = [2 * sum(lengths[:number]) for number in range(len(lengths))]
    count = len(lengths)
    index = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, count, count + 1)
    index += struct.pack(f"<{count}i", *lengths) + struct.pack(f"<{count}q", *pointers)
    index += struct.pack(f"<{count + 1}q", *range(count + 1))
    Path(f"{prefix}.idx").write_bytes(index)
    Path(f"{prefix}.bin").write_bytes(bytes(2 * sum(lengths)))


def run_keys(directory: Path) -> dict:
    return {
        "model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512},
        "data": {"train": [{"prefix": str(directory / "corpus")}], "split": "1,0,0", "seq_length": 32},
        "batch": {"micro_batch_size": 2, "global_batch_size": 16},
        "optim": {"lr": 1.0e-3},
        "train": {"train_tokens": 10_000},
        "output_dir": str(directory / "run"),
    }


def make_run(directory: Path, *overrides: str) -> RunConfig:
    """Write a corpus and return a config that reads it."""
    write_corpus(directory / "corpus")
    return parse_run(run_keys(directory), overrides)


def write_run(directory: Path) -> Path:
    """Write a corpus and a run's YAML."""
    write_corpus(directory / "corpus")
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(run_keys(directory)))
    return path


def write_deepspeed(directory: Path, keys: dict) -> Path:
    path = directory / "ds.json"
    path.write_text(json.dumps(keys))
    return path
