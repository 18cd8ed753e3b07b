"""Ranks of a run of any size, built one after another on this machine: each with its layers, parameters and groups.

The run's own code builds them, over a process group that only pretends to have the other ranks and on torch's meta
device, which has shapes and no memory. It happens in a process of its own, so nothing of it stays.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from lmscale.config.run import RunConfig
from lmscale.errors import ConfigError, LmscaleError, RunError
from lmscale.parallel.inherited import keep_inherited_groups


@dataclass(frozen=True)
class HeldParameter:
    """A parameter of a rank: the logical tensor, how tensor parallelism cuts it, and whether an earlier stage has it too."""

    name: str
    shape: tuple[int, ...]
    tp_dim: int | None
    tp_stride: int
    is_tied_copy: bool


@dataclass(frozen=True)
class SimulatedRank:
    """What a rank of the run has.

    Attributes:
        rank: its number among all.
        stage: its pipeline stage.
        layers: logical names of the layers that it runs, in order; a tied one once for each use.
        num_parameters: that it holds before ZeRO, padding of the vocabulary and tied copies included.
        tp_ranks: its tensor-parallel group.
        dp_ranks: its data-parallel group.
        pp_ranks: its pipeline.
        parameters: what it holds before ZeRO, in the order of the model.
    """

    rank: int
    stage: int
    layers: list[str]
    num_parameters: int
    tp_ranks: list[int]
    dp_ranks: list[int]
    pp_ranks: list[int]
    parameters: tuple[HeldParameter, ...] = ()


def simulate_ranks(config: RunConfig, world_size: int, ranks: Sequence[int]) -> list[SimulatedRank]:
    """Build chosen ranks of a run at full size.

    Args:
        config: the run; model, parallel and objective are read, no corpus is.
        world_size: ranks in all.
        ranks: those to build.

    Raises:
        ConfigError: for a rank that the run does not have, or ranks that the layout does not divide.
        RunError: if the process that builds them ends without an answer.
    """
    wrong = next((rank for rank in ranks if not 0 <= rank < world_size), None)
    if wrong is not None:
        raise ConfigError(f"must be 0 to {world_size - 1}", field="rank", value=wrong)
    model_size = config.parallel.tp_size * config.parallel.pp_size
    if world_size % model_size:
        raise ConfigError(f"must be a multiple of tp_size pp_size = {model_size}", field="devices", value=world_size)
    # A process that has torch can be copied; one that has not, as the command line's, starts another.
    context = multiprocessing.get_context("fork" if "deepspeed" in sys.modules else "spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, config.model_dump(), world_size, list(ranks)), daemon=True)
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        process.join()
        raise RunError(f"the simulation ended with status {process.exitcode} and no answer") from None
    finally:
        ours.close()
    process.join()
    if isinstance(answer, LmscaleError):
        raise answer
    if isinstance(answer, str):
        raise RunError(f"the simulation failed: {answer}")
    return list(answer)


def show_ranks(rows: Sequence[SimulatedRank]) -> str:
    """Write simulated ranks as lines of text, one rank each."""
    return "\n".join(
        f"rank {row.rank}: stage {row.stage}, {_names(row.layers)}, {row.num_parameters:,} parameters; "
        f"tensor-parallel with {_span(row.tp_ranks)}, data-parallel with {_span(row.dp_ranks)}, "
        f"pipeline {_span(row.pp_ranks)}"
        for row in rows
    )


def _names(layers: Sequence[str]) -> str:
    return f"{len(layers)} layers ({layers[0]} .. {layers[-1]})" if len(layers) > 1 else f"1 layer ({layers[0]})"


def _span(ranks: Sequence[int]) -> str:
    """Write an evenly spaced group shortly: "0, 8 .. 1016"."""
    if len(ranks) <= 3:
        return ", ".join(map(str, ranks))
    return f"{ranks[0]}, {ranks[1]} .. {ranks[-1]}"


def _serve(connection: Connection, keys: dict[str, Any], world_size: int, ranks: list[int]) -> None:
    """Build the ranks in a process of their own and send them, an error, or its text."""
    answer: Any
    keep_inherited_groups()
    warnings.simplefilter("ignore")  # what the libraries warn of, they warn of in the run
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            answer = [_simulate(RunConfig.model_validate(keys), world_size, rank) for rank in ranks]
    except LmscaleError as error:
        answer = error
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    connection.send(answer)
    connection.close()


def _simulate(config: RunConfig, world_size: int, rank: int) -> SimulatedRank:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from lmscale.models.build import build_model, model_specs
    from lmscale.models.context import build_context
    from lmscale.models.loss import LanguageModelLoss
    from lmscale.parallel.topology import init_topology

    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    topology = init_topology(config.parallel.tp_size, config.parallel.pp_size)
    context = build_context(
        config.model,
        topology,
        seed=config.train.seed,
        objective=config.objective,
        sequence_parallel=config.parallel.sequence_parallel,
        recompute=config.parallel.recompute,
    )
    specs = model_specs(context)
    with torch.device("meta"), _staying_on_meta():
        model = build_model(specs, context, LanguageModelLoss(context))
    bounds = model.parts[topology.pp_rank : topology.pp_rank + 2] if topology.pp_size > 1 else (0, len(specs))
    row = SimulatedRank(
        rank=rank,
        stage=topology.pp_rank,
        layers=[name for name, _ in specs[bounds[0] : bounds[1]]],
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        tp_ranks=dist.get_process_group_ranks(topology.tp_group),
        dp_ranks=dist.get_process_group_ranks(topology.dp_group),
        pp_ranks=dist.get_process_group_ranks(topology.pp_group),
        parameters=tuple(_held(model, name, p, topology.tp_size) for name, p in model.named_parameters()),
    )
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return row


def _held(model: Any, name: str, parameter: Any, tp_size: int) -> HeldParameter:
    from lmscale.train.fragments import logical_tensor

    tensor, is_copy = logical_tensor(model, name, parameter, tp_size), getattr(parameter, "ds_pipe_replicated", False)
    return HeldParameter(tensor.name, tensor.shape, tensor.tp_dim, tensor.tp_stride, bool(is_copy))


@contextlib.contextmanager
def _staying_on_meta() -> Iterator[None]:
    """Leave what is built on the meta device there: there is nothing to move, and nothing to broadcast."""
    from deepspeed.runtime.pipe.module import PipelineModule
    from torch import nn

    move, synchronize = nn.Module.to, PipelineModule._synchronize_tied_weights
    nn.Module.to = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    PipelineModule._synchronize_tied_weights = lambda self: None
    try:
        yield
    finally:
        nn.Module.to = move  # type: ignore[method-assign]
        PipelineModule._synchronize_tied_weights = synchronize
