"""Going back to a checkpoint in a running run."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lmscale.errors import FaultError
from lmscale.log import get_logger
from lmscale.train.checkpoint import load_checkpoint
from lmscale.train.fault_watch import FaultWatch
from lmscale.train.faults import rewound

if TYPE_CHECKING:
    from lmscale.train.loop import Run

_log = get_logger(__name__)


def rewind(run: Run, watch: FaultWatch) -> None:
    """Put a run back to its newest checkpoint, so that it passes over the offending step when it comes there again.

    From there on it is, bit for bit, the run that has the step in train.skip_steps. What the policy did stays known, and
    the records after the checkpoint are cut off.

    Raises:
        FaultError: on every rank, if there is no checkpoint of an earlier step.
    Collectives: every rank must call.
    """
    assert watch.verdict is not None
    assert run.batches_from is not None
    kind, step = watch.verdict.kind, run.progress.step
    with run.throughput.paused():
        run.saver.finish()
        reader = run.newest_good()
        if reader is None or reader.progress.step >= step:
            raise FaultError(
                f"step {step}: {watch.verdict.finding}, and there is no checkpoint of an earlier step to go back to",
                field=f"faults.{kind}.action",
                value="rewind",
                remedy="lower checkpoint.save_interval, or use skip",
            )
        # What a running optimizer has counted and gathered is not the checkpoint's.
        run.engine.basic_optimizer.state.clear()
        saved = load_checkpoint(run.engine, reader)
        faults = rewound(run.progress.faults, saved.faults, kind, run.config.faults, step, saved.step)
        run.progress = replace(saved, faults=faults)
        if isinstance(run.batches, Generator):
            run.batches.close()  # ends its workers
        run.batches = run.batches_from(run.progress)
        run.reopen_writers(saved.step)
        if run.best is not None:
            run.best.restart(Path(run.config.output_dir) / "metrics.jsonl", saved.step)
    run.throughput.restart()
    first, last = faults.skips[-1]
    skipped = f"step {last}" if first == last else f"steps {first} to {last}"
    _log.warning("rewound to %s; %s will be skipped", reader.path, skipped)
