"""Where tools/drill.py breaks runs: a corpus, a run that nothing happened to, copies of its beginning to break."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmscale.config.checkpoint_paths import find_checkpoint, step_directory
from lmscale.config.io import parse_run
from lmscale.data.manifest import Manifest
from lmscale.data.writer import CorpusWriter
from lmscale.parallel.local_ranks import RankFailure, RankPool
from lmscale.pretrain import pretrain
from lmscale.train.checkpoint_files import check_hashes, read_manifest, stored_files

Keys = dict[str, Any]
__all__ = ["Broken", "NotHere", "Site", "step_directory"]

RANKS = 2
STEPS, SAVED = 6, 2
"""Of the whole run; and of the checkpoint that a drill begins with."""
TIMEOUT_S = 120.0


class NotHere(Exception):
    """A drill needs what this machine does not give."""


class Broken(Exception):
    """A promise was not kept."""


@dataclass
class Site:
    """A directory with a corpus, the run that nothing happened to, and that run's beginning.

    Attributes:
        reference: the loss of each of its steps.
    """

    directory: Path
    reference: list[float] | None = None
    _count: int = 0

    def prepare(self) -> None:
        """Make the corpus, train the whole run, and its beginning."""
        write_corpus(self.directory / "corpus")
        whole = self.keys(self.directory / "whole")
        self.train(whole)
        self.reference = losses(whole)
        self.train(self.keys(self.directory / "start", train__stop_at_step=SAVED))

    def keys(self, output_dir: Path, **changes: Any) -> Keys:
        """Make the config of the run; `changes` are dotted keys with __ in the place of the dot."""
        keys: Keys = {
            "model": {
                "num_layers": 2,
                "hidden_size": 32,
                "num_attention_heads": 4,
                "vocab_size": 500,
                "max_position_embeddings": 32,
                "hidden_dropout": 0.1,
            },
            "data": {
                "train": [{"prefix": str(self.directory / "corpus")}],
                "split": "90,10,0",
                "seq_length": 32,
                "num_workers": 0,
            },
            "batch": {"micro_batch_size": 2, "global_batch_size": 4},
            "optim": {"name": "adamw", "lr": 1.0e-3},
            "train": {"train_tokens": 4 * 32 * STEPS, "log_interval": 1, "eval_interval": 0, "eval_batches": 1},
            "checkpoint": {"save_interval": 2, "keep": 0},
            "monitor": {"tensorboard": False},
            "deepspeed": {"zero_optimization": {"stage": 1}},
            "output_dir": str(output_dir),
        }
        for path, value in changes.items():
            section, _, name = path.partition("__")
            keys.setdefault(section, {})[name] = value
        return keys

    def fresh(self, **changes: Any) -> Keys:
        """Copy the run's beginning, and return the keys of the copy."""
        self._count += 1
        copy = self.directory / f"run-{self._count}"
        shutil.copytree(self.directory / "start", copy)
        return self.keys(copy, **changes)

    def train(self, keys: Keys, do: Callable[..., Any] | None = None, *arguments: Any, **options: Any) -> list[Any]:
        """Train a run on ranks forked for it, with something done on every rank; return what it returns.

        Raises:
            RankFailure: if a rank raises, dies or hangs.
        """
        with RankPool(RANKS, logs=Path(keys["output_dir"]) / "logs") as pool:
            return pool.run(do or pretrain_in_rank, keys, *arguments, timeout_s=TIMEOUT_S, **options)

    def breaks(self, keys: Keys, do: Callable[..., Any], *arguments: Any, **options: Any) -> str:
        """Train a run that must fail, and return the reason, in one line."""
        try:
            self.train(keys, do, *arguments, **options)
        except RankFailure as failure:
            return failure.reason
        raise Broken("the run went on to its end: the fault had no effect")

    def recovers(self, keys: Keys, first_step: int | None = SAVED) -> str:
        """Give the same command again, and check that the run ends as if nothing had happened.

        Args:
            keys: of the run.
            first_step: of the checkpoint that it must go on from; None takes any.
        """
        newest = check_all(keys)
        self.train(keys)
        if losses(keys) != self.reference:
            raise Broken(f"losses {losses(keys)} in the place of {self.reference}")
        if tensors(keys) != tensors(self.keys(self.directory / "whole")):
            raise Broken("weights or moments differ from those of the run that nothing happened to")
        left = [path.name for path in checkpoints(keys).glob(".*")]
        if left:
            raise Broken(f"left behind: {', '.join(left)}")
        found = resumed_step(keys)
        if first_step is not None and found != first_step:
            raise Broken(f"resumed from step {found}, not {first_step}; the newest whole one was {newest}")
        shutil.rmtree(keys["output_dir"])
        return f"resumed from step {found}; the end is that of the whole run, bit for bit"


def pretrain_in_rank(keys: Keys) -> int:
    """Train a run on this rank."""
    return pretrain(parse_run(keys))


def checkpoints(keys: Keys) -> Path:
    """Return a run's directory of checkpoints."""
    return Path(keys["output_dir"]) / "checkpoints"


def losses(keys: Keys) -> list[float]:
    """Read the loss of each step of a run."""
    lines = Path(keys["output_dir"], "metrics.jsonl").read_text().splitlines()
    return [record["train/lm_loss"] for record in map(json.loads, lines) if "train/lm_loss" in record]


def tensors(keys: Keys) -> dict[str, str | None]:
    """Read the hashes of the tensor files of a run's newest checkpoint: weights, moments, every bit of them."""
    newest = find_checkpoint(checkpoints(keys))
    assert newest is not None
    files = stored_files(read_manifest(newest))
    return {name: file.sha256 for name, file in files.items() if name.endswith(".safetensors")}


def check_all(keys: Keys) -> str:
    """Verify every directory that is called a checkpoint, and return the newest; `latest` must name one."""
    for path in sorted(checkpoints(keys).glob("step-*")):
        verify(path)
    newest = find_checkpoint(checkpoints(keys))
    if newest is None:
        raise Broken("no checkpoint is left")
    return newest.name


def verify(path: Path) -> None:
    """Compare all files of a checkpoint with their hashes."""
    check_hashes(path, stored_files(read_manifest(path)))


def resumed_step(keys: Keys) -> int | None:
    """Read from which step the newest checkpoint's run was resumed."""
    newest = find_checkpoint(checkpoints(keys))
    assert newest is not None
    origin = read_manifest(newest)["resumed_from"]
    return None if origin is None else int(origin["step"])


def write_corpus(prefix: Path, num_tokens: int = 8_000) -> None:
    """Write documents of random tokens, small ids the most frequent."""
    rng = np.random.default_rng(7)
    with CorpusWriter(str(prefix), np.uint16) as writer:
        while writer.num_tokens < num_tokens:
            length = int(rng.integers(2, 200))
            tokens = np.append(1 + (499 * rng.random(length - 1) ** 3).astype(np.uint16), 0)
            writer.append(tokens.astype(np.uint16).tobytes(), np.array([length], np.int32))
        counts: dict[str, Any] = {"documents": writer.num_documents, "tokens": writer.num_tokens}
        writer.finish(
            lambda digest, size: Manifest("", 500, None, skipped={}, idx_sha256=digest, bin_bytes=size, **counts)
        )
