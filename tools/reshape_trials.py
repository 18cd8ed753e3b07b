"""What the ranks of tools/reshape_matrix.py do: train, save, load what another layout saved, compare, train on.

Training goes by the run's own code: its engine, its loader, its checkpoints. What was loaded is compared with tensors that
this file puts together from a checkpoint's files by rules of its own, so that a mistake of lmscale's reader shows.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from lmscale.config.deepspeed_json import check_deepspeed, load_deepspeed
from lmscale.config.io import parse_run, show
from lmscale.feed.loader import build_train_loader
from lmscale.optim.batch_ramp import sizes_of
from lmscale.optim.lr import lr_at
from lmscale.optim.steps import Steps
from lmscale.parallel.topology import init_topology
from lmscale.pretrain import build_engine
from lmscale.train.checkpoint import load_checkpoint
from lmscale.train.checkpoint_files import PARAMETER
from lmscale.train.checkpoint_reader import CheckpointReader
from lmscale.train.moments import Moment, moments
from lmscale.train.progress import Progress
from lmscale.train.saving import save_checkpoint
from lmscale.verify.layouts import Candidate

BEFORE, AFTER = 5, 10
"""Steps up to the save, and from the load on."""
WORDS = {"sgd": {"sgd_momentum": 0.9}, "adafactor": {"adafactor_min_dim": 16}, "muon": {"muon_precision": "fp32"}}
"""Keys of optimizers, so that each has a state and no rounding of its own."""
_TICK_S = 0.0005
_M_MMAP_THRESHOLD, _MAPPED_BYTES = -3, 1 << 20

Keys = dict[str, Any]
State = dict[str, NDArray[np.float32]]
"""Logical tensors by kind/name."""


@dataclass(frozen=True)
class Resumed:
    """What became of a checkpoint on one rank of another layout.

    Attributes:
        losses: of the steps after it.
        load_s: seconds of the load.
        peak_bytes: most memory that it takes to read every slice of this rank, besides the state that they go to.
        difference: the first tensor that is not the saved one, or nothing.
        held: values of each logical tensor that this rank has: [first, behind) of a tensor-parallel slice.
    """

    losses: list[float]
    load_s: float
    peak_bytes: int
    difference: str
    held: list[tuple[str, int, int, int, int]]


def run_keys(corpus: str, output_dir: str, layout: Candidate, shape: Keys, optimizer: str) -> Keys:
    """Make the config of a small run on a layout; shape are keys of the model."""
    model = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": 500,
        "max_position_embeddings": 32,
        "activation": "swiglu",  # its first matrix is two blocks under tensor parallelism
        **dict.fromkeys(("hidden_dropout", "attention_dropout"), 0.0),
        **shape,
    }
    return {
        "model": model,
        "data": {"train": [{"prefix": corpus}], "split": "1,0,0", "seq_length": 32, "num_workers": 0},
        "batch": {"micro_batch_size": 2, "global_batch_size": 8},
        "optim": {"name": optimizer, "lr": 1.0e-3, "lr_warmup_tokens": 512, **WORDS.get(optimizer, {})},
        "train": {"train_tokens": 8 * 32 * (BEFORE + AFTER)},
        "parallel": {"tp_size": layout.tp_size, "pp_size": layout.pp_size},
        "deepspeed": {"zero_optimization": {"stage": layout.zero_stage}},
        "output_dir": output_dir,
    }


def train_and_save(keys: Keys, is_pipeline: bool) -> list[float]:
    """Train a run from its start to its end without a stop, saving on the way; return its losses."""
    trial = Trial(keys, is_pipeline)
    losses = trial.train(Progress(), BEFORE)
    save_checkpoint(trial.engine, Path(keys["output_dir"]) / "checkpoints", trial.progress, show(trial.config))
    return losses + trial.train(trial.progress, AFTER)


def resume_all(keys: Keys, is_pipeline: bool, sources: list[tuple[str, str]]) -> list[Resumed]:
    """Load each of several checkpoints, compare, and train on from there.

    Args:
        keys: of the run on this layout.
        is_pipeline: it has the pipeline engine.
        sources: a checkpoint, and its tensors as `write_state` left them.
    """
    trial = Trial(keys, is_pipeline)
    return [trial.resume(Path(checkpoint), np.load(state)) for checkpoint, state in sources]


class Trial:
    """A run's engine on this rank, and where it is."""

    def __init__(self, keys: Keys, is_pipeline: bool):
        # Fixed, malloc returns each freed tensor at once: else what was freed before hides what is taken again.
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        self.config = parse_run(keys)
        topology = init_topology(self.config.parallel.tp_size, self.config.parallel.pp_size)
        zero = check_deepspeed(load_deepspeed(self.config.deepspeed), self.config)
        self.engine = build_engine(self.config, topology, zero, is_pipeline or None)
        self.progress = Progress()

    def train(self, progress: Progress, num_steps: int) -> list[float]:
        """Train some steps from where a run is."""
        config, engine, topology = self.config, self.engine, self.engine.topology
        train_tokens = config.train.train_tokens
        sizes = sizes_of(config)
        steps = Steps(sizes, progress.consumed_samples, progress.consumed_tokens, train_tokens)
        batches = build_train_loader(config, topology.dp_rank, topology.dp_size, steps) if engine.reads_data else None
        losses = []
        for step in list(steps)[:num_steps]:
            tokens = step.batch_size * step.seq_length
            num = step.batch_size // (config.batch.micro_batch_size * topology.dp_size)
            micro = [next(batches) for _ in range(num)] if batches else []
            lr = lr_at(progress.consumed_tokens + tokens, config.optim, train_tokens)
            losses.append(float(engine.train_step(micro, num, progress.step + 1, lr).loss))
            progress = progress.after_step(step.batch_size, tokens, False)
        self.progress = progress
        return losses

    def resume(self, checkpoint: Path, state: Any) -> Resumed:
        """Load a checkpoint into the engine, whatever is in it, compare, and train on."""
        start = time.perf_counter()
        progress = load_checkpoint(self.engine, CheckpointReader(checkpoint))
        load_s = time.perf_counter() - start
        with AnonymousPeak() as memory:
            self._read_again(CheckpointReader(checkpoint))
        held, difference = self._compare(state)
        return Resumed(self.train(progress, AFTER), load_s, memory.peak_bytes, difference, held)

    def _read_again(self, reader: CheckpointReader) -> None:
        """Read what was loaded once more, into nothing: in a load, the state grows meanwhile and hides what reading takes."""
        topology = self.engine.topology
        for moment in self._state():
            place = topology.tp_rank, topology.tp_size, moment.start, moment.end
            reader.fragment(moment.kind, moment.tensor, *place)

    def _state(self) -> Iterator[Moment]:
        for fragment in self.engine.fragments():
            yield Moment(PARAMETER, fragment.tensor, fragment.start, fragment.end, fragment.master)
            yield from moments(self.engine.basic_optimizer, fragment)

    def _compare(self, state: Any) -> tuple[list[tuple[str, int, int, int, int]], str]:
        """Compare every value that this rank holds with the saved one, bit for bit."""
        topology, held, difference = self.engine.topology, [], ""
        for moment in self._state():
            tensor, key = moment.tensor, f"{moment.kind}/{moment.tensor.name}"
            is_cut = tensor.tp_dim is not None
            rank, size = (topology.tp_rank, topology.tp_size) if is_cut else (0, 1)
            places = slice_places(tensor.shape, tensor.tp_dim, tensor.tp_stride, rank, size)
            saved = state[key].reshape(-1)[places[moment.start : moment.end]]
            if saved.tobytes() != moment.values.numpy().tobytes():
                difference = difference or key
            held.append((key, rank, size, moment.start, moment.end))
        return held, difference


