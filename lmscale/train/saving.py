"""Writing checkpoints: under a temporary name by all ranks, hashed on the way, then one rename, then `latest`.

The course of a save, on every rank:

1. The leader of each directory (lmscale.parallel.filesystems) makes .step-NNNNNNNN.partial.
2. Every rank writes and flushes its slices, behind the training loop where checkpoint.asynchronous is set: from a copy in
   host memory, so that the loop stands for that copy alone.
3. When all have, the leader writes the manifest, flushes the directory, renames it, and replaces `latest`; then it deletes
   what checkpoint.keep and its like let go, which never is the one just written.

A crash before the rename leaves the earlier checkpoints and `latest` as they were; what it leaves besides is removed at the
next start. A failure on one rank is that of all: nothing is renamed.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lmscale.config.checkpoint_paths import step_directory
from lmscale.errors import OutputError
from lmscale.log import get_logger
from lmscale.monitor.manifest import versions
from lmscale.optim.build import update_count
from lmscale.train.checkpoint_files import Piece, StoredFile, flush, seal
from lmscale.train.engine import Engine
from lmscale.train.progress import Progress
from lmscale.train.retention import REGULAR, Keep, point_latest, prune
from lmscale.train.slices import Place, owned_slices, places
from lmscale.train.snapshot import Snapshot
from lmscale.train.tensor_file import write_tensors

_log = get_logger(__name__)
_SCALER_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass
class _Pending:
    """A save under way on this rank."""

    progress: Progress
    fields: dict[str, Any]
    partial: Path
    started_s: float
    protected: int | None
    work: Future[Any]
    is_committing: bool = False


@dataclass(frozen=True)
class Saved:
    """A checkpoint that has been committed."""

    path: Path
    num_bytes: int
    """Of its files, on the leader of a directory; 0 elsewhere."""
    seconds: float
    """From the call to the rename."""


class Saver:
    """Writes the checkpoints of a run.

    Args:
        engine: whose state to write.
        checkpoints: the run's directory of checkpoints.
        config_yaml: the resolved config.
        tokenizer: the tokenizer's file or directory, copied into each checkpoint.
        keep: which checkpoints stay.
        leaders: by rank, the lowest that sees the same directory; left out, all share it.
        asynchronous: write behind the training loop.
        fields: what the manifests say besides, such as the checkpoint that the run was resumed from.
        saved: called on every rank with each checkpoint that has been committed.
        in_use: which checkpoints somebody reads, who would miss them.
        failed: called on every rank with the failure of one, where the save was not the last; what it raises ends the run.

    Attributes:
        stalled_s: seconds that callers stood for saves so far, on this rank.
        num_failed: saves that have failed.
    """

    def __init__(
        self,
        engine: Engine,
        checkpoints: Path,
        config_yaml: str,
        tokenizer: Path | None,
        keep: Keep,
        *,
        leaders: list[int] | None = None,
        asynchronous: bool = False,
        fields: Mapping[str, Any] | None = None,
        saved: Callable[[Saved], None] = lambda saved: None,
        in_use: Callable[[], set[Path]] = set,
        failed: Callable[[OutputError], None] | None = None,
    ):
        topology = engine.topology
        self._engine, self._checkpoints = engine, checkpoints
        self._config_yaml, self._tokenizer, self._keep = config_yaml, tokenizer, keep
        self._places: list[Place] = places(topology, leaders or [0] * topology.world_size)
        self._is_leader = self._places[topology.rank].leader == topology.rank
        self._saved, self._in_use, self._failed = saved, in_use, failed
        self._fields = {**(fields or {}), "versions": versions()}
        self._snapshot = Snapshot(topology.device) if asynchronous else None
        self._worker = ThreadPoolExecutor(1, "checkpoint")
        self._pending: _Pending | None = None
        self.stalled_s, self.num_failed = 0.0, 0

    def save(
        self,
        progress: Progress,
        *,
        kind: str = REGULAR,
        protected: int | None = None,
        fields: Mapping[str, Any] | None = None,
        is_last: bool = False,
    ) -> None:
        """Write a checkpoint, or begin to; where one is under way, wait for it first.

        Args:
            progress: where the run is.
            kind: regular, or ephemeral: one that goes when the next is there.
            protected: the step of one that stays in any case.
            fields: what its manifest says besides.
            is_last: the run ends with it: it is on disk on return, and its failure is raised in any case.

        Raises:
            OutputError: on every rank, if any rank could not write; the earlier checkpoints are as they were.
        Collectives: every rank must call.
        """
        start = time.perf_counter()
        self.finish()
        with self._tolerating(not is_last):
            self._begin(progress, {"kind": kind, **self._fields, **(fields or {})}, protected)
            if is_last or not self._snapshot:
                self._wait()
        self.stalled_s += time.perf_counter() - start

    def poll(self) -> None:
        """Look after a save under way; to be called once a step.

        Raises:
            OutputError: as of `save`.
        Collectives: a maximum over all ranks, while a save is under way.
        """
        if self._pending is None:
            return
        is_busy = torch.full((1,), int(not self._pending.work.done()), device=self._engine.topology.device)
        dist.all_reduce(is_busy, op=dist.ReduceOp.MAX)
        if not is_busy.item():
            with self._tolerating():
                self._advance()

    def finish(self) -> None:
        """Wait for a save under way.

        Raises:
            OutputError: as of `save`.
        Collectives: every rank must call.
        """
        with self._tolerating():
            self._wait()

    @contextlib.contextmanager
    def _tolerating(self, can_go_on: bool = True) -> Iterator[None]:
        """Count a failure, and hand it to who decides whether the run goes on."""
        try:
            yield
        except OutputError as error:
            self.num_failed += 1
            if self._failed is None or not can_go_on:
                raise
            self._failed(error)

    def _wait(self) -> None:
        while self._pending is not None:
            self._pending.work.exception()  # waits; `_advance` looks at it
            self._advance()

    def _begin(self, progress: Progress, fields: dict[str, Any], protected: int | None) -> None:
        engine = self._engine
        partial = self._partial(progress)
        _together(lambda: _make_empty(partial) if self._is_leader else None)
        name = f"rank-{engine.topology.rank:05d}"
        slices = owned_slices(engine, self._places, f"{name}.safetensors")
        pieces = [piece for piece, _ in slices]
        values = [values for _, values in slices]
        if self._snapshot:
            values = self._snapshot.take(values)
        work = self._worker.submit(_write_slices, partial / name, pieces, values)
        fields |= self._state(progress)
        self._pending = _Pending(progress, fields, partial, time.perf_counter(), protected, work)

    def _advance(self) -> None:
        """Go on once every rank's part of the work is done: to the commit, or to the end."""
        pending = self._pending
        assert pending is not None
        message = _agreed_failure(pending.work.exception())
        if message:
            self._pending = None
            if self._is_leader:  # what was written would take the space that the disk lacks
                shutil.rmtree(pending.partial, ignore_errors=True)
            raise _failure(message)
        if not pending.is_committing:
            pending.is_committing = True
            pending.work = self._worker.submit(self._commit if self._is_leader else _nothing, pending)
            return
        self._pending = None
        final = step_directory(self._checkpoints, pending.progress.step)
        self._saved(Saved(final, pending.work.result(), time.perf_counter() - pending.started_s))

    def _state(self, progress: Progress) -> dict[str, Any]:
        """Collect what the manifest says of the state, as it is now."""
        engine, topology = self._engine, self._engine.topology
        return {
            "progress": asdict(progress),
            "optimizer": {"name": type(engine.basic_optimizer).__name__, "step": update_count(engine.basic_optimizer)},
            "loss_scaler": _scaler_state(engine),
            "layout": {
                "tp_size": topology.tp_size,
                "pp_size": topology.pp_size,
                "dp_size": topology.dp_size,
                "zero_stage": engine.zero_stage,
            },
            "num_directories": len({place.leader for place in self._places}),
            "base": None
            if engine.base is None
            else {"path": str(engine.base.path), "weights_hash": engine.base.weights_hash},
        }

    def _commit(self, pending: _Pending) -> int:
        """Of the leader, once all have written: the manifest, the rename, `latest`; then what goes. Returns the bytes."""
        partial, final = pending.partial, step_directory(self._checkpoints, pending.progress.step)
        (partial / "config.yaml").write_text(self._config_yaml)
        if self._tokenizer is not None:
            _copy_tokenizer(self._tokenizer, partial / "tokenizer")
        own = {path for path in partial.rglob("*") if not path.name.startswith("rank-")}
        num_bytes = seal(partial, pending.fields, dict(_known_files(partial)))
        flush([*own, partial])
        replaced = final.with_name(f".{final.name}.replaced")
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        flush([self._checkpoints])
        point_latest(final)
        shutil.rmtree(replaced, ignore_errors=True)
        best = set() if pending.protected is None else {step_directory(self._checkpoints, pending.protected)}
        prune(self._checkpoints, self._keep, final, best | self._in_use())
        return num_bytes

    def _partial(self, progress: Progress) -> Path:
        final = step_directory(self._checkpoints, progress.step)
        return final.with_name(f".{final.name}.partial")


