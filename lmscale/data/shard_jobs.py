"""`lmscale tokenize --executor`: a corpus in shards, each encoded by a task of datatrove, on this host, under Slurm or Ray.

datatrove spreads the tasks and notes which are done; a task encodes its files with `encode_corpus`, into .bin, .idx and
.json of its own. A shard counts as done when these are whole and were made from the same files in the same way. When all
are, their list appears, and the corpus can be read.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmscale.config.data import TokenizerConfig
from lmscale.data.corpus import expand_inputs
from lmscale.data.encode import EncodeResult, encode_corpus
from lmscale.data.index_file import bin_path, idx_path
from lmscale.data.manifest import read_manifest, sha256_of_file
from lmscale.data.readers import Reader
from lmscale.data.shards import shard_prefix
from lmscale.data.tokenizer import load_tokenizer


@dataclass(frozen=True)
class ShardJob:
    """What the tasks of a corpus share; a file in the directory of the job holds it, for every host to read."""

    prefix: str
    """Of the corpus, absolute."""
    files: tuple[tuple[str, ...], ...]
    """Of each shard, absolute, in the order of the whole."""
    tokenizer: TokenizerConfig
    reader: Reader
    strict: bool
    workers: int
    """Processes that encode a shard."""
    tokenizer_hash: str

    @property
    def directory(self) -> Path:
        """Where the job's own files lie: logs, and what datatrove notes."""
        return Path(f"{self.prefix}.shards")

    def made_from(self, number: int) -> str:
        """Identify a shard's content: its files by name, size and time, the tokenizer, the reader."""
        stats = [(name, os.stat(name).st_size, os.stat(name).st_mtime_ns) for name in self.files[number]]
        what = [stats, self.tokenizer_hash, type(self.reader).__name__, repr(self.reader), self.strict]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def is_done(self, number: int) -> bool:
        """Tell whether a shard is whole and made from what the job names."""
        prefix = shard_prefix(self.prefix, number)
        if not idx_path(prefix).is_file() or not bin_path(prefix).is_file():
            return False
        manifest = read_manifest(prefix, sha256_of_file(idx_path(prefix)))
        if manifest is None or manifest.bin_bytes != bin_path(prefix).stat().st_size:
            return False
        return manifest.made_from == self.made_from(number)

    def missing(self) -> list[int]:
        """List the shards that are not done."""
        return [number for number in range(len(self.files)) if not self.is_done(number)]

    def encode(self, number: int) -> EncodeResult:
        """Encode a shard, whatever is there."""
        made_from = self.made_from(number)
        inputs = [glob.escape(name) for name in self.files[number]]
        prefix = shard_prefix(self.prefix, number)
        return encode_corpus(
            inputs, self.tokenizer, prefix, self.workers, self.reader, self.strict, made_from=made_from
        )


class EncodeShard:
    """A step of datatrove's: its task of a number encodes the shard of that number."""

    def __init__(self, job_file: str):
        self.job_file = job_file

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        """Encode a shard, unless it is done: what datatrove notes may be of an earlier job."""
        job = load_job(Path(self.job_file))
        if not job.is_done(rank):
            job.encode(rank)


def make_job(
    inputs: Sequence[str],
    tokenizer: TokenizerConfig,
    prefix: str | Path,
    shards: int,
    reader: Reader,
    strict: bool = False,
    workers: int = 1,
) -> ShardJob:
    """Divide the files over shards, in order and by their sizes; a file is never divided.

    Raises:
        DataError: if a glob matches nothing or the tokenizer cannot be used.
    """
    paths = [path.absolute() for path in expand_inputs(inputs)]
    config = tokenizer.model_copy(update={"path": str(Path(tokenizer.path).absolute())})
    content_hash = load_tokenizer(config).content_hash
    files = tuple(tuple(map(str, part)) for part in divided(paths, [path.stat().st_size for path in paths], shards))
    return ShardJob(str(Path(prefix).absolute()), files, config, reader, strict, workers, content_hash)


def divided(paths: Sequence[Path], sizes: Sequence[int], parts: int) -> list[list[Path]]:
    """Cut a list into at most `parts` runs of about the same size: a file goes where its middle lies."""
    total, before = max(1, sum(sizes)), 0
    found: dict[int, list[Path]] = {}
    for path, size in zip(paths, sizes, strict=True):
        found.setdefault(min(parts - 1, (2 * before + size) * parts // (2 * total)), []).append(path)
        before += size
    return [found[number] for number in sorted(found)]


def save_job(job: ShardJob) -> Path:
    """Write the job where every host finds it, and return the file."""
    job.directory.mkdir(parents=True, exist_ok=True)
    path = job.directory / "job.pickle"
    partial = path.with_suffix(".partial")
    partial.write_bytes(pickle.dumps(job))
    partial.replace(path)
    return path


def load_job(path: Path) -> ShardJob:
    """Read what `save_job` wrote: a file of our own making, not one that users exchange."""
    job: ShardJob = pickle.loads(path.read_bytes())
    return job
