"""Measure the loader against megatron-core's GPTDataset, and tokenizing against sentencepiece's own batch encoding.

Both sides run in turn, in one process, on the same data; the figures are medians. The text is the Python standard
library's sources. Run it on a quiet machine: `python tools/bench_data.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from rich.console import Console
from rich.table import Table

from lmscale.config.data import TokenizerConfig

SEQ_LENGTH = 2048
MICRO_BATCH_SIZE = 16
VOCAB_SIZE = 8192
GOAL_SAMPLES_PER_SECOND = 10_000
GOAL_TOKENIZING_RATIO = 0.9


COPIES = 2
"""Of the text: workers take half a second to start, and a corpus worth tokenizing takes longer than that."""


def write_text(path: Path, copies: int = COPIES) -> None:
    """Write the standard library's sources, a document a file, as JSON lines."""
    root = Path(sysconfig.get_path("stdlib"))
    sources = [source for source in sorted(root.rglob("*.py")) if "site-packages" not in source.parts]
    with path.open("w") as file:
        for source in sources * copies:
            file.write(json.dumps({"text": source.read_text(errors="ignore")}) + "\n")


def median_rates(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Run every side in turn, `rounds` times, and return the median of what each returns."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, measure in sides.items():
            rates[name].append(measure())
    return {name: statistics.median(values) for name, values in rates.items()}


def tokenizing_rates(text: Path, tokenizer: TokenizerConfig, prefix: Path, rounds: int) -> dict[str, float]:
    """Measure tokens/s of `lmscale tokenize`, disk and start of its workers included, and of sentencepiece alone."""
    import sentencepiece

    from lmscale.data.encode import encode_corpus
    from lmscale.data.tokenizer import sentencepiece_file

    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file(tokenizer.path)))
    texts = [json.loads(line)["text"] for line in text.read_text().splitlines()]

    def sentencepiece_alone() -> float:
        began = time.perf_counter()
        ids = processor.encode(texts, out_type=int, num_threads=2)
        return sum(map(len, ids)) / (time.perf_counter() - began)

    def lmscale() -> float:
        return encode_corpus([str(text)], tokenizer, prefix, workers=2).tokens_per_second

    return median_rates({"sentencepiece": sentencepiece_alone, "lmscale": lmscale}, rounds)


def samples_per_second(
    batches: Iterator[Any],
    seconds: float,
    batch_size: int = MICRO_BATCH_SIZE,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Read batches for some seconds, from when the first is there."""
    next(batches)
    began = clock()
    count = 0
    while (elapsed := clock() - began) < seconds:
        next(batches)
        count += batch_size
    return count / elapsed


def our_batches(prefix: Path, num_workers: int, isolate: bool) -> Iterator[Any]:
    """Iterate over lmscale's train loader."""
    from lmscale.config.io import parse_run
    from lmscale.feed.loader import build_train_loader
    from lmscale.optim.batch_ramp import sizes_of
    from lmscale.optim.steps import Steps

    config = parse_run(
        {
            "model": {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "vocab_size": VOCAB_SIZE},
            "data": {
                "train": [{"prefix": str(prefix)}],
                "seq_length": SEQ_LENGTH,
                "num_workers": num_workers,
                "split": "1,0,0",
                "reset_attention_mask": isolate,
            },
            "batch": {"micro_batch_size": MICRO_BATCH_SIZE, "global_batch_size": MICRO_BATCH_SIZE},
            "optim": {"lr": 1.0e-3},
            "train": {"train_tokens": 10**12},
            "output_dir": str(prefix.parent),
        }
    )
    return build_train_loader(config, 0, 1, Steps(sizes_of(config), 0, 0, config.train.train_tokens))


def their_batches(prefix: Path, num_workers: int, cache: Path) -> Iterator[Any]:
    """Iterate over megatron-core's GPTDataset through torch's data loader, without attention masks."""
    import numpy as np
    import torch
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    indexed = IndexedDataset(str(prefix), mmap=True)
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=SEQ_LENGTH,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=SimpleNamespace(eod=3, pad=0, unique_identifiers={"class": "none"}, vocab_size=VOCAB_SIZE),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    documents = np.arange(len(indexed.document_indices) - 1, dtype=np.int32)
    dataset = GPTDataset(indexed, str(prefix), documents, 500_000, Split.train, config)
    return iter(torch.utils.data.DataLoader(dataset, batch_size=MICRO_BATCH_SIZE, num_workers=num_workers))


def loader_rates(prefix: Path, num_workers: int, rounds: int, seconds: float) -> dict[str, float]:
    """Measure samples/s of both loaders, and of ours with documents kept apart."""

    def ours(isolate: bool) -> Callable[[], float]:
        return lambda: samples_per_second(our_batches(prefix, num_workers, isolate), seconds)

    theirs = lambda: samples_per_second(their_batches(prefix, num_workers, prefix.parent / "cache"), seconds)  # noqa: E731
    return median_rates(
        {"megatron-core": theirs, "lmscale": ours(False), "lmscale, documents apart": ours(True)}, rounds
    )


def loader_table(rates: dict[int, dict[str, float]]) -> Table:
    """Tabulate the loaders."""
    table = Table(title=f"Loader: samples/s of {SEQ_LENGTH:,} tokens, in batches of {MICRO_BATCH_SIZE}")
    for column in ("workers", "loader", "samples/s", "of megatron-core", "goal"):
        table.add_column(column, justify="left" if column == "loader" else "right")
    for num_workers, by_name in rates.items():
        for name, rate in by_name.items():
            goal = f"{GOAL_SAMPLES_PER_SECOND:,}" if (num_workers, name) == (1, "lmscale") else ""
            table.add_row(str(num_workers), name, f"{rate:,.0f}", f"{rate / by_name['megatron-core']:.2f}", goal)
    return table


def tokenizing_table(rates: dict[str, float]) -> Table:
    """Tabulate the tokenizing."""
    table = Table(title="Tokenizing: two workers against two threads of sentencepiece, which reads and writes nothing")
    for column in ("", "tokens/s", "of sentencepiece", "goal"):
        table.add_column(column, justify="right" if column else "left")
    for name, rate in rates.items():
        goal = f"{GOAL_TOKENIZING_RATIO}" if name == "lmscale" else ""
        table.add_row(name, f"{rate:,.0f}", f"{rate / rates['sentencepiece']:.2f}", goal)
    return table


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a run of a loader")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of the libraries that are measured
    from lmscale.data.tokenizer_training import train_tokenizer

    console = Console()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        text, prefix = directory / "stdlib.jsonl", directory / "tokens"
        write_text(text)
        train_tokenizer([str(text)], VOCAB_SIZE, "bpe", directory / "tokenizer")
        tokenizer = TokenizerConfig(path=str(directory / "tokenizer"))
        console.print(tokenizing_table(tokenizing_rates(text, tokenizer, prefix, options.rounds)))
        rates = {workers: loader_rates(prefix, workers, options.rounds, options.seconds) for workers in (0, 1)}
        console.print(loader_table(rates))


if __name__ == "__main__":
    main()
