"""The training loop: step, measure, evaluate, save, until the tokens are spent or somebody asks to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lmscale.config.run import RunConfig
from lmscale.feed.loader import HeldOut
from lmscale.log import get_logger
from lmscale.monitor import metrics
from lmscale.monitor.console import ConsoleLike
from lmscale.monitor.metrics import Record
from lmscale.monitor.throughput import Throughput, Work
from lmscale.monitor.writers import Writer
from lmscale.optim.batch_ramp import Sizes
from lmscale.optim.lr import lr_at, weight_decay_at
from lmscale.train.best import Best
from lmscale.train.checkpoint_reader import CheckpointReader
from lmscale.train.engine import Engine, MicroBatch, StepResult
from lmscale.train.fault_watch import FaultWatch
from lmscale.train.first_steps import FirstSteps
from lmscale.train.progress import Progress
from lmscale.train.pulse import Phase, Pulse
from lmscale.train.resilience import Request, Requests
from lmscale.train.retention import EPHEMERAL, REGULAR
from lmscale.train.rewind import rewind
from lmscale.train.saving import Saver
from lmscale.train.validate import validate
from lmscale.train.watching import Watching

_log = get_logger(__name__)


@dataclass
class Run:
    """What the loop works with; `pretrain` builds it."""

    config: RunConfig
    engine: Engine
    sizes: Sizes
    batches: Iterator[MicroBatch] | None
    held_out: dict[str, HeldOut]
    progress: Progress
    throughput: Throughput
    work_at: Callable[[int], Work]
    """Nominal tokens of a sample -> what a token of it costs."""
    writers: list[Writer]
    console: ConsoleLike
    requests: Requests
    saver: Saver
    evaluate: Callable[[], dict[str, float]] | None = None
    """Measures what is held out, in the place of the loss of held_out."""
    samples: Callable[[int], list[tuple[str, str]]] | None = None
    """Step -> prompts, and what the model writes behind them; asked with each evaluation."""
    best: Best | None = None
    """Keeps the best checkpoint by a metric of evaluate, and ends the run where it gets no better."""
    pulse: Pulse = field(default_factory=Pulse)
    """Told where the loop is; a watchdog may look at it."""
    batches_from: Callable[[Progress], Iterator[MicroBatch] | None] | None = None
    """Opens the training data anew, from where the run is; for a rewind."""
    newest_good: Callable[[], CheckpointReader | None] = lambda: None
    """Opens the run's newest good checkpoint, if there is one; for a rewind."""
    reopen_writers: Callable[[int], None] = lambda step: None
    """Cuts what the writers hold back to a step, on every rank together; for a rewind."""

    @property
    def checkpoints(self) -> Path:
        """The directory of checkpoints."""
        return Path(self.config.output_dir) / "checkpoints"

    @property
    def is_over(self) -> bool:
        """Whether the run has trained as far as it should."""
        train = self.config.train
        if self.best is not None and self.best.is_exhausted:
            return True
        return self.progress.consumed_tokens >= train.train_tokens or self.progress.step == train.stop_at_step


def train(run: Run) -> bool:
    """Train until the run is over.

    Returns:
        True where the run was asked to stop before its end; it is saved in both cases.
    Collectives: every rank must call.
    """
    watching = Watching(run)
    try:
        return _train(run, watching)
    finally:
        watching.close()


def _train(run: Run, watching: Watching) -> bool:
    config, losses = run.config, LossWindow(run.engine.topology.device)
    watch = FaultWatch(config, is_first=run.engine.topology.rank == 0)
    first_steps, memory = FirstSteps(config, run.engine), {}
    run.throughput.restart()
    stopped = False
    while not run.is_over and not stopped:
        run.pulse.enter(Phase.DATA, run.progress.step + 1)
        watch.begin(run.progress)
        if watch.passes_over(run.progress.step + 1):
            result, (lr, batch_size) = None, _pass_over(run)
        else:
            with first_steps.timed(), watching.step():
                result, lr, batch_size = _step(run, watch)
            run.pulse.enter(Phase.AGREE)
            lines, found = first_steps.report(result, batch_size)
            for line in lines:
                run.console.message(line)
            memory |= found
            if not result.is_withheld:
                losses.add(result.loss)
        if watch.wants_rewind:
            run.pulse.enter(Phase.START)
            rewind(run, watch)
            losses.take()
            continue
        request = run.requests.agreed()
        stopped = request is Request.STOP
        step, ends, is_best = run.progress.step, run.is_over or stopped, False
        is_logged = step % config.train.log_interval == 0 or ends
        values: dict[str, Any] = watch.take_values()
        if is_logged:
            values, memory = values | _values(run, result, losses, lr, batch_size) | memory, {}
            values |= watching.values()
        if _is_due(step, config.train.eval_interval) or run.is_over:
            run.pulse.enter(Phase.EVALUATE)
            with run.throughput.paused():
                held_out = run.evaluate() if run.evaluate else validate(run.engine, run.held_out)
            is_best = run.best is not None and run.best.update(step, held_out)
            watching.after_evaluation(step)
            values |= held_out
        if values:
            _record(run, values)
        watching.after_step(step)
        if watch.wants_end:
            run.saver.finish()  # of a good state, begun before
            watch.end()
        is_due = _is_due(step, config.checkpoint.save_interval) or request is Request.SAVE or is_best
        if is_due or ends or run.is_over:
            _save(run, REGULAR, is_last=ends or run.is_over)
        elif request is Request.SAVE_EPHEMERAL:
            _save(run, EPHEMERAL)
        run.saver.poll()
    run.pulse.enter(Phase.FINISH)
    return stopped and not run.is_over


