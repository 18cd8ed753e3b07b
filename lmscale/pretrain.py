"""Pretrain a language model: `deepspeed ... --module lmscale.pretrain --config RUN.yaml [key=value ...]`."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmscale.config.deepspeed_json import load_deepspeed, passed_notes, resolve_deepspeed
from lmscale.config.io import load_run, show
from lmscale.config.run import RunConfig, ZeroChoice
from lmscale.errors import EXIT_INTERRUPTED_AND_SAVED, ConfigError
from lmscale.feed.loader import build_train_loader, build_valid_loaders
from lmscale.launcher.environment import adopt_rank
from lmscale.launcher.status import register, run_rank
from lmscale.launcher.validate import validate_run
from lmscale.log import get_logger, setup_logging
from lmscale.models.build import build_model, model_specs
from lmscale.models.context import build_context
from lmscale.models.loss import LanguageModelLoss
from lmscale.optim.batch_ramp import batch_size_at
from lmscale.optim.build import build_optimizer
from lmscale.optim.groups import build_groups
from lmscale.parallel.topology import Topology, close_topology, init_topology
from lmscale.train.engine import Engine
from lmscale.train.loop import Run, train
from lmscale.train.resilience import Requests
from lmscale.train.start import begin, build_throughput, choose_determinism, open_monitor

_log = get_logger(__name__)


def pretrain(config: RunConfig, *, pipeline: bool | None = None) -> int:
    """Train a run on the ranks that were started, and return the exit status.

    Args:
        config: the run.
        pipeline: take DeepSpeed's pipeline engine; left out, where there are several stages.

    Raises:
        LmscaleError: if the input is wrong or the run cannot go on.
    Collectives: every rank must call.
    """
    plan = validate_run(config, int(os.environ.get("WORLD_SIZE", "1")))
    config = plan.config

    topology = init_topology(config.parallel.tp_size, config.parallel.pp_size)
    choose_determinism(config.train.deterministic)
    engine = build_engine(config, topology, plan.zero, pipeline)
    progress = begin(engine, config)
    batch_size = functools.partial(batch_size_at, batch=config.batch)
    loader = build_train_loader(config, topology.dp_rank, topology.dp_size, progress.consumed_samples, batch_size)
    requests = Requests(Path(config.output_dir), topology.device)
    requests.install()
    register()
    with open_monitor(config, engine, progress, passed_notes(load_deepspeed(config.deepspeed))) as (writers, console):
        run = Run(
            config=config,
            engine=engine,
            batches=loader if engine.reads_data else None,
            held_out=build_valid_loaders(config, topology.dp_rank, topology.dp_size),
            progress=progress,
            throughput=build_throughput(config, topology),
            writers=writers,
            console=console,
            requests=requests,
            tokenizer=Path(config.tokenizer.path) if config.tokenizer else None,
        )
        was_stopped = train(run)
    if was_stopped and topology.rank == 0:
        requests.clear()
        _log.info("stopped after step %d and saved; the same command goes on from there", run.progress.step)
    return EXIT_INTERRUPTED_AND_SAVED if was_stopped else 0


def build_engine(config: RunConfig, topology: Topology, zero: ZeroChoice, pipeline: bool | None = None) -> Engine:
    """Build this rank's part of the model, its optimizer and the engine around them.

    Collectives: every rank must call.
    """
    context = build_context(
        config.model,
        topology,
        seed=config.train.seed,
        objective=config.objective,
        sequence_parallel=config.parallel.sequence_parallel,
        recompute=config.parallel.recompute,
        partitions_parameters=zero.stage == 3,
        isolates_documents=config.data.reset_attention_mask,
        pipeline=pipeline,
        compile=config.train.compile,
    )
    loss = LanguageModelLoss(context)
    model = build_model(model_specs(context), context, loss, pipeline=pipeline)
    groups = build_groups(model.named_parameters(), config.optim)
    optimizer = build_optimizer(groups, config.optim, topology.device, zero.offload_optimizer)
    keys = resolve_deepspeed(load_deepspeed(config.deepspeed), config, topology.dp_size)
    return Engine(model, context, loss, optimizer, keys, config.optim.max_grad_norm)


def parse_arguments(arguments: Sequence[str]) -> tuple[RunConfig, argparse.Namespace]:
    """Read the command line of a rank: options of ours, of DeepSpeed's launcher, and key=value overrides."""
    parser = _Parser(prog="lmscale.pretrain", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, help="the run's YAML")
    parser.add_argument("--deepspeed_config", help="a DeepSpeed JSON in the place of the config's")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and exit")
    parser.add_argument("--local_rank", type=int, help="given by DeepSpeed's launcher; LOCAL_RANK is read instead")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys, over the file's")
    options = parser.parse_intermixed_args(arguments)
    config = load_run(options.config, options.overrides)
    if options.deepspeed_config:
        config = config.model_copy(update={"deepspeed": options.deepspeed_config})
    return config, options


class _Parser(argparse.ArgumentParser):
    """argparse, with its complaints in our one line."""

    def error(self, message: str) -> Any:
        raise ConfigError(message, field="command line")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this rank and return its exit status."""
    config, options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    if options.dry_run:
        validate_run(config, int(os.environ.get("WORLD_SIZE", "1")))
        if os.environ.get("RANK", "0") == "0":
            sys.stdout.write(show(config))
        return 0
    setup_logging(int(os.environ.get("RANK", "0")), Path(config.output_dir) / "logs")
    status = pretrain(config)
    close_topology()
    return status


if __name__ == "__main__":
    adopt_rank()
    sys.exit(run_rank(main))
