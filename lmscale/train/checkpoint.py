"""Checkpoints in a form of our own: slices of logical tensors, independent of the layout.

A checkpoint is a directory:

    manifest.json           format version, progress, optimizer and loss-scale counters, layout, every file with its size
    config.yaml             the run's config
    rank-00000.safetensors  fp32 slices of master weights and moments, one file for each writing rank
    rank-00000.json         what these slices are: kind, logical name, logical shape, place under tensor parallelism, range
    tokenizer/              a copy of the tokenizer's files

Each piece of the state is written once, by the rank that owns it. A reader asks for a logical tensor, or for its own
slice of it, and never holds more than one logical tensor; so any layout resumes from any layout, and generation and
conversion read the same files. There is no pickle. The directory is written under a temporary name and renamed when it
is whole and on disk; then `latest` is replaced.

DeepSpeed's own checkpoints are not used: they are bound to the ZeRO stage and, under ZeRO 3, to the ranks; they are
pickles; and `latest` may name a torn one.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from lmscale.errors import CheckpointError, LmscaleError, RunError
from lmscale.log import get_logger
from lmscale.train.checkpoint_reader import FORMAT, PARAMETER, CheckpointReader, Piece
from lmscale.train.engine import Engine
from lmscale.train.fragments import Fragment, LogicalTensor, write_back
from lmscale.train.moments import Moment, blank_moments, moments
from lmscale.train.progress import Progress

_log = get_logger(__name__)


def step_directory(checkpoints: Path, step: int) -> Path:
    """Path of the checkpoint of a step."""
    return checkpoints / f"step-{step:08d}"


def save_checkpoint(
    engine: Engine, checkpoints: Path, progress: Progress, config_yaml: str, tokenizer: Path | None, keep: int
) -> Path:
    """Write a checkpoint, atomically.

    Args:
        engine: whose state to write.
        checkpoints: the run's directory of checkpoints.
        progress: where the run is.
        config_yaml: the resolved config.
        tokenizer: the tokenizer's file or directory, copied into the checkpoint.
        keep: newest checkpoints that stay; 0 keeps all.

    Returns:
        The checkpoint's directory.

    Raises:
        RunError: on every rank, if any rank could not write; the earlier checkpoints are as they were.
    Collectives: every rank must call.
    """
    final = step_directory(checkpoints, progress.step)
    partial = final.with_name(f".{final.name}.partial")
    is_first = engine.topology.rank == 0
    _together(lambda: _make_empty(partial) if is_first else None)
    _together(lambda: _write_pieces(engine, partial))
    _together(
        lambda: _commit(engine, partial, final, progress, config_yaml, tokenizer, keep) if is_first else None,
    )
    return final


def _together(action: Any) -> None:
    """Run an action on every rank; where it fails on one, fail on all, with its message."""
    message = ""
    try:
        action()
    except (OSError, SafetensorError) as error:
        message = f"rank {dist.get_rank()}: {error}"
    messages: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    failed = [text for text in messages if text]
    if failed:
        raise RunError(
            f"the checkpoint could not be written: {failed[0]}",
            field="checkpoint",
            remedy="free space or mend the directory, and start again from the last checkpoint",
        )


def _make_empty(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)


def _write_pieces(engine: Engine, directory: Path) -> None:
    topology = engine.topology
    pieces: list[Piece] = []
    tensors: dict[str, torch.Tensor] = {}
    file = f"rank-{topology.rank:05d}.safetensors"
    for fragment in engine.fragments():
        parameter = Moment(PARAMETER, fragment.tensor, fragment.start, fragment.end, fragment.master)
        for moment in (parameter, *moments(engine.basic_optimizer, fragment)):
            if fragment.is_tied_copy or not _owns(engine, moment):
                continue
            key = f"{moment.kind}/{moment.tensor.name}"
            tensors[key] = moment.values.detach().to("cpu", torch.float32).contiguous()
            pieces.append(_piece(engine, moment, file, key))
    if not tensors:
        return
    save_file(tensors, directory / file)
    (directory / file).with_suffix(".json").write_text(json.dumps([asdict(piece) for piece in pieces]))
    _flush(directory / file)
    _flush((directory / file).with_suffix(".json"))


def _owns(engine: Engine, moment: Moment) -> bool:
    """Tell whether this rank writes a part of the state: of replicas, the first."""
    topology = engine.topology
    if moment.is_copy or (moment.tensor.tp_dim is None and topology.tp_rank > 0):
        return False
    return engine.zero_stage > 0 or topology.dp_rank == 0


def _piece(engine: Engine, moment: Moment, file: str, key: str) -> Piece:
    tensor, topology = moment.tensor, engine.topology
    is_split = tensor.tp_dim is not None
    return Piece(
        kind=moment.kind,
        name=tensor.name,
        shape=tensor.shape,
        tp_dim=tensor.tp_dim,
        tp_stride=tensor.tp_stride,
        tp_rank=topology.tp_rank if is_split else 0,
        tp_size=topology.tp_size if is_split else 1,
        start=moment.start,
        end=moment.end,
        file=file,
        key=key,
    )


def _commit(
    engine: Engine,
    partial: Path,
    final: Path,
    progress: Progress,
    config_yaml: str,
    tokenizer: Path | None,
    keep: int,
) -> None:
    """On rank 0, once every rank has written: the manifest, the rename, `latest`."""
    (partial / "config.yaml").write_text(config_yaml)
    if tokenizer is not None:
        _copy_tokenizer(tokenizer, partial / "tokenizer")
    topology = engine.topology
    manifest = {
        "format": FORMAT,
        "progress": asdict(progress),
        "optimizer": {"name": type(engine.basic_optimizer).__name__, "step": _optimizer_step(engine)},
        "loss_scaler": _scaler_state(engine),
        "layout": {
            "tp_size": topology.tp_size,
            "pp_size": topology.pp_size,
            "dp_size": topology.dp_size,
            "zero_stage": engine.zero_stage,
        },
        "files": {path.name: path.stat().st_size for path in sorted(partial.iterdir()) if path.is_file()},
    }
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for path in partial.iterdir():
        if path.is_file():
            _flush(path)
    _flush(partial)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _flush(final.parent)
    _point_latest(final)
    _prune(final.parent, keep)


def _copy_tokenizer(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        target.mkdir()
        shutil.copy2(source, target / source.name)


def _point_latest(final: Path) -> None:
    pointer = final.parent / "latest"
    partial = pointer.with_name(".latest.partial")
    partial.write_text(final.name + "\n")
    _flush(partial)
    partial.replace(pointer)
    _flush(final.parent)


def _prune(checkpoints: Path, keep: int) -> None:
    """Delete all but the newest; the newest is the one just written."""
    steps = sorted(path for path in checkpoints.glob("step-*") if path.is_dir())
    for path in steps[:-keep] if keep else []:
        shutil.rmtree(path, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _optimizer_step(engine: Engine) -> int:
    """Count the updates that the optimizer has made: steps less the skipped ones."""
    steps = [int(state["step"]) for state in engine.basic_optimizer.state.values() if "step" in state]
    return max(steps, default=0)


_SCALER_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _scaler_state(engine: Engine) -> dict[str, float] | None:
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return {key: getattr(scaler, key) for key in _SCALER_KEYS} if hasattr(scaler, "cur_hysteresis") else None


def load_checkpoint(engine: Engine, reader: CheckpointReader, *, weights_only: bool = False) -> Progress:
    """Fill an engine's state from a checkpoint of any layout.

    Args:
        engine: a new engine over the same model.
        reader: the checkpoint.
        weights_only: take the weights alone; optimizer, loss scale and progress start afresh.

    Returns:
        The progress to go on from.

    Raises:
        CheckpointError: if the checkpoint is of another model or optimizer.
    Collectives: every rank must call.
    """
    pieces = engine.fragments()
    _check_same_model(pieces, reader)
    optimizer_step = 0 if weights_only else int(reader.manifest["optimizer"]["step"])
    for fragment in pieces:
        fragment.master.copy_(_read(engine, reader, PARAMETER, fragment.tensor, fragment.start, fragment.end))
        for moment in blank_moments(engine.basic_optimizer, fragment, optimizer_step) if optimizer_step else ():
            moment.values.copy_(_read(engine, reader, moment.kind, moment.tensor, moment.start, moment.end))
    write_back(engine.optimizer, engine.zero_stage)
    if weights_only:
        return Progress()
    _restore_scaler(engine, reader.manifest["loss_scaler"])
    return reader.progress


def _read(
    engine: Engine, reader: CheckpointReader, kind: str, tensor: LogicalTensor, start: int, end: int
) -> torch.Tensor:
    """Read a range of this rank's slice of a logical tensor.

    Raises:
        CheckpointError: if the checkpoint's optimizer had no such state.
    """
    if not reader.holds(kind, tensor.name):
        raise CheckpointError(
            f"holds no {kind} of {tensor.name}: its optimizer was {reader.manifest['optimizer']['name']}",
            field="checkpoint",
            value=str(reader.path),
            remedy="use the optimizer of its config.yaml, or model.init_from to take the weights alone",
        )
    return reader.fragment(kind, tensor, engine.topology.tp_rank, engine.topology.tp_size, start, end)


def _check_same_model(pieces: list[Fragment], reader: CheckpointReader) -> None:
    """Compare this rank's tensors with the checkpoint's, and over all ranks what the checkpoint has besides."""
    stored = reader.shapes()
    mine = {fragment.tensor.name: fragment.tensor.shape for fragment in pieces}
    problem: LmscaleError | None = None
    for name, shape in mine.items():
        if stored.get(name) != shape:
            problem = CheckpointError(
                f"is of another model: {name} is {stored.get(name, 'absent')} there and {shape} here",
                field="checkpoint",
                value=str(reader.path),
                remedy="use the model of its config.yaml",
            )
            break
    names: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(names, set(mine))
    unread = set(stored) - set().union(*names)
    if problem is None and unread:
        problem = CheckpointError(
            f"is of another model: it holds {min(unread)}, which this one has not",
            field="checkpoint",
            value=str(reader.path),
        )
    if problem is not None:
        raise problem


def _restore_scaler(engine: Engine, saved: dict[str, float] | None) -> None:
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if saved is not None and hasattr(scaler, "cur_hysteresis"):
        for key, value in saved.items():
            setattr(scaler, key, value)
