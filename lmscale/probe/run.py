"""A run of probing: features from the cache or from one pass, then a classifier for each layer."""

from __future__ import annotations

import functools
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lmscale.config.adapt import ProbingConfig
from lmscale.config.checkpoint_paths import resolve_checkpoint
from lmscale.config.io import show as show_config
from lmscale.config.run import RunConfig
from lmscale.data.tokenizer import load_tokenizer
from lmscale.errors import EXIT_INTERRUPTED_AND_SAVED
from lmscale.launcher.status import register
from lmscale.launcher.validate import CONFIG_FILE, LaunchPlan
from lmscale.log import get_logger
from lmscale.monitor.atomic import replaced
from lmscale.monitor.console import Console
from lmscale.monitor.manifest import write_manifest
from lmscale.monitor.metrics import Record
from lmscale.monitor.results import write_results
from lmscale.monitor.writers import build_writers
from lmscale.parallel.topology import Topology, init_topology
from lmscale.plan.adaptation import adaptation_of
from lmscale.plan.groups import num_trainable
from lmscale.plan.probing import pooling_of, probed_layers
from lmscale.pretrain import build_engine
from lmscale.probe.cache import FeatureCache
from lmscale.probe.classifiers import MIX, Probing, train_classifiers
from lmscale.probe.features import FeaturePass
from lmscale.probe.report import PLOT, best_of, plot, show
from lmscale.probe.units import read_units
from lmscale.probe.watch import Stopped, Watch
from lmscale.tasks.build import build_task
from lmscale.train.base import hash_weights
from lmscale.train.checkpoint import load_weights
from lmscale.train.checkpoint_reader import CheckpointReader
from lmscale.train.engine import peak_bytes
from lmscale.train.resilience import Request, Requests
from lmscale.train.start import choose_determinism

_log = get_logger(__name__)

_TICK_S = 20.0
_DONE, _STOPS = 1.0, 2.0


