"""Counts the collectives of a training step, on one rank: what `lmscale.plan.communication` is compared with."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.batches import make_batch

KINDS = {
    "allreduce_": "all_reduce",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "send": "send",
    "recv_": "recv",
    "barrier": "barrier",
}
GATHERS = ("all_gather", "recv")


class CollectiveCounter(TorchDispatchMode):
    """Collects (kind, ranks, dtype, bytes of the whole tensor) for each collective call of this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, tuple[int, ...], str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self._count(func.__name__.partition(".")[0], args)
        return out

    def _count(self, name: str, args: Any) -> None:
        kind = KINDS[name]
        if kind == "barrier":
            return
        group = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
        ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group)))
        tensors = [_flat(arg) for arg in args[:2] if _flat(arg)]
        # The first argument is the output, the second the input where they differ; the larger is the whole.
        whole = max(tensors, key=lambda some: sum(t.nbytes for t in some))
        self.calls[kind, ranks, str(whole[0].dtype), sum(t.nbytes for t in whole)] += 1


def _flat(arg: Any) -> list[torch.Tensor]:
    if isinstance(arg, torch.Tensor):
        return [arg]
    if isinstance(arg, list | tuple):
        return [tensor for some in arg for tensor in _flat(some)]
    return []


def count_step(keys: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, tuple[int, ...], str, int, int]]]:
    """Train two steps on this rank of a pool; return its place, and the calls of the second with their number."""
    from lmscale.config.io import parse_run
    from lmscale.config.run import ZeroChoice
    from lmscale.parallel.topology import init_topology
    from lmscale.pretrain import build_engine

    config = parse_run(keys)
    topology = init_topology(config.parallel.tp_size, config.parallel.pp_size)
    engine = build_engine(config, topology, ZeroChoice(stage=keys["deepspeed"]["zero_optimization"]["stage"]))
    rows, micro = config.batch.global_batch_size, config.batch.micro_batch_size
    num = rows // (micro * topology.dp_size)
    counter = CollectiveCounter()
    for step in (1, 2):
        batch = make_batch(config.model.architecture, step, rows=rows, vocab_size=190)
        starts = [(m * topology.dp_size + topology.dp_rank) * micro for m in range(num)]
        mine = [{name: array[start : start + micro] for name, array in batch.items()} for start in starts]
        if step == 2:
            counter.__enter__()
        engine.train_step(mine if engine.reads_data else [], num, step, 1.0e-3, seq_length=config.data.seq_length)
    counter.__exit__(None, None, None)
    place = {
        "tp_group": tuple(dist.get_process_group_ranks(topology.tp_group)),
        "dp_group": tuple(dist.get_process_group_ranks(topology.dp_group)),
        "pp_rank": topology.pp_rank,
    }
    return place, [(*call, number) for call, number in counter.calls.items()]
