"""Measure how fast samples of each objective are made, and how long a training step waits for them.

The peers are megatron-core's data sets of BERT and T5. All sides run in turn, in one process on one core, on the same
corpus of sentences; the figures are medians. The text is the Python standard library's sources. Run it on a quiet machine:
`python tools/bench_objectives.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench_data import VOCAB_SIZE, median_rates, samples_per_second, write_text
from rich.console import Console
from rich.table import Table

from lmscale.config.data import TokenizerConfig
from lmscale.config.run import RunConfig

SEQ_LENGTH = 512
THEIR_DECODER_LENGTH = 128
BATCH_SIZE = 64
THEIR_SAMPLES = 100_000
OBJECTIVES: dict[str, dict[str, Any]] = {
    "bert": {"name": "bert"},
    "bert, whole_words": {"name": "bert", "whole_words": True},
    "roberta": {"name": "roberta"},
    "t5, spans": {"name": "t5"},
    "bart, bart_paper": {"name": "bart", "preset": "bart_paper"},
    "bart, bart_released": {"name": "bart", "preset": "bart_released"},
    "causal_lm, prefix_lm": {"name": "causal_lm", "prefix_lm": True},
}
CUT_TOO = "bert, its epoch's cut included"
THEIR_BERT, THEIR_WORDS, THEIR_T5 = "megatron-core BERT", "megatron-core BERT, whole words", "megatron-core T5"
MASKED_AT_ONCE = {THEIR_BERT: 1, THEIR_WORDS: 1, THEIR_T5: 10}
PEERS = {"bert": THEIR_BERT, CUT_TOO: THEIR_BERT, "bert, whole_words": THEIR_WORDS, "t5, spans": THEIR_T5}
ROWS = (THEIR_BERT, THEIR_WORDS, "bert", CUT_TOO, "bert, whole_words", "roberta", THEIR_T5, *list(OBJECTIVES)[3:])
NOT_PADDING = {"document_ids": -1, "padding_mask": 0, "enc_mask": 0}
"""Where a field of a batch, lmscale's or megatron-core's, is above this there is a token."""
WAITING = ("bert", "roberta", "t5, spans", "bart, bart_released")
WAIT_STEPS, WAIT_BATCH_SIZE, WAIT_LAYERS = 4, 4, 6
"""Of the training runs whose waits are measured; the first step, which starts the worker, does not count."""
LONE_RANK = {
    **dict.fromkeys(("RANK", "LOCAL_RANK"), "0"),
    **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"), "1"),
    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "DS_ACCELERATOR": "cpu"},
}
GOAL_OF_WAIT = 0.01
GOALS = {"bert": 5_000, "roberta": 5_000, "t5": 3_000, "bart": 2_000}
NOTE = f"""\
A second is one of CPU time. lmscale: locate, read and make_batch, {BATCH_SIZE} samples at a time. megatron-core: torch's \
data loader without workers, in batches of {BATCH_SIZE}. Its tasks are not quite the same: its BERT swaps A and B where the \
original takes a random B; its T5 masks spans of up to 10 whole words, as Megatron-LM sets it, and a sample ends with its \
document. Of its two ways to draw how much to mask at once, its BERT is given the faster, which changes nothing where \
the most is 1. filled: the mean of the tokens that are not padding; of t5 and bart, the encoder's."""


@dataclass(frozen=True)
class Corpus:
    """A corpus of sentences and the tokenizer that made it, of `vocab_size` ids."""

    prefix: Path
    tokenizer: TokenizerConfig
    vocab_size: int


def make_corpus(text: Path, vocab_size: int) -> Corpus:
    """Train a tokenizer on JSON lines and tokenize them into sentences, beside the text."""
    from lmscale.data.encode import encode_corpus
    from lmscale.data.readers import TextReader
    from lmscale.data.sentences import SentenceSplitter
    from lmscale.data.tokenizer_training import train_tokenizer

    tokenizer = TokenizerConfig(path=str(text.parent / "tokenizer"))
    train_tokenizer([str(text)], vocab_size, "bpe", tokenizer.path)
    prefix = text.parent / "sentences"
    encode_corpus([str(text)], tokenizer, prefix, workers=1, reader=TextReader(splitter=SentenceSplitter("split")))
    return Corpus(prefix, tokenizer, vocab_size)


@contextmanager
def one_core() -> Iterator[None]:
    """Keep this process to one core and torch to one thread."""
    import torch

    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    try:
        os.sched_setaffinity(0, {min(cores)})
        torch.set_num_threads(1)
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


@contextmanager
def one_rank() -> Iterator[None]:
    """Initialise torch.distributed: megatron-core's data sets ask for their rank while they are built."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def configure(corpus: Corpus, objective: dict[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Configure a run of an objective."""
    from lmscale.config.io import parse_run

    name = objective["name"]
    return parse_run(
        {
            "model": {
                "architecture": "gpt" if name == "causal_lm" else name,
                "num_layers": 1,
                "hidden_size": 8,
                "num_attention_heads": 1,
                "vocab_size": corpus.vocab_size,
            },
            "tokenizer": {"path": corpus.tokenizer.path},
            "objective": objective,
            "data": {
                "train": [{"prefix": str(corpus.prefix)}],
                "seq_length": SEQ_LENGTH,
                "num_workers": 1,
                "split": "1,0,0",
            },
            "batch": {"micro_batch_size": BATCH_SIZE, "global_batch_size": BATCH_SIZE},
            "optim": {"lr": 1.0e-3},
            "train": {"train_tokens": 10**12},
            "output_dir": str(corpus.prefix.parent),
        },
        list(overrides),
    )


