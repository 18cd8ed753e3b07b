"""What a run does between building its engine and its first step: resume, open the books, describe itself."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lmscale.config.adapt import prefix_length
from lmscale.config.checkpoint_paths import resolve_checkpoint
from lmscale.config.deepspeed_json import check_deepspeed, load_deepspeed
from lmscale.config.implementation import choose_implementation, choose_norms
from lmscale.config.io import show
from lmscale.config.run import RunConfig
from lmscale.errors import LmscaleError, OutputError
from lmscale.feed.loader import corpus_hashes
from lmscale.log import get_logger
from lmscale.monitor.alert import alert
from lmscale.monitor.atomic import replaced
from lmscale.monitor.console import Console, ConsoleLike, NullConsole
from lmscale.monitor.hparams import hparams_of
from lmscale.monitor.manifest import versions, write_manifest
from lmscale.monitor.throughput import Work
from lmscale.monitor.writers import Writer, build_writers
from lmscale.parallel.device import describe_device, overrules_fp16
from lmscale.parallel.filesystems import directory_leaders
from lmscale.parallel.topology import Topology
from lmscale.plan.adaptation import Adaptation, adaptation_of
from lmscale.plan.devices import peak_flops_per_second
from lmscale.plan.flops import hardware_flops_per_token, model_flops_per_token
from lmscale.plan.groups import group_rows, num_trainable
from lmscale.plan.params import num_parameters
from lmscale.train.base import BaseModel, hash_weights
from lmscale.train.checkpoint import load_checkpoint, load_weights
from lmscale.train.checkpoint_reader import CheckpointReader
from lmscale.train.engine import Engine
from lmscale.train.entries import begin_as_base
from lmscale.train.loop import Run
from lmscale.train.progress import Progress
from lmscale.train.retention import Keep, remove_leftovers
from lmscale.train.saved_hook import SavedHook
from lmscale.train.saving import Saved, Saver
from lmscale.train.stages import STAGES, Stage, stages_from_here, stages_of
from lmscale.train.verification import newest_good, open_verified

_log = get_logger(__name__)

CONFIG_FILE, MANIFEST = "config.yaml", "manifest.json"


def choose_determinism(deterministic: bool) -> None:
    """Ask torch for deterministic kernels; an operation that has none then raises."""
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False


@dataclass(frozen=True)
class Beginning:
    """Where a start of a run goes on from.

    Attributes:
        progress: what has been done.
        leaders: by rank, the lowest that sees the same directory of checkpoints.
        resumed_from: the checkpoint, for the manifests of the next ones: its path, step and checksum; None of a new run.
        former_stages: which corpora it had read, and from where on.
    """

    progress: Progress
    leaders: list[int]
    resumed_from: dict[str, Any] | None = None
    former_stages: tuple[Stage, ...] = ()


def begin(engine: Engine, config: RunConfig, adaptation: Adaptation | None = None) -> Beginning:
    """Load the checkpoint that the config asks for, and say where to go on from.

    checkpoint.resume auto takes the run's newest good checkpoint if there is one, never takes none, a path takes that one;
    a new run starts from model.init_from's weights where it is given. What an adaptation does not train comes from there
    in a resumed run too, and its checkpoints hold the rest. Whatever is loaded is compared with its hashes first.

    Raises:
        CheckpointError: if a checkpoint that is named is missing, damaged or of another model, or all of the run's are.
        OutputError: if the directory of checkpoints cannot be made.
    Collectives: every rank must call.
    """
    checkpoints = Path(config.output_dir) / "checkpoints"
    try:
        leaders = directory_leaders(checkpoints)
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", field="output_dir", value=config.output_dir) from None
    if leaders[engine.topology.rank] == engine.topology.rank:
        remove_leftovers(checkpoints)
    dist.barrier()
    reader = _to_resume(config, checkpoints, leaders)
    is_added = adaptation is not None and adaptation.is_added
    if config.model.init_from is not None and (reader is None or is_added):
        source = open_verified(resolve_checkpoint(Path(config.model.init_from)), leaders)
        load_weights(engine, source, adaptation)
        begin_as_base(engine.fragments(), source, engine.topology)
        _log.info("weights taken from %s", source.path)
        if is_added:
            engine.base = BaseModel(source.path.absolute(), hash_weights(source))
    if reader is None:
        return Beginning(Progress(), leaders)
    progress = load_checkpoint(engine, reader)
    _log.info("resumed from %s: step %d, %d tokens", reader.path, progress.step, progress.consumed_tokens)
    origin = {"path": str(reader.path), "step": progress.step, "checksum": reader.manifest.get("checksum")}
    return Beginning(progress, leaders, origin, tuple(stages_of(reader.path, reader.manifest)))


def _to_resume(config: RunConfig, checkpoints: Path, leaders: list[int]) -> CheckpointReader | None:
    resume = config.checkpoint.resume
    if resume == "never":
        return None
    if resume == "auto":
        return newest_good(checkpoints, leaders, _log.warning)
    return open_verified(resolve_checkpoint(Path(resume)), leaders)


def build_work(config: RunConfig, topology: Topology, seq_length: int | None = None) -> Work:
    """Say what a token costs.

    Args:
        config: the run.
        topology: its ranks.
        seq_length: nominal tokens of a sample, in a curriculum's stage; None takes the full length.
    """
    model, is_full = config.model, seq_length in (None, config.lengths.nominal)
    prefix = prefix_length(config.adapt)
    length = config.lengths if seq_length is None or is_full else seq_length
    peak = config.monitor.device_flops_per_second
    if peak is None and topology.device.type == "cuda":
        peak = peak_flops_per_second(torch.cuda.get_device_name(topology.device), config.precision)
    return Work(
        num_devices=topology.world_size,
        model_flops_per_token=model_flops_per_token(model, length, prefix_length=prefix),
        hardware_flops_per_token=hardware_flops_per_token(
            model, length, config.parallel.recompute, prefix_length=prefix
        ),
        peak_flops_per_second_per_device=peak,
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
    layout = {
        "world_size": topology.world_size,
        "tp_size": topology.tp_size,
        "pp_size": topology.pp_size,
        "dp_size": topology.dp_size,
        "zero_stage": engine.zero_stage,
    }
    extra = {
        "hosts": sorted(set(hosts)),
        "device": describe_device(topology.device),
        "data": corpus_hashes(config),
        "resume_step": progress.step,
    }
    writers: list[Writer] = []
    _on_first_rank(lambda: writers.extend(_open_books(config, layout, extra)), topology.device)
    if topology.rank != 0:
        yield [], NullConsole()
        return
    console = Console()
    _describe(config, engine, console, layout, notes)
    for writer in writers:
        writer.text("config", f"```yaml\n{show(config)}\n```")
        writer.text("manifest", f"```json\n{(Path(config.output_dir) / MANIFEST).read_text(encoding='utf-8')}```")
        writer.text("environment", "\n".join(f"- {name}: {value}" for name, value in {**versions(), **layout}.items()))
    console.start(config.train.train_tokens, progress.consumed_tokens)
    try:
        yield writers, console
    finally:
        console.close()
        for writer in writers:
            writer.close()


def _on_first_rank(action: Callable[[], None], device: torch.device) -> None:
    """Run an action on rank 0; where it fails, fail on all, or the others would train on and crash when rank 0 is gone.

    Raises:
        LmscaleError: on every rank.
    """
    problem: list[LmscaleError | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except LmscaleError as error:
            problem = [error]
    dist.broadcast_object_list(problem, src=0, device=device)
    if problem[0] is not None:
        raise problem[0]


def reopen_writers(config: RunConfig, writers: list[Writer], device: torch.device, step: int) -> None:
    """Cut what the writers hold back to a step, as a resumed run does.

    Args:
        config: the run.
        writers: changed in place; other ranks than 0 have none.
        device: this rank's.
        step: that the run goes back to.

    Raises:
        OutputError: on every rank, if output_dir cannot be written.
    Collectives: every rank must call.
    """

    def reopen() -> None:
        for writer in writers:
            writer.close()
        try:
            writers[:] = _writers(config, step)
        except OSError as error:
            raise OutputError(
                f"cannot be written: {error.strerror}", field="output_dir", value=config.output_dir
            ) from None

    _on_first_rank(reopen, device)


@contextlib.contextmanager
def alerting(run: Run) -> Iterator[None]:
    """Run monitor.alert_command on rank 0 where what is done in here fails."""
    try:
        yield
    except Exception as error:
        if run.engine.topology.rank == 0:
            line = str(error).split("\n", maxsplit=1)[0] or type(error).__name__
            alert(run.config.monitor.alert_command, "failure", line, run.progress.step, run.config.output_dir)
        raise


@contextlib.contextmanager
def open_saver(engine: Engine, config: RunConfig, start: Beginning, console: ConsoleLike) -> Iterator[Saver]:
    """Make what writes the run's checkpoints; in the end, wait for its last one and for checkpoint.on_saved.

    Collectives: every rank must call.
    """
    checkpoint, output_dir = config.checkpoint, Path(config.output_dir)
    hook = SavedHook(checkpoint.on_saved if engine.topology.rank == 0 else None, output_dir)

    def saved(found: Saved) -> None:
        speed = found.num_bytes / max(found.seconds, 1e-9)
        console.message(
            f"saved {found.path}: {found.num_bytes / 1e6:,.1f} MB in {found.seconds:.2f} s, {speed / 1e9:.2f} GB/s"
        )
        hook.run(found.path)

    def failed(error: OutputError) -> None:
        if checkpoint.on_failure == "stop":
            raise error
        console.message(f"warning: {error}; the run goes on, and the checkpoints before are as they were")

    saver = Saver(
        engine,
        output_dir / "checkpoints",
        show(config),
        Path(config.tokenizer.path) if config.tokenizer else None,
        Keep(checkpoint.keep, checkpoint.keep_every_steps),
        leaders=start.leaders,
        asynchronous=checkpoint.asynchronous,
        fields={
            "resumed_from": start.resumed_from,
            STAGES: stages_from_here(config, start.progress, start.former_stages),
        },
        saved=saved,
        in_use=hook.in_use,
        failed=failed,
    )
    try:
        yield saver
        saver.finish()
    finally:
        hook.close()


def _writers(config: RunConfig, step: int) -> list[Writer]:
    return build_writers(config.monitor, Path(config.output_dir), step or None, hparams_of(config))


def _open_books(config: RunConfig, layout: dict[str, int], extra: dict[str, Any]) -> list[Writer]:
    """Write config.yaml, open the writers and write manifest.json: a start whose writers fail is no start of the run.

    Raises:
        OutputError: if output_dir cannot be written.
    """
    output_dir = Path(config.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with replaced(output_dir / CONFIG_FILE) as file:
            file.write(show(config).encode())
        with contextlib.ExitStack() as opened:
            writers = _writers(config, extra["resume_step"])
            for writer in writers:
                opened.callback(writer.close)
            write_manifest(output_dir / MANIFEST, config, layout, sys.argv, extra)
            opened.pop_all()
        return writers
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", field="output_dir", value=str(output_dir)) from None


def _describe(
    config: RunConfig, engine: Engine, console: ConsoleLike, layout: dict[str, int], notes: list[str]
) -> None:
    sizes, adaptation = ", ".join(f"{name} {value}" for name, value in layout.items()), adaptation_of(config)
    kind = "parameters of the base" if adaptation else "parameters"
    console.message(f"{num_parameters(config.model):,} {kind}; {sizes}; {config.precision}; seed {config.train.seed}")
    if config.precision == "fp16" and engine.topology.device.type == "cpu" and overrules_fp16():
        _log.info(
            "fp16 on a CPU without fp16 instructions: torch computes it, slowly; DeepSpeed's refusal is switched off"
        )
    console.message(_optimizer_line(config, engine))
    norms = choose_norms(config.train, has_gpu=engine.topology.device.type == "cuda")
    console.message(f"norms: {norms.name} ({norms.because})")
    columns = ["group", "rate", "weight decay", "tensors", "parameters", "share"]
    console.table("Parameter groups, over all ranks", columns, group_rows(config.model, config.optim, adaptation))
    trainable, total = num_trainable(config.model, config.optim, adaptation)
    if trainable != total:
        console.message(f"{trainable:,} of {total:,} parameters are trained, {trainable / total:.2%}")
    for note in notes:
        console.message(f"deepspeed: {note}")


def _optimizer_line(config: RunConfig, engine: Engine) -> str:
    """Say which optimizer updates, by whose code, and why that."""
    zero = check_deepspeed(load_deepspeed(config.deepspeed), config)
    chosen = choose_implementation(config.optim, zero, has_gpu=engine.topology.device.type == "cuda")
    kind = type(engine.basic_optimizer)
    return f"optimizer: {config.optim.name} by {kind.__module__}.{kind.__name__} ({chosen.name}: {chosen.because})"
