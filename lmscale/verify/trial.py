"""One layout: train the shrunk run on its ranks, by the code that trains the user's, and read the metrics back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lmscale.config.io import show
from lmscale.config.run import RunConfig, ZeroChoice
from lmscale.finetune import finetune
from lmscale.log import setup_logging
from lmscale.monitor import metrics
from lmscale.parallel.local_ranks import RankPool
from lmscale.parallel.topology import init_topology
from lmscale.pretrain import build_engine, pretrain
from lmscale.train.progress import Progress
from lmscale.train.saving import save_checkpoint
from lmscale.verify.adapted import base_of

TIMEOUT_S = 300.0
LOGS = "logs"

Series = list[tuple[float, float]]
"""Of each step, the loss and the gradient norm."""


def train_on_ranks(config: RunConfig, num_ranks: int, is_pipeline: bool, tick: Callable[[], None]) -> Series:
    """Train a run on ranks of its own, forked for it and gone afterwards.

    Raises:
        RankFailure: if a rank raises, dies or hangs; its log, in output_dir, has the traceback.
    """
    output_dir = Path(config.output_dir)
    with RankPool(num_ranks, logs=output_dir / LOGS) as pool:
        pool.run(_train, config.model_dump(), is_pipeline, timeout_s=TIMEOUT_S, tick=tick)
    return _read(output_dir / "metrics.jsonl")


def _train(keys: dict[str, Any], is_pipeline: bool) -> int:
    """Do on a rank what `lmscale.pretrain` does."""
    setup_logging(dist.get_rank(), Path(keys["output_dir"]) / LOGS)
    config = RunConfig.model_validate(keys)
    run = pretrain if config.adapt is None and config.task is None else finetune
    return run(config, pipeline=is_pipeline or None)


def write_base(config: RunConfig, directory: Path, tick: Callable[[], None]) -> str:
    """Write the base that a shrunk run adapts, of random weights, and return its path.

    Raises:
        RankFailure: as of `train_on_ranks`.
    """
    base = base_of(config)
    with RankPool(1, logs=directory / LOGS) as pool:
        (path,) = pool.run(_write_base, base.model_dump(), str(directory), timeout_s=TIMEOUT_S, tick=tick)
    return str(path)


def _write_base(keys: dict[str, Any], directory: str) -> str:
    config = RunConfig.model_validate(keys)
    engine = build_engine(config, init_topology(1, 1), ZeroChoice())
    return str(save_checkpoint(engine, Path(directory), Progress(), show(config)))


def _read(path: Path) -> Series:
    """Read losses and norms; a value that was not finite, null in the file, is NaN."""
    tags = (metrics.TRAIN_LM_LOSS, metrics.TRAIN_GRAD_NORM)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [[math.nan if record.get(tag) is None else float(record[tag]) for tag in tags] for record in records]
    return [(loss, norm) for loss, norm in rows]