def cut_rate(config: RunConfig) -> float:
    """Cut an epoch of bert, as happens once in a process, and return pairs per second of CPU time."""
    from lmscale.feed.loader import build_blend
    from lmscale.feed.vocabulary import build_vocabulary

    source = build_blend(config, build_vocabulary(config)).sources[0]
    began = time.process_time()
    return source.num_samples() / (time.process_time() - began)


def our_batches(config: RunConfig) -> Iterator[dict[str, Any]]:
    """Make batches as a loader's worker does, but in this process and without its slots."""
    import numpy as np

    from lmscale.feed.dataset import SampleDataset
    from lmscale.feed.loader import build_blend
    from lmscale.feed.vocabulary import build_vocabulary
    from lmscale.objectives.registry import build_objective

    vocabulary = build_vocabulary(config)
    blend = build_blend(config, vocabulary)
    objective = build_objective(config.objective, config.lengths, vocabulary)
    dataset = SampleDataset(blend, blend.locate, objective, config.model.vocab_size)
    for first in count(0, BATCH_SIZE):
        yield dataset.arrays(np.arange(first, first + BATCH_SIZE))


def our_loader(config: RunConfig) -> Iterator[Any]:
    """Iterate over the train loader, which has one worker."""
    from lmscale.feed.loader import build_train_loader
    from lmscale.optim.batch_ramp import sizes_of
    from lmscale.optim.steps import Steps

    return build_train_loader(config, 0, 1, Steps(sizes_of(config), 0, 0, config.train.train_tokens))


def word_piece_tokenizer(corpus: Corpus) -> SimpleNamespace:
    """Give the corpus' tokenizer the names that megatron-core asks for; a piece inside a word begins with ##."""
    from lmscale.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(corpus.tokenizer)
    marks = ["" if starts else "##" for starts in tokenizer.word_starts().tolist()]
    return SimpleNamespace(
        cls=tokenizer.cls_id,
        sep=tokenizer.sep_id,
        mask=tokenizer.mask_id,
        pad=tokenizer.pad_id,
        bos=tokenizer.bos_id,
        eos=tokenizer.eos_id,
        additional_special_tokens_ids=tokenizer.sentinel_ids,
        inv_vocab={number: f"{mark}{number}" for number, mark in enumerate(marks)},
        unique_identifiers={"class": "none"},
    )


