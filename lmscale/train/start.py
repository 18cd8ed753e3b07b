"""What a run does between building its engine and its first step: resume, open the books, describe itself."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from lmscale.config.io import show
from lmscale.config.run import RunConfig
from lmscale.feed.loader import corpus_hashes
from lmscale.log import get_logger
from lmscale.monitor.atomic import replaced
from lmscale.monitor.console import Console, ConsoleLike, NullConsole
from lmscale.monitor.manifest import versions, write_manifest
from lmscale.monitor.throughput import Throughput, Work
from lmscale.monitor.writers import Writer, build_writers
from lmscale.optim.groups import group_table
from lmscale.parallel.topology import Topology
from lmscale.plan.devices import peak_flops_per_second
from lmscale.plan.flops import hardware_flops_per_token, model_flops_per_token
from lmscale.plan.params import num_parameters
from lmscale.train.checkpoint import load_checkpoint
from lmscale.train.checkpoint_reader import CheckpointReader, find_checkpoint, resolve_checkpoint
from lmscale.train.engine import Engine
from lmscale.train.progress import Progress

_log = get_logger(__name__)

CONFIG_FILE = "config.yaml"


def choose_determinism(deterministic: bool) -> None:
    """Ask torch for deterministic kernels; an operation that has none then raises."""
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False


def begin(engine: Engine, config: RunConfig) -> Progress:
    """Load the checkpoint that the config asks for, and return where to go on from.

    checkpoint.resume auto takes the run's newest checkpoint if there is one, never takes none, a path takes that one;
    a new run starts from model.init_from's weights where it is given.

    Raises:
        CheckpointError: if a checkpoint that is named is missing or of another model.
    Collectives: every rank must call.
    """
    resume = config.checkpoint.resume
    newest = find_checkpoint(Path(config.output_dir) / "checkpoints") if resume == "auto" else None
    path = newest if resume in ("auto", "never") else resolve_checkpoint(Path(resume))
    if path is not None:
        progress = load_checkpoint(engine, CheckpointReader(path))
        _log.info("resumed from %s: step %d, %d tokens", path, progress.step, progress.consumed_tokens)
        return progress
    if config.model.init_from is not None:
        source = resolve_checkpoint(Path(config.model.init_from))
        load_checkpoint(engine, CheckpointReader(source), weights_only=True)
        _log.info("weights taken from %s", source)
    return Progress()


def build_throughput(config: RunConfig, topology: Topology) -> Throughput:
    """Build the meter of tokens, FLOPs and MFU for a run."""
    model, length = config.model, config.lengths
    peak = config.monitor.device_flops_per_second
    if peak is None and topology.device.type == "cuda":
        peak = peak_flops_per_second(torch.cuda.get_device_name(topology.device), config.precision)
    return Throughput(
        Work(
            num_devices=topology.world_size,
            model_flops_per_token=model_flops_per_token(model, length),
            hardware_flops_per_token=hardware_flops_per_token(model, length, config.parallel.recompute),
            peak_flops_per_second_per_device=peak,
        )
    )


@contextlib.contextmanager
def open_monitor(
    config: RunConfig, engine: Engine, progress: Progress, notes: list[str]
) -> Iterator[tuple[list[Writer], ConsoleLike]]:
    """Write config.yaml and manifest.json, open the writers and the console on rank 0; close them in the end.

    Yields: (writers, console): none and a silent one on other ranks.
    Collectives: every rank must call.
    """
    topology = engine.topology
    hosts: list[str] = [""] * topology.world_size
    dist.all_gather_object(hosts, socket.gethostname())
    if topology.rank != 0:
        yield [], NullConsole()
        return
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with replaced(output_dir / CONFIG_FILE) as file:
        file.write(show(config).encode())
    layout = {
        "world_size": topology.world_size,
        "tp_size": topology.tp_size,
        "pp_size": topology.pp_size,
        "dp_size": topology.dp_size,
        "zero_stage": engine.zero_stage,
    }
    extra = {"hosts": sorted(set(hosts)), "data": corpus_hashes(config), "resume_step": progress.step}
    write_manifest(output_dir / "manifest.json", config, layout, sys.argv, extra)
    writers = build_writers(config.monitor, output_dir, progress.step if progress.step else None)
    console = Console()
    _describe(config, engine, console, layout, notes)
    for writer in writers:
        writer.text("config", f"```yaml\n{show(config)}\n```")
        writer.text("environment", "\n".join(f"- {name}: {value}" for name, value in {**versions(), **layout}.items()))
    console.start(config.train.train_tokens, progress.consumed_tokens)
    try:
        yield writers, console
    finally:
        console.close()
        for writer in writers:
            writer.close()


def _describe(
    config: RunConfig, engine: Engine, console: ConsoleLike, layout: dict[str, int], notes: list[str]
) -> None:
    sizes = ", ".join(f"{name} {value}" for name, value in layout.items())
    console.message(
        f"{num_parameters(config.model):,} parameters; {sizes}; {config.precision}; seed {config.train.seed}"
    )
    optimizer = type(engine.basic_optimizer)
    console.message(f"optimizer: {optimizer.__module__}.{optimizer.__name__}")
    rows = group_table(engine.model.named_parameters(), config.optim)
    console.table("Parameter groups", ["group", "weight decay", "parameters", "rule"], rows)
    for note in notes:
        console.message(f"deepspeed: {note}")