def missing_of(state: Any, ranks: list[Resumed]) -> str:
    """Name a logical tensor of which the ranks do not hold every value, or return nothing."""
    seen: dict[str, dict[tuple[int, int], list[tuple[int, int]]]] = {}
    for rank in ranks:
        for key, tp_rank, tp_size, start, end in rank.held:
            seen.setdefault(key, {}).setdefault((tp_rank, tp_size), []).append((start, end))
    for key in state:
        slices = seen.get(key, {})
        size = next((tp_size for _, tp_size in slices), 1)
        for tp_rank in range(size):
            covered = 0
            for start, end in sorted(slices.get((tp_rank, size), [])):
                covered = end if start <= covered < end else covered
            if covered * size != state[key].size:
                return str(key)
    return ""


def slice_places(shape: tuple[int, ...], tp_dim: int | None, tp_stride: int, tp_rank: int, tp_size: int) -> Any:
    """Return where each value of a rank's flattened slice lies in the flattened whole tensor.

    Along tp_dim the tensor is tp_stride blocks of tp_size parts, and the rank has one part of each.
    """
    places = np.arange(math.prod(shape)).reshape(shape)
    if tp_dim is None:
        return places.reshape(-1)
    parts = np.moveaxis(places, tp_dim, 0)
    parts = parts.reshape(tp_stride, tp_size, -1, *parts.shape[1:])[:, tp_rank]
    return np.moveaxis(parts.reshape(-1, *parts.shape[2:]), 0, tp_dim).reshape(-1)


def read_state(checkpoint: Path) -> State:
    """Put the logical tensors of a checkpoint together from its files; every value must be there once."""
    state: State = {}
    counts: dict[str, NDArray[np.int8]] = {}
    for index in sorted(checkpoint.glob("rank-*.json")):
        content = json.loads(index.read_text())
        for piece in content if isinstance(content, list) else content["pieces"]:
            key, shape = f"{piece['kind']}/{piece['name']}", tuple(piece["shape"])
            whole = state.setdefault(key, np.zeros(shape, np.float32)).reshape(-1)
            count = counts.setdefault(key, np.zeros(whole.size, np.int8))
            cut = (piece["tp_dim"], piece["tp_stride"], piece["tp_rank"], piece["tp_size"])
            places = slice_places(shape, *cut)[piece["start"] : piece["end"]]
            whole[places] = load_file(checkpoint / piece["file"])[piece["key"]]
            count[places] += 1
    wrong = [key for key, count in counts.items() if (count != 1).any()]
    if wrong:
        raise AssertionError(f"{checkpoint}: not every value of {wrong[0]} is there once")
    return state


def write_state(checkpoint: Path, path: Path) -> State:
    """Write the logical tensors of a checkpoint to a file of numpy's, for `resume_all`."""
    state = read_state(checkpoint)
    np.savez(path, **state)  # type: ignore[arg-type]
    return state


class AnonymousPeak:
    """Watches the memory of this process while a context lasts, mapped files left out.

    Attributes:
        peak_bytes: the most, beyond what there was at the start.
    """

    peak_bytes = 0

    def __enter__(self) -> AnonymousPeak:
        self._start = self._most = _anonymous_bytes()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        self.peak_bytes = self._most - self._start

    def _watch(self) -> None:
        while not self._is_over.wait(_TICK_S):
            self._most = max(self._most, _anonymous_bytes())


def _anonymous_bytes() -> int:
    with open("/proc/self/statm", "rb") as file:
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
