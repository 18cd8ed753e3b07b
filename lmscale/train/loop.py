"""The training loop: step, measure, evaluate, save, until the tokens are spent or somebody asks to stop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmscale.config.io import show
from lmscale.config.run import RunConfig
from lmscale.feed.loader import HeldOut
from lmscale.log import get_logger
from lmscale.monitor import metrics
from lmscale.monitor.console import ConsoleLike
from lmscale.monitor.metrics import Record
from lmscale.monitor.throughput import Throughput
from lmscale.monitor.writers import Writer
from lmscale.optim.batch_ramp import batch_size_at
from lmscale.optim.lr import lr_at
from lmscale.train.checkpoint import save_checkpoint
from lmscale.train.engine import Engine, MicroBatch, StepResult
from lmscale.train.progress import Progress
from lmscale.train.resilience import Request, Requests
from lmscale.train.validate import validate

_log = get_logger(__name__)


@dataclass
class Run:
    """What the loop works with; `pretrain` builds it."""

    config: RunConfig
    engine: Engine
    batches: Iterator[MicroBatch] | None
    held_out: dict[str, HeldOut]
    progress: Progress
    throughput: Throughput
    writers: list[Writer]
    console: ConsoleLike
    requests: Requests
    tokenizer: Path | None

    @property
    def checkpoints(self) -> Path:
        """The directory of checkpoints."""
        return Path(self.config.output_dir) / "checkpoints"

    @property
    def is_over(self) -> bool:
        """Whether the run has trained as far as it should."""
        train = self.config.train
        return self.progress.consumed_tokens >= train.train_tokens or self.progress.step == train.stop_at_step


def train(run: Run) -> bool:
    """Train until the run is over.

    Returns:
        True where the run was asked to stop before its end; it is saved in both cases.
    Collectives: every rank must call.
    """
    config, losses = run.config, LossWindow(run.engine.topology.device)
    run.throughput.restart()
    stopped = False
    while not run.is_over and not stopped:
        result, lr, batch_size = _step(run)
        losses.add(result.loss)
        request = run.requests.agreed()
        stopped = request is Request.STOP
        step, ends = run.progress.step, run.is_over or stopped
        is_logged = step % config.train.log_interval == 0 or ends
        values = _values(run, result, losses, lr, batch_size) if is_logged else {}
        if _is_due(step, config.train.eval_interval) or run.is_over:
            with run.throughput.paused():
                values |= validate(run.engine, run.held_out)
        if values:
            _record(run, values)
        if _is_due(step, config.checkpoint.save_interval) or ends or request is Request.SAVE:
            with run.throughput.paused():
                _save(run)
    return stopped and not run.is_over


def _step(run: Run) -> tuple[StepResult, float, int]:
    """Train one optimizer step and advance the progress."""
    config, engine, progress = run.config, run.engine, run.progress
    batch_size = batch_size_at(progress.consumed_samples, config.batch)
    tokens = batch_size * config.lengths.nominal
    num_micro_batches = batch_size // (config.batch.micro_batch_size * engine.topology.dp_size)
    lr = lr_at(progress.consumed_tokens + tokens, config.optim, config.train.train_tokens)
    with run.throughput.waiting():
        micro_batches = [next(run.batches) for _ in range(num_micro_batches)] if run.batches else []
    result = engine.train_step(micro_batches, num_micro_batches, progress.step + 1, lr)
    run.progress = progress.after_step(batch_size, tokens, result.is_skipped)
    run.throughput.step_done(tokens)
    return result, lr, batch_size


class LossWindow:
    """Averages the loss over the steps since the last record, on the device."""

    def __init__(self, device: torch.device):
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        self._steps = 0

    def add(self, loss: torch.Tensor) -> None:
        """Count a step's loss, a scalar tensor."""
        self._sum += loss
        self._steps += 1

    def take(self) -> float:
        """Return the mean since the last call and start afresh."""
        mean = float(self._sum) / max(1, self._steps)
        self._sum.zero_()
        self._steps = 0
        return mean


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _values(run: Run, result: StepResult, losses: LossWindow, lr: float, batch_size: int) -> dict[str, Any]:
    """Collect what a record of the training steps holds."""
    values = {
        metrics.TRAIN_LM_LOSS: losses.take(),
        metrics.TRAIN_GRAD_NORM: result.grad_norm,
        metrics.TRAIN_PARAM_NORM: run.engine.parameter_norm(),
        metrics.TRAIN_LR: lr,
        metrics.TRAIN_GLOBAL_BATCH_SIZE: batch_size,
        metrics.MEMORY_PEAK_BYTES: run.engine.peak_bytes(),
        **run.throughput.window(),
    }
    for tag in (metrics.MEMORY_PEAK_BYTES, metrics.PERF_DATA_WAIT_FRACTION):
        values[tag] = run.engine.maximum(values[tag])
    if run.config.precision == "fp16":
        values |= {
            metrics.TRAIN_LOSS_SCALE: result.loss_scale,
            metrics.TRAIN_SKIPPED_STEPS: run.progress.skipped_steps,
        }
    return values


def _record(run: Run, values: dict[str, Any]) -> None:
    progress = run.progress
    record = Record(progress.step, progress.consumed_samples, progress.consumed_tokens, values)
    run.console.update(record)
    for writer in run.writers:
        writer.write(record)


def _save(run: Run) -> None:
    path = save_checkpoint(
        run.engine, run.checkpoints, run.progress, show(run.config), run.tokenizer, run.config.checkpoint.keep
    )
    run.console.message(f"saved {path}")