def _pass_over(run: Run) -> tuple[float, int]:
    """Consume the samples of a step without training on them, and return its rate and batch size."""
    progress = run.progress
    size = run.sizes.at(progress.consumed_samples, progress.consumed_tokens)
    run.progress = progress.after_step(size.batch_size, size.tokens, is_skipped=True)
    return lr_at(run.progress.consumed_tokens, run.config.optim, run.config.train.train_tokens), size.batch_size


def _step(run: Run, watch: FaultWatch) -> tuple[StepResult, float, int]:
    """Train one optimizer step and advance the progress."""
    config, engine, progress = run.config, run.engine, run.progress
    size = run.sizes.at(progress.consumed_samples, progress.consumed_tokens)
    batch_size, tokens = size.batch_size, size.tokens
    num_micro_batches = batch_size // (config.batch.micro_batch_size * engine.topology.dp_size)
    clock = (progress.consumed_tokens + tokens, config.optim, config.train.train_tokens)
    lr = lr_at(*clock)
    with run.throughput.waiting():
        micro_batches = [next(run.batches) for _ in range(num_micro_batches)] if run.batches else []
    step, weight_decay = progress.step + 1, weight_decay_at(*clock)
    result = engine.train_step(
        micro_batches, num_micro_batches, step, lr, weight_decay, size.seq_length, watch.withholds
    )
    run.progress = progress.after_step(batch_size, tokens, result.is_skipped, watch.seen(step))
    run.throughput.step_done(tokens, run.work_at(size.seq_length))
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

    def take(self) -> float | None:
        """Return the mean since the last call, None where nothing was trained since, and start afresh."""
        mean = float(self._sum) / self._steps if self._steps else None
        self._sum.zero_()
        self._steps = 0
        return mean


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _values(run: Run, result: StepResult | None, losses: LossWindow, lr: float, batch_size: int) -> dict[str, Any]:
    """Collect what a record of the training steps holds."""
    values: dict[str, Any] = {
        metrics.TRAIN_LM_LOSS: losses.take(),
        metrics.TRAIN_GRAD_NORM: None if result is None else result.grad_norm,
        metrics.TRAIN_PARAM_NORM: run.engine.parameter_norm(),
        metrics.TRAIN_LR: lr,
        metrics.TRAIN_GLOBAL_BATCH_SIZE: batch_size,
        metrics.MEMORY_PEAK_BYTES: run.engine.peak_bytes(),
        **run.throughput.window(),
    }
    values |= {
        metrics.CHECKPOINT_STALL_S: run.saver.stalled_s,
        metrics.CHECKPOINT_FAILED_SAVES: run.saver.num_failed,
    }
    for tag in (metrics.MEMORY_PEAK_BYTES, metrics.PERF_DATA_WAIT_FRACTION, metrics.CHECKPOINT_STALL_S):
        if tag in values:  # a window without a trained step has no times
            values[tag] = run.engine.maximum(values[tag])
    if run.config.precision == "fp16":
        values[metrics.TRAIN_LOSS_SCALE] = run.engine.loss_scale if result is None else result.loss_scale
    if run.config.precision == "fp16" or run.progress.skipped_steps:
        values[metrics.TRAIN_SKIPPED_STEPS] = run.progress.skipped_steps
    return {tag: value for tag, value in values.items() if value is not None}


def _record(run: Run, values: dict[str, Any]) -> None:
    progress = run.progress
    record = Record(progress.step, progress.consumed_samples, progress.consumed_tokens, values)
    run.console.update(record)
    for writer in run.writers:
        writer.write(record)


def _save(run: Run, kind: str, *, is_last: bool = False) -> None:
    best = None if run.best is None else run.best.step
    run.pulse.enter(Phase.SAVE)
    with run.throughput.paused():
        run.saver.save(run.progress, kind=kind, protected=best, is_last=is_last)
    run.requests.saved()