def their_dataset(corpus: Corpus, name: str) -> Any:
    """Build one of megatron-core's data sets."""
    import numpy as np
    from megatron.core.datasets.bert_dataset import BERTMaskedWordPieceDataset, BERTMaskedWordPieceDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.t5_dataset import T5MaskedWordPieceDataset, T5MaskedWordPieceDatasetConfig
    from megatron.core.datasets.utils import Split

    keys: dict[str, Any] = {
        "random_seed": 1234,
        "sequence_length": SEQ_LENGTH,
        "blend": ([str(corpus.prefix)], None),
        "split": "1,0,0",
        "path_to_cache": str(corpus.prefix.parent / "cache"),
        "tokenizer": word_piece_tokenizer(corpus),
        "masking_probability": 0.15,
        "short_sequence_probability": 0.1,
        "masking_max_ngram": MASKED_AT_ONCE[name],
        "masking_do_full_word": name != THEIR_BERT,
        "masking_do_permutation": False,
        "masking_use_longer_ngrams": False,
        "masking_use_geometric_distribution": True,
    }
    indexed = IndexedDataset(str(corpus.prefix), mmap=True)
    documents = np.arange(len(indexed.document_indices) - 1, dtype=np.int32)
    cut = (indexed, str(corpus.prefix), documents, THEIR_SAMPLES, Split.train)
    with one_rank():
        if name != THEIR_T5:
            return BERTMaskedWordPieceDataset(*cut, BERTMaskedWordPieceDatasetConfig(**keys, classification_head=True))
        return T5MaskedWordPieceDataset(
            *cut, T5MaskedWordPieceDatasetConfig(**keys, sequence_length_decoder=THEIR_DECODER_LENGTH)
        )


def their_batches(dataset: Any, num_workers: int) -> Iterator[dict[str, Any]]:
    """Iterate over megatron-core's data set through torch's data loader."""
    import torch

    return iter(torch.utils.data.DataLoader(dataset, batch_size=BATCH_SIZE, num_workers=num_workers))


def filled(batch: dict[str, Any]) -> float:
    """Return how many tokens of a sample are not padding, in the mean; where nothing tells padding, there is none."""
    import numpy as np

    is_token = [batch[name] > above for name, above in NOT_PADDING.items() if name in batch]
    return np.count_nonzero(is_token[0]) / BATCH_SIZE if is_token else SEQ_LENGTH


def tally(batches: Iterable[dict[str, Any]], fill: list[float]) -> Iterator[dict[str, Any]]:
    """Note how far each batch is filled, which takes less than a hundredth of the time to make it."""
    for batch in batches:
        fill.append(filled(batch))
        yield batch


def objective_rates(corpus: Corpus, rounds: int, seconds: float) -> tuple[dict[str, float], dict[str, float]]:
    """Measure samples per second of CPU time of every side, and the tokens that fill a sample, on one core."""
    sides = {name: our_batches(configure(corpus, objective)) for name, objective in OBJECTIVES.items()}
    sides |= {name: their_batches(their_dataset(corpus, name), 0) for name in MASKED_AT_ONCE}

    fills: dict[str, list[float]] = {name: [] for name in sides}

    def measure(name: str) -> Callable[[], float]:
        batches = tally(sides[name], fills[name])
        return lambda: samples_per_second(batches, seconds, BATCH_SIZE, time.process_time)

    measured = {name: measure(name) for name in sides}
    measured[CUT_TOO] = lambda: cut_rate(configure(corpus, OBJECTIVES["bert"]))
    with one_core():
        rates = median_rates(measured, rounds)
    rates[CUT_TOO] = 1 / (1 / rates["bert"] + 1 / rates[CUT_TOO])
    return rates, {name: statistics.fmean(fill) for name, fill in fills.items()}


def worker_rates(corpus: Corpus, rounds: int, seconds: float) -> dict[str, float]:
    """Measure samples/s of both loaders of bert with one worker, on all cores."""
    config, dataset = configure(corpus, OBJECTIVES["bert"]), their_dataset(corpus, THEIR_BERT)
    sides = {
        THEIR_BERT: lambda: samples_per_second(their_batches(dataset, 1), seconds, BATCH_SIZE),
        "lmscale": lambda: samples_per_second(our_loader(config), seconds, BATCH_SIZE),
    }
    return median_rates(sides, rounds)


