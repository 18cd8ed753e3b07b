"""Pretrain a language model: `deepspeed ... --module lmscale.pretrain --config RUN.yaml [key=value ...]`."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmscale.adapt.registry import adapted_specs
from lmscale.config.adapt import num_adaptations, prefix_length, prompt_length
from lmscale.config.deepspeed_json import load_deepspeed, passed_notes, resolve_deepspeed
from lmscale.config.implementation import choose_norms
from lmscale.config.io import load_run, show
from lmscale.config.objective import is_packed
from lmscale.config.run import RunConfig, ZeroChoice
from lmscale.errors import EXIT_INTERRUPTED_AND_SAVED, ConfigError
from lmscale.evaluate.samples import Samples
from lmscale.feed.counts import count_tokens
from lmscale.feed.loader import Batch, HeldOut, build_train_loader, build_valid_loaders
from lmscale.feed.same_data import check_same_corpora
from lmscale.launcher.environment import adopt_rank
from lmscale.launcher.status import RUN_ID, STARTED_AT, end_hung, is_supervised, register, run_rank, tell
from lmscale.launcher.validate import LaunchPlan, check_output_dir, validate_run
from lmscale.log import get_logger, log_file, setup_logging
from lmscale.models.build import build_model, model_specs
from lmscale.models.context import build_context
from lmscale.models.loss import LanguageModelLoss
from lmscale.models.task_loss import TaskLoss
from lmscale.monitor.throughput import Throughput
from lmscale.optim.batch_ramp import Sizes, sizes_of
from lmscale.optim.build import build_optimizer
from lmscale.optim.groups import build_groups, freeze
from lmscale.optim.steps import Steps
from lmscale.parallel.topology import Topology, close_topology, init_topology
from lmscale.plan.adaptation import adaptation_of
from lmscale.train.best import Best
from lmscale.train.collectives import last_collectives
from lmscale.train.engine import Engine
from lmscale.train.initial import Givens, initialize
from lmscale.train.loop import Run, train
from lmscale.train.progress import Progress
from lmscale.train.pulse import Phase, Pulse
from lmscale.train.resilience import Requests
from lmscale.train.start import (
    alerting,
    begin,
    build_work,
    choose_determinism,
    open_monitor,
    open_saver,
    reopen_writers,
)
from lmscale.train.verification import newest_good
from lmscale.train.watchdog import Watchdog

_log = get_logger(__name__)


@dataclass(frozen=True)
class Work:
    """What a run trains on and how it is measured.

    Attributes:
        loader: the steps that are left -> this rank's micro batches.
        held_out: corpora whose loss is measured, by name.
        evaluate: measures something else in their place.
        samples: writes texts with each evaluation.
        best: follows a metric of evaluate.
        finish: what is done when training has come to its end.
        givens: what an adaptation's initial values are made of.
    """

    loader: Callable[[Steps], Iterator[Batch]]
    held_out: dict[str, HeldOut] = field(default_factory=dict)
    evaluate: Callable[[], dict[str, float]] | None = None
    samples: Samples | None = None
    best: Best | None = None
    finish: Callable[[Run], None] = lambda run: None
    givens: Givens = field(default_factory=Givens)


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
    return train_run(plan, corpus_work, pipeline=pipeline)


def corpus_work(config: RunConfig, engine: Engine, progress: Progress) -> Work:
    """Train on the run's corpora, and measure the loss of those that are held out."""
    topology = engine.topology
    check_same_corpora(config)
    return Work(
        loader=functools.partial(build_train_loader, config, topology.dp_rank, topology.dp_size),
        held_out=build_valid_loaders(config, topology.dp_rank, topology.dp_size),
        samples=Samples(engine, config) if config.monitor.samples else None,
        givens=Givens(config.tokenizer, functools.partial(count_tokens, config)),
    )


def train_run(
    plan: LaunchPlan, open_work: Callable[[RunConfig, Engine, Progress], Work], *, pipeline: bool | None = None
) -> int:
    """Train a checked run, and return the exit status.

    Args:
        plan: the run.
        open_work: opens its data.
        pipeline: as of `pretrain`.
    Collectives: every rank must call.
    """
    pulse = Pulse()
    with _watched(plan.config, pulse):
        return _train_run(plan, open_work, pulse, pipeline)


def _watched(config: RunConfig, pulse: Pulse) -> Watchdog:
    """Make this rank's watchdog, which looks at the pulse while the run lives."""
    log = log_file(int(os.environ.get("RANK", "0")), Path(config.output_dir) / "logs")
    train = config.train
    return Watchdog(
        pulse, train.hang_timeout_s, train.first_step_timeout_s, log, tell, end_hung, collectives=last_collectives
    )