def save_checkpoint(
    engine: Engine, checkpoints: Path, progress: Progress, config_yaml: str, tokenizer: Path | None = None
) -> Path:
    """Write one checkpoint, where no run writes several; see `Saver`.

    Collectives: every rank must call.
    """
    Saver(engine, checkpoints, config_yaml, tokenizer, Keep()).save(progress, is_last=True)
    return step_directory(checkpoints, progress.step)


def _write_slices(stem: Path, pieces: list[Piece], values: list[torch.Tensor]) -> None:
    """Write this rank's tensors, then what they are, with the hash that the manifest will name."""
    if not pieces:
        return
    data = stem.with_suffix(".safetensors")
    written = write_tensors(data, {piece.key: (piece.end - piece.start,) for piece in pieces}, values)
    description = {**asdict(written), "pieces": [asdict(piece) for piece in pieces]}
    described = stem.with_suffix(".json")
    described.write_text(json.dumps(description))
    flush([described])


def _known_files(partial: Path) -> Iterator[tuple[str, StoredFile]]:
    for path in partial.glob("rank-*.json"):
        described = json.loads(path.read_text())
        yield path.with_suffix(".safetensors").name, StoredFile(described["num_bytes"], described["sha256"])


def _nothing(_: _Pending) -> int:
    return 0


def _make_empty(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)


def _copy_tokenizer(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        target.mkdir()
        shutil.copy2(source, target / source.name)


def _together(action: Callable[[], None]) -> None:
    """Run an action on every rank; where it fails on one, fail on all, with its message."""
    error = None
    try:
        action()
    except OSError as problem:
        error = problem
    message = _agreed_failure(error)
    if message:
        raise _failure(message)


def _agreed_failure(error: BaseException | None) -> str:
    """Tell all ranks of the first one's failure to write.

    Raises:
        BaseException: what was raised here, where it is a defect and no failure to write; the others hear of it first.
    """
    messages: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(messages, "" if error is None else f"rank {dist.get_rank()}: {error}")
    if error is not None and not isinstance(error, OSError):
        raise error
    return next((message for message in messages if message), "")


def _failure(message: str) -> OutputError:
    return OutputError(
        f"the checkpoint could not be written: {message}",
        field="checkpoint",
        remedy="free space or mend the directory, and start again from the last checkpoint",
    )


def _scaler_state(engine: Engine) -> dict[str, float] | None:
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return {key: getattr(scaler, key) for key in _SCALER_KEYS} if hasattr(scaler, "cur_hysteresis") else None