def probe_run(plan: LaunchPlan, *, pipeline: bool | None = None) -> int:
    """Probe a frozen model on the ranks that were started, and return the exit status.

    All ranks compute the features; rank 0 trains the classifiers, and writes everything. TERM, INT and output_dir/STOP end
    the run between two splits or two steps; features that are there by then are found by the next start.

    Args:
        plan: the checked run.
        pipeline: take DeepSpeed's pipeline engine; left out, where there are several stages.

    Raises:
        LmscaleError: if the input is wrong or the run cannot go on.
    Collectives: every rank must call.
    """
    config = plan.config
    topology = init_topology(config.parallel.tp_size, config.parallel.pp_size)
    choose_determinism(config.train.deterministic)
    assert config.model.init_from is not None
    base = CheckpointReader(resolve_checkpoint(Path(config.model.init_from)))
    probing = _open(config, hash_weights(base))
    if topology.rank == 0:
        _describe(plan, topology)
    requests = Requests(Path(config.output_dir), topology.device)
    requests.install()
    register()
    started = time.monotonic()
    missing = _missing(probing)
    if missing and not _compute(probing, plan, topology, base, missing, pipeline, requests):
        return _stopped(topology, requests)
    seconds = time.monotonic() - started
    peak = torch.tensor(peak_bytes(topology.device), device=topology.device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    if not missing:
        _log.info("features found in %s", Path(config.output_dir) / "features")
    was_stopped = False
    with _company(topology) as company:
        if topology.rank == 0:
            started = time.monotonic()
            try:
                with _writers(config) as write:
                    watch = Watch(tick=functools.partial(_tick, company, requests), write=write)
                    found = train_classifiers(probing, topology.device, watch)
            except Stopped:
                was_stopped = company.stops = True
            else:
                costs = {
                    "peak_bytes": max(int(peak), peak_bytes(topology.device)),
                    "seconds": seconds + time.monotonic() - started,
                    "feature_seconds": seconds,
                }
                _report(probing, found, costs)
    return _stopped(topology, requests) if was_stopped or company.stops else 0


def _tick(company: _Company, requests: Requests) -> None:
    """Keep the other ranks waiting, and end the training where the run was asked to stop."""
    company.tick()
    if requests.stops_here:
        raise Stopped


def _stopped(topology: Topology, requests: Requests) -> int:
    if topology.rank == 0:
        requests.clear()
        _log.info("stopped; the features that are there are kept, and the same command goes on from them")
    return EXIT_INTERRUPTED_AND_SAVED


@contextmanager
def _writers(config: RunConfig) -> Iterator[Callable[[Record], None]]:
    """Open metrics.jsonl and the other writers, anew: yields what writes a record to all."""
    writers = build_writers(config.monitor, config.output_dir)

    def write(record: Record) -> None:
        for writer in writers:
            writer.write(record)

    try:
        for writer in writers:
            writer.text("config", f"```yaml\n{show_config(config)}\n```")
        yield write
    finally:
        for writer in writers:
            writer.close()


def _open(config: RunConfig, base: str) -> Probing:
    adapt, tokenizer = config.adapt, config.tokenizer
    assert isinstance(adapt, ProbingConfig)
    assert tokenizer is not None
    assert config.task is not None
    task = build_task(config, load_tokenizer(tokenizer))
    kind = config.task.kind
    pooling = pooling_of(adapt, kind)
    return Probing(
        config=config,
        adapt=adapt,
        task=task,
        units={name: read_units(split, kind) for name, split in task.splits.items()},
        layers=probed_layers(config.model, adapt),
        pooling=pooling,
        cache=FeatureCache(Path(config.output_dir) / "features", config, base, pooling),
        base=base,
    )


def _describe(plan: LaunchPlan, topology: Topology) -> None:
    """Write config.yaml and manifest.json."""
    config, output_dir = plan.config, Path(plan.config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with replaced(output_dir / CONFIG_FILE) as file:
        file.write(show_config(config).encode())
    sizes = {name: getattr(topology, name) for name in ("world_size", "tp_size", "pp_size", "dp_size")}
    layout = {**sizes, "zero_stage": plan.zero.stage}
    write_manifest(
        output_dir / "manifest.json", config, layout, sys.argv, {"hosts": [socket.gethostname()], "data": {}}
    )


def _missing(probing: Probing) -> dict[str, list[int]]:
    """List the layers of each split whose features are not in the cache, the same on every rank.

    Collectives: a broadcast from rank 0.
    """
    found: list[dict[str, list[int]]] = [{}]
    if dist.get_rank() == 0:
        for name, units in probing.units.items():
            layers = [layer for layer in probing.layers if not probing.cache.has(name, layer, units)]
            if layers:
                found[0][name] = layers
    dist.broadcast_object_list(found, src=0)
    return found[0]


def _compute(
    probing: Probing,
    plan: LaunchPlan,
    topology: Topology,
    base: CheckpointReader,
    missing: dict[str, list[int]],
    pipeline: bool | None,
    requests: Requests,
) -> bool:
    """Compute the features that are missing, and keep them; False where the run was asked to stop before.

    Collectives: every rank must call.
    """
    config = probing.config
    engine = build_engine(config, topology, plan.zero, pipeline)
    load_weights(engine, base, adaptation_of(config))
    for name, layers in missing.items():
        if requests.agreed() is Request.STOP:
            return False
        units = probing.units[name]
        reading = FeaturePass(engine, config, probing.task.splits[name], units, probing.pooling)
        for layer, features in reading.features(layers):
            if features is not None:
                probing.cache.write(name, layer, units, features)
        _log.info("features of %s: %d units, layers %s", name, units.num_units, layers)
    return requests.agreed() is not Request.STOP


class _Company:
    """The other ranks, which wait while rank 0 works.

    Attributes:
        stops: the run was asked to stop; of rank 0 before they wait no longer, of the others afterwards.
    """

    def __init__(self, topology: Topology):
        self._word = torch.zeros(1, device=topology.device)
        self._last = time.monotonic()
        self.stops = False

    def tick(self) -> None:
        """Tell them now and then to wait on, lest their waiting time out."""
        if time.monotonic() - self._last > _TICK_S:
            dist.broadcast(self._word, src=0)
            self._last = time.monotonic()

    def release(self) -> None:
        """Tell them that it is over."""
        dist.broadcast(self._word.fill_(_STOPS if self.stops else _DONE), src=0)

    def wait(self) -> None:
        """Wait for rank 0."""
        while not float(self._word):
            dist.broadcast(self._word, src=0)
        self.stops = float(self._word) == _STOPS


@contextmanager
def _company(topology: Topology) -> Iterator[_Company]:
    """Let the other ranks wait while rank 0 works.

    Collectives: broadcasts from rank 0; every rank must enter.
    """
    company = _Company(topology)
    yield company
    if topology.rank == 0:
        company.release()
    else:
        company.wait()


def _report(probing: Probing, found: dict[str, dict[str, Any]], costs: dict[str, float]) -> None:
    """Show a table, draw the picture, and write results.json in the form of every method, of the best layer."""
    config, task, output_dir = probing.config, probing.task, Path(probing.config.output_dir)
    best = best_of(found, task.metric)
    trainable, total = num_trainable(config.model, config.optim, adaptation_of(config))
    results: dict[str, Any] = {
        "method": probing.adapt.method,
        "seed": config.train.seed,
        "metric": task.metric,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "steps": found[best]["steps"],
        "best_step": found[best]["best_step"],
        **costs,
        "splits": {
            name: {"domain": task.splits[name].domain, "examples": task.splits[name].num_examples, **values}
            for name, values in found[best]["splits"].items()
        },
        "head": probing.adapt.head,
        "pooling": probing.pooling,
        "layer": best if best == MIX else int(best),
        "layers": found,
    }
    write_results(output_dir, results)
    console = Console()
    console.message(f"{trainable:,} parameters in each classifier, beside {total - trainable:,} frozen ones")
    show(found, task, console, best)
    plot(found, task.metric, output_dir / PLOT, f"{probing.adapt.head} probes of {config.model.init_from}")
