"""Ranks for tests: a pool of the package's local ranks for each world size, forked once and reused.

A failure in a rank reaches pytest with the rank's traceback; a hang fails after a time and names the ranks.
"""

from __future__ import annotations

import atexit
from typing import Any

from lmscale.parallel.local_ranks import TIMEOUT_S, RankFailure, RankPool

__all__ = ["TIMEOUT_S", "RankFailure", "close_pools", "run_ranks"]

JOBS_A_POOL = 6
"""Each job makes process groups, whose gloo threads wake up many times a second until their process ends."""

_pools: dict[int, RankPool] = {}
_jobs: dict[int, int] = {}


def run_ranks(world_size: int, function: Any, *args: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
    """Run a module-level function on `world_size` ranks, on CPU over gloo, and return the results by rank.

    One pool lives at a time: the gloo threads of idle ranks take a fifth of a core for each rank.
    """
    pool = _pools.get(world_size)
    if pool is None or pool.is_closed or _jobs[world_size] == JOBS_A_POOL:
        close_pools()
        _leave_own_group()
        pool = _pools[world_size] = RankPool(world_size)
        _jobs[world_size] = 0
    _jobs[world_size] += 1
    return pool.run(function, *args, timeout_s=timeout_s)


def _leave_own_group() -> None:
    """Leave the group of one rank that a test made in this process, by loading a model: ranks that are forked would have it."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@atexit.register
def close_pools() -> None:
    """End every rank of every pool."""
    while _pools:
        _pools.popitem()[1].close()
