"""Rewrite a checkpoint in the slices of another layout, without ranks: each of them then reads its own file alone.

Any checkpoint resumes on any layout as it is. But where the tensor-parallel size differs, each rank puts whole tensors
together to cut its slice out of them; a thousand ranks read a checkpoint a hundred times over. Here that is done once, one
logical tensor at a time: read whole, cut, and appended to the files of the ranks that hold a part of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from lmscale.config.check import CROSS_SECTION_RULES
from lmscale.config.io import load_run, show
from lmscale.config.layouts import Layout, check_layout
from lmscale.config.run import RunConfig
from lmscale.errors import CheckpointError, ConfigError, OutputError
from lmscale.plan.groups import group_of
from lmscale.train.checkpoint_files import Piece, StoredFile, flush, seal
from lmscale.train.checkpoint_reader import CheckpointReader, tp_slice
from lmscale.train.layout_slices import Sizes, stage_ranges
from lmscale.train.simulate import HeldParameter, simulate_ranks
from lmscale.train.tensor_file import file_layout

_FILES_AT_ONCE = 256
"""Files that are open at a time; a stage of more ranks is gone through several times."""
_OWN_FIELDS = ("format", "files", "checksum", "layout", "num_directories")


@dataclass(frozen=True)
class Reshaped:
    """A checkpoint that was rewritten."""

    num_files: int
    num_bytes: int
    largest_tensor_bytes: int


@dataclass(frozen=True)
class _Slice:
    """A piece of an output file."""

    rank: int
    piece: Piece


def reshape_checkpoint(
    source: Path, target: Path, sizes: Sizes, note: Callable[[str], None] = lambda line: None
) -> Reshaped:
    """Rewrite a checkpoint in the slices of another layout; what it holds stays the same, bit for bit.

    The result appears under its name when it is whole and on disk. Besides one logical tensor, and of it the slice of one
    tensor-parallel rank, nothing of the state is in memory.

    Args:
        source: a checkpoint.
        target: the directory to make.
        sizes: the layout.
        note: told of each stage.

    Raises:
        CheckpointError: if the source is damaged, or an adaptation.
        ConfigError: if the layout is illegal or the model does not divide over it.
        OutputError: if the target exists or cannot be written.
    """
    if target.exists():
        raise OutputError("exists already", field="OUT", value=str(target), remedy="name another directory")
    reader = CheckpointReader(source)
    config = _check(reader, sizes)
    partial = target.with_name(f".{target.name}.partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        written = _write(reader, partial, list(_plan(reader, config, sizes)), sizes, note)
        (partial / "config.yaml").write_text(show(config))  # of this layout
        if (source / "tokenizer").is_dir():
            shutil.copytree(source / "tokenizer", partial / "tokenizer")
        fields = {key: value for key, value in reader.manifest.items() if key not in _OWN_FIELDS}
        origin = {"path": str(source.absolute()), "checksum": reader.manifest.get("checksum")}
        more = {"layout": asdict(sizes), "num_directories": 1, "reshaped_from": origin}
        num_bytes = seal(partial, {**fields, **more}, written)
        flush([*(path for path in partial.rglob("*") if path.is_file()), partial])
        partial.rename(target)
        flush([target.parent])
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", field="OUT", value=str(target)) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    largest = max(math.prod(reader.shape(kind, name)) for name in reader.shapes() for kind in reader.kinds(name))
    return Reshaped(len(written), num_bytes, largest * torch.float32.itemsize)


def _check(reader: CheckpointReader, sizes: Sizes) -> RunConfig:
    """Check that the checkpoint can be had in a layout, and return its config, laid out so."""
    if reader.manifest.get("base") is not None:
        raise CheckpointError(
            "is an adaptation: it is small, and each rank reads it as it is",
            field="CHECKPOINT",
            value=str(reader.path),
            remedy="reshape its base, or merge the two first: lmscale adapter merge",
        )
    for option, size in (("--tp-size", sizes.tp_size), ("--pp-size", sizes.pp_size), ("--dp-size", sizes.dp_size)):
        if size < 1:
            raise ConfigError("must be at least 1", field=option, value=size)
    config = load_run(reader.path / "config.yaml")
    splits = config.parallel.sequence_parallel and sizes.tp_size > 1
    axes = {"tp_size": sizes.tp_size, "pp_size": sizes.pp_size, "sequence_parallel": splits}
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update=axes)})
    for rule in CROSS_SECTION_RULES:
        rule(config)
    check_layout(Layout(sizes.zero_stage, sizes.pp_size, sizes.tp_size, splits, config.precision, False, False))
    return config


def _plan(reader: CheckpointReader, config: RunConfig, sizes: Sizes) -> Iterator[list[_Slice]]:
    """Yield the slices of each stage in the order in which they are written."""
    world_size = sizes.tp_size * sizes.pp_size * sizes.dp_size
    firsts = [sizes.rank(stage, 0, 0) for stage in range(sizes.pp_size)]
    stages = [row.parameters for row in simulate_ranks(config, world_size, firsts)]
    known = {parameter.name for parameters in stages for parameter in parameters}

    def group(parameter: HeldParameter) -> str | None:
        found = group_of(parameter.name, len(parameter.shape), config.optim)
        return None if found.is_frozen else found.name

    for stage, parameters in enumerate(stages):
        found = []
        for parameter, ranges in stage_ranges(parameters, sizes, group):
            for kind in reader.kinds(parameter.name):
                if reader.shape(kind, parameter.name) != parameter.shape:  # a statistic of whole rows or columns
                    found.append(_whole(reader, kind, parameter.name, sizes.rank(stage, ranges[0].dp_rank, 0)))
                    continue
                for tp_rank in range(sizes.tp_size if parameter.tp_dim is not None else 1):
                    for part in ranges:  # of one slice, one after another: it is cut out once
                        rank = sizes.rank(stage, part.dp_rank, tp_rank)
                        found.append(_slice(parameter, kind, rank, tp_rank, sizes, part.start, part.end))
        if stage == 0:  # what this version's model has not: every rank that asks for it finds it there
            others = [name for name in reader.shapes() if name not in known]
            found += [_whole(reader, kind, name, 0) for name in others for kind in reader.kinds(name)]
        yield found


def _slice(parameter: HeldParameter, kind: str, rank: int, tp_rank: int, sizes: Sizes, start: int, end: int) -> _Slice:
    is_split = parameter.tp_dim is not None
    cut = (parameter.tp_dim, parameter.tp_stride, tp_rank, sizes.tp_size if is_split else 1)
    place = (f"rank-{rank:05d}.safetensors", f"{kind}/{parameter.name}")
    return _Slice(rank, Piece(kind, parameter.name, parameter.shape, *cut, start, end, *place))


def _whole(reader: CheckpointReader, kind: str, name: str, rank: int) -> _Slice:
    shape = reader.shape(kind, name)
    place = (f"rank-{rank:05d}.safetensors", f"{kind}/{name}")
    return _Slice(rank, Piece(kind, name, shape, None, 1, 0, 1, 0, math.prod(shape), *place))


def _write(
    reader: CheckpointReader, partial: Path, stages: list[list[_Slice]], sizes: Sizes, note: Callable[[str], None]
) -> dict[str, StoredFile]:
    written: dict[str, StoredFile] = {}
    for number, slices in enumerate(stages):
        ranks = sorted({each.rank for each in slices})
        for first in range(0, len(ranks), _FILES_AT_ONCE):
            chosen = set(ranks[first : first + _FILES_AT_ONCE])
            written |= _write_files(reader, partial, [each for each in slices if each.rank in chosen])
        note(f"stage {number + 1} of {sizes.pp_size}: {len(ranks)} files")
    return written


def _write_files(reader: CheckpointReader, partial: Path, slices: list[_Slice]) -> dict[str, StoredFile]:
    """Write the files of some ranks, a logical tensor after the other."""
    by_file: dict[str, list[Piece]] = {}
    for each in slices:
        by_file.setdefault(each.piece.file, []).append(each.piece)
    with ExitStack() as stack:
        files = {name: stack.enter_context(_Output(partial / name, pieces)) for name, pieces in by_file.items()}
        for (kind, name, tp_rank), group in groupby((each.piece for each in slices), _slice_of):
            pieces = list(group)
            whole = reader.logical(kind, name)  # kept until the next one is asked for
            local = tp_slice(whole, pieces[0].tp_dim, pieces[0].tp_stride, tp_rank, pieces[0].tp_size).reshape(-1)
            del whole
            for piece in pieces:
                files[piece.file].write(local[piece.start : piece.end])
            del local  # before the next is made
    return {name: file.stored for name, file in files.items()}


def _slice_of(piece: Piece) -> tuple[str, str, int]:
    return piece.kind, piece.name, piece.tp_rank


class _Output:
    """A rank's file and its description, hashed while it is written, by this thread: nothing waits in memory."""

    stored: StoredFile

    def __init__(self, path: Path, pieces: list[Piece]):
        self._path, self._pieces = path, pieces
        self._file, self._hash, self._num_bytes = path.open("wb", buffering=0), hashlib.sha256(), 0
        self._append(file_layout({piece.key: (piece.end - piece.start,) for piece in pieces}).header)

    def write(self, values: torch.Tensor) -> None:
        """Append the values of the next piece."""
        self._append(memoryview(values.numpy()).cast("B"))

    def _append(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        left = memoryview(data)
        self._num_bytes += len(left)
        while left:
            left = left[self._file.write(left) :]

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            os.fsync(self._file.fileno())
        finally:
            self._file.close()
        if kind is None:
            self.stored = StoredFile(self._num_bytes, self._hash.hexdigest())
            description: dict[str, Any] = asdict(self.stored) | {"pieces": [asdict(piece) for piece in self._pieces]}
            self._path.with_suffix(".json").write_text(json.dumps(description))