def waits(corpus: Corpus, name: str) -> tuple[float, float]:
    """Train a small model on an objective and return the seconds of a step and the share of it that waits for data.

    One rank computes, one worker makes the batches. Medians over the steps behind the first.
    """
    from lmscale.config.io import show
    from lmscale.monitor.metrics import PERF_DATA_WAIT_FRACTION, PERF_STEP_TIME_S

    home = corpus.prefix.parent / f"waits-{WAITING.index(name)}"
    layers = WAIT_LAYERS // 2 if OBJECTIVES[name]["name"] in ("t5", "bart") else WAIT_LAYERS  # of each stack
    overrides = [
        *(f"model.num_layers={layers}", "model.hidden_size=384", "model.num_attention_heads=6"),
        *(f"batch.micro_batch_size={WAIT_BATCH_SIZE}", f"batch.global_batch_size={WAIT_BATCH_SIZE}"),
        *(f"train.stop_at_step={WAIT_STEPS}", "train.log_interval=1", "train.eval_interval=0"),
        *("checkpoint.save_interval=0", "monitor.tensorboard=false", f"output_dir={home}"),
    ]
    config = corpus.prefix.parent / f"{home.name}.yaml"
    config.write_text(show(configure(corpus, OBJECTIVES[name], overrides)))
    done = subprocess.run(
        [sys.executable, "-m", "lmscale.pretrain", "--config", str(config)],
        env=os.environ | LONE_RANK,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    records = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()][1:]
    medians = (
        statistics.median(record[tag] for record in records) for tag in (PERF_STEP_TIME_S, PERF_DATA_WAIT_FRACTION)
    )
    return next(medians), next(medians)


def waits_table(measured: dict[str, tuple[float, float]]) -> Table:
    """Tabulate the waits."""
    title = (
        f"Training step of one rank, {WAIT_BATCH_SIZE} x {SEQ_LENGTH} tokens, {WAIT_LAYERS} layers of 384; one worker"
    )
    table = Table(title=title)
    for column in ("objective", "s", "waits for data", "goal"):
        table.add_column(column, justify="left" if column == "objective" else "right")
    for name, (seconds, share) in measured.items():
        table.add_row(name, f"{seconds:.2f}", f"{share:.3%}", f"< {GOAL_OF_WAIT:.0%}")
    return table


def objectives_table(rates: dict[str, float], tokens: dict[str, float]) -> Table:
    """Tabulate the objectives, each beside its peer."""
    table = Table(title=f"Objectives: samples/s on one core, length {SEQ_LENGTH}", caption=NOTE, caption_justify="left")
    for column in ("objective", "samples/s", "filled", "of megatron-core", "goal"):
        table.add_column(column, justify="left" if column == "objective" else "right")
    for name in ROWS:
        peer = name if name in MASKED_AT_ONCE else PEERS.get(name)
        ratio = f"{rates[name] / rates[peer]:.1f}" if peer else ""
        goal = GOALS.get(name.split(",")[0])
        shown = f"{tokens[name]:.0f}" if name in tokens else ""
        table.add_row(name, f"{rates[name]:,.0f}", shown, ratio, f"{goal:,}" if goal else "")
    return table


def worker_table(rates: dict[str, float]) -> Table:
    """Tabulate the loaders."""
    table = Table(title=f"Loader of bert: samples/s of {SEQ_LENGTH} tokens, in batches of {BATCH_SIZE}, one worker")
    for column in ("loader", "samples/s", "of megatron-core"):
        table.add_column(column, justify="left" if column == "loader" else "right")
    for name, rate in rates.items():
        table.add_row(name, f"{rate:,.0f}", f"{rate / rates[THEIR_BERT]:.1f}")
    return table


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a run")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of the libraries that are measured
    console = Console()
    with tempfile.TemporaryDirectory() as directory:
        text = Path(directory) / "stdlib.jsonl"
        write_text(text, copies=1)
        corpus = make_corpus(text, VOCAB_SIZE)
        console.print(objectives_table(*objective_rates(corpus, options.rounds, options.seconds)))
        console.print(worker_table(worker_rates(corpus, options.rounds, options.seconds)))
        console.print(waits_table({name: waits(corpus, name) for name in WAITING}))


if __name__ == "__main__":
    main()
