"""What of the training state a rank writes into a checkpoint: of what several ranks hold alike, one writes it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from lmscale.parallel.topology import Topology
from lmscale.train.checkpoint_files import PARAMETER, Piece
from lmscale.train.engine import Engine
from lmscale.train.fragments import Fragment
from lmscale.train.moments import Moment, moments


@dataclass(frozen=True)
class Place:
    """Where a rank stands in the layout, and which ranks it shares files with.

    Attributes:
        leader: the lowest rank that sees the same directory.
    """

    tp_rank: int
    pp_rank: int
    dp_rank: int
    leader: int


def places(topology: Topology, leaders: list[int]) -> list[Place]:
    """List the places of all ranks; the order is tensor-, then data-, then pipeline-parallel."""
    tp, dp = topology.tp_size, topology.dp_size
    return [Place(rank % tp, rank // (tp * dp), rank // tp % dp, leader) for rank, leader in enumerate(leaders)]


def saved_fragments(engine: Engine) -> list[Fragment]:
    """List what a checkpoint holds: everything, or what is trained where the rest is the base's."""
    return [fragment for fragment in engine.fragments() if engine.base is None or not fragment.is_frozen]


def owned_slices(engine: Engine, ranks: list[Place], file: str) -> list[tuple[Piece, torch.Tensor]]:
    """List what this rank writes, and the fp32 values of each, 1-D, on the device.

    Where all ranks share a directory, each value is written once; where hosts have directories of their own, on each host
    that needs it to go on.
    """
    mine = ranks[engine.topology.rank]
    found = []
    for fragment in saved_fragments(engine):
        weights = Moment(PARAMETER, fragment.tensor, fragment.start, fragment.end, fragment.master, fragment.is_dp_copy)
        is_whole = engine.zero_stage == 0 or (fragment.is_frozen and engine.zero_stage < 3)
        for moment in (weights, *moments(engine.basic_optimizer, fragment)):
            kind = _Kind(fragment.is_tied_copy, is_whole, moment.tensor.tp_dim is not None, moment.is_copy)
            if _writes(kind, mine, tuple(ranks)):
                found.append((_piece(engine.topology, moment, file), moment.values.detach()))
    return found


@dataclass(frozen=True)
class _Kind:
    """How values are spread over ranks.

    Attributes:
        is_tied_copy: of a parameter that the first stage has too.
        is_replicated: alike on all data-parallel ranks.
        is_split: cut over the tensor-parallel ranks.
        is_copy: of what the first data-parallel rank that has a part of the matrix holds.
    """

    is_tied_copy: bool
    is_replicated: bool
    is_split: bool
    is_copy: bool


@functools.lru_cache(256)
def _writes(kind: _Kind, mine: Place, ranks: tuple[Place, ...]) -> bool:
    """Tell whether a rank is the one that writes values into its directory."""
    near = [other for other in ranks if other.leader == mine.leader]
    if kind.is_copy and not kind.is_replicated:
        return len(near) < len(ranks)  # who has the first part may be on another host; copies do no harm
    if kind.is_tied_copy and any(_at(other) == (mine.tp_rank, 0, mine.dp_rank) for other in near):
        return False
    first_tp = mine.tp_rank if kind.is_split else 0
    first_dp = 0 if kind.is_replicated else mine.dp_rank
    same = [
        other
        for other in near
        if other.pp_rank == mine.pp_rank
        and first_tp <= other.tp_rank <= mine.tp_rank
        and first_dp <= other.dp_rank <= mine.dp_rank
    ]
    return min(same, key=lambda other: (other.dp_rank, other.tp_rank)) == mine


def _at(place: Place) -> tuple[int, int, int]:
    return place.tp_rank, place.pp_rank, place.dp_rank


def _piece(topology: Topology, moment: Moment, file: str) -> Piece:
    tensor = moment.tensor
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
        key=f"{moment.kind}/{tensor.name}",
    )
