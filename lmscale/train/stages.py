"""Which corpora a run has read, and from where on: a change of the blend in mid-run is a stage in every manifest.

No torch: the launcher compares what a run wants to read with what its checkpoint has read.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmscale.config.io import load_run
from lmscale.config.run import RunConfig
from lmscale.data.indexed import IndexedCorpus
from lmscale.data.shards import files_of
from lmscale.errors import LmscaleError
from lmscale.train.progress import Progress

STAGES = "stages"
"""Key of a manifest: a list, each with from_step, from_samples, from_tokens (done before it), seed and train: prefix,
weight and content_hash (None where it is not known) of each corpus."""

Blend = list[dict[str, Any]]
Stage = dict[str, Any]


def blend_of(config: RunConfig, hashes: Mapping[str, str] | None = None) -> Blend:
    """Describe the corpora that a run trains on.

    Args:
        config: the run.
        hashes: prefix -> content hash, where the corpora themselves are not asked.

    Raises:
        DataError: if a corpus that is asked is missing or damaged.
    """
    return [
        {
            "prefix": source.prefix,
            "weight": source.weight,
            "content_hash": _content_hash(source.prefix) if hashes is None else hashes.get(source.prefix),
        }
        for source in config.data.train
    ]


def _content_hash(prefix: str) -> str:
    times = tuple(path.stat().st_mtime_ns for path in files_of(prefix) if path.exists())
    return _hash_once(prefix, times)


@functools.lru_cache(256)
def _hash_once(prefix: str, _: tuple[int, ...]) -> str:
    """Hash a corpus, which reads its whole .idx, once for the files as they are."""
    return IndexedCorpus(prefix).content_hash


def is_same_blend(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether two blends read the same: weights, and content where it is known of both, else prefixes."""
    return len(one) == len(other) and all(map(_is_same_source, one, other))


def _is_same_source(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    known = one["content_hash"] is not None and other["content_hash"] is not None
    key = "content_hash" if known else "prefix"
    return bool(one["weight"] == other["weight"] and one[key] == other[key])


def stages_of(checkpoint: Path, manifest: Mapping[str, Any]) -> list[Stage]:
    """Read the stages of a checkpoint; of an old one, that of its config, and none where that cannot be read."""
    if STAGES in manifest:
        return list(manifest[STAGES])
    try:
        config = load_run(checkpoint / "config.yaml")
    except LmscaleError:
        return []
    return [_stage(Progress(), config, blend_of(config, {}))]


def stages_from_here(config: RunConfig, progress: Progress, former: Sequence[Stage]) -> list[Stage]:
    """List the stages of a run that goes on from a checkpoint, or begins: a new one where blend or seed has changed.

    Args:
        config: the run as it goes on.
        progress: what has been done.
        former: stages of the checkpoint.
    """
    if not config.data.train:
        return []
    past, blend = [stage for stage in former if stage["from_step"] < progress.step], blend_of(config)
    if past and past[-1]["seed"] == config.train.seed and is_same_blend(past[-1]["train"], blend):
        return past
    return [*past, _stage(progress, config, blend)]


def _stage(progress: Progress, config: RunConfig, blend: Blend) -> Stage:
    return {
        "from_step": progress.step,
        "from_samples": progress.consumed_samples,
        "from_tokens": progress.consumed_tokens,
        "seed": config.train.seed,
        "train": blend,
    }