def _train_run(
    plan: LaunchPlan, open_work: Callable[[RunConfig, Engine, Progress], Work], pulse: Pulse, pipeline: bool | None
) -> int:
    config = plan.config
    topology = init_topology(config.parallel.tp_size, config.parallel.pp_size)
    choose_determinism(config.train.deterministic)
    engine = build_engine(config, topology, plan.zero, pipeline)
    start = begin(engine, config, adaptation_of(config))
    progress = start.progress
    work = open_work(config, engine, progress)
    if progress.step == 0:
        initialize(engine, config.model, config.adapt, config.train.seed, work.givens)
    sizes = sizes_of(config)

    def batches_from(progress: Progress) -> Iterator[Batch] | None:
        loader = work.loader(steps_from(config, sizes, progress))
        return loader if engine.reads_data else None

    batches = batches_from(progress)
    work_at = functools.cache(functools.partial(build_work, config, topology))
    requests = _requests(config, topology)
    requests.install()
    pulse.follow(engine.deepspeed.module, engine.basic_optimizer)
    register()
    with (
        open_monitor(config, engine, progress, passed_notes(load_deepspeed(config.deepspeed))) as (writers, console),
        open_saver(engine, config, start, console) as saver,
    ):
        run = Run(
            config=config,
            engine=engine,
            sizes=sizes,
            batches=batches,
            held_out=work.held_out,
            progress=progress,
            throughput=Throughput(work_at(sizes.seq_length)),
            work_at=work_at,
            writers=writers,
            console=console,
            requests=requests,
            saver=saver,
            evaluate=work.evaluate,
            samples=work.samples,
            best=work.best,
            pulse=pulse,
            batches_from=batches_from,
            newest_good=functools.partial(
                newest_good, Path(config.output_dir) / "checkpoints", start.leaders, _log.warning
            ),
            reopen_writers=functools.partial(reopen_writers, config, writers, topology.device),
        )
        # The supervisor tells of a failure itself, once it knows that nothing is started again.
        with contextlib.nullcontext() if is_supervised() else alerting(run):
            was_stopped = train(run)
        if not was_stopped:
            work.finish(run)
        pulse.enter(Phase.CLOSE)
    if was_stopped and topology.rank == 0:
        requests.clear()
        _log.info("stopped after step %d and saved; the same command goes on from there", run.progress.step)
    return EXIT_INTERRUPTED_AND_SAVED if was_stopped else 0


def _requests(config: RunConfig, topology: Topology) -> Requests:
    began = os.environ.get(STARTED_AT)
    return Requests(
        Path(config.output_dir),
        topology.device,
        config.checkpoint.ephemeral_minutes,
        config.train.max_minutes,
        started_at=float(began) if began else None,
        run_id=os.environ.get(RUN_ID),
    )


def steps_from(config: RunConfig, sizes: Sizes, progress: Progress) -> Steps:
    """List the steps that are left and read data: all but those that are skipped."""
    return Steps(
        sizes,
        progress.consumed_samples,
        progress.consumed_tokens,
        config.train.train_tokens,
        progress.step,
        (*config.train.skipped_ranges, *progress.faults.skips),
    )


def build_engine(config: RunConfig, topology: Topology, zero: ZeroChoice, pipeline: bool | None = None) -> Engine:
    """Build this rank's part of the model, its optimizer and the engine around them.

    Collectives: every rank must call.
    """
    adaptation, packs_rows = adaptation_of(config), config.task is not None and config.task.packed
    context = build_context(
        config.model,
        topology,
        seed=config.train.seed,
        objective=config.objective,
        sequence_parallel=config.parallel.sequence_parallel,
        recompute=config.parallel.recompute,
        partitions_parameters=zero.stage == 3,
        isolates_documents=config.data.reset_attention_mask or packs_rows,
        packs_examples=packs_rows if config.task else is_packed(config.objective),
        pipeline=pipeline,
        compile=config.train.compile,
        apex_norms=choose_norms(config.train, has_gpu=topology.device.type == "cuda").name == "apex",
        prompt_length=prompt_length(config.adapt),
        prefix_length=prefix_length(config.adapt),
        num_adaptations=num_adaptations(config.adapt),
        head=adaptation.head if adaptation else None,
        label_smoothing=config.task.label_smoothing if config.task else 0.0,
    )
    loss = LanguageModelLoss(context) if context.head is None else TaskLoss(context)
    specs = adapted_specs(model_specs(context), context, config.adapt)
    model = build_model(specs, context, loss, pipeline=pipeline)
    freeze(model, config.optim, adaptation)
    groups = build_groups(model, config.optim, adaptation)
    optimizer = build_optimizer(groups, config.optim, topology.device, zero, num_adaptations(config.adapt))
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


def main(arguments: Sequence[str] | None = None, run: Callable[[RunConfig], int] = pretrain) -> int:
    """Run this rank and return its exit status."""
    config, options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    if options.dry_run:
        plan = validate_run(config, int(os.environ.get("WORLD_SIZE", "1")))
        if os.environ.get("RANK", "0") == "0":
            sys.stdout.write(show(plan.config))
        return 0
    check_output_dir(config)  # before a rank's log goes there
    setup_logging(int(os.environ.get("RANK", "0")), Path(config.output_dir) / "logs")
    status = run(config)
    close_topology()
    return status


if __name__ == "__main__":
    adopt_rank()
    sys.exit(run_rank(main))
