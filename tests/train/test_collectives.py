"""The last collectives of a rank, as torch's own record has them: a contract with torch."""

import threading
import time

import pytest
import torch
import torch.distributed as dist

from lmscale.train.collectives import last_collectives
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed


def collectives_of_rank() -> dict:
    """Finish two, and begin a third that rank 1 joins late."""
    before = {group: one.number for group, one in last_collectives().items()}
    name = next((group for group in before if group.startswith("default_pg")), None)
    first = before.get(name, 0)
    dist.all_reduce(torch.ones(3))
    dist.all_reduce(torch.ones(5))
    rank = dist.get_rank()
    if rank == 0:
        thread = threading.Thread(target=lambda: dist.all_reduce(torch.ones(7)))
        thread.start()
    time.sleep(0.5)
    found = {group: one for group, one in last_collectives().items() if group.startswith("default_pg")}
    (last,) = found.values()
    time.sleep(0.5)
    if rank == 0:
        thread.join()
    else:
        dist.all_reduce(torch.ones(7))
    return {"began": last.number - first, "name": last.name, "is_pending": last.is_pending}


def test_the_rank_that_waits_is_a_collective_further_than_the_one_it_waits_for():
    assert run_ranks(2, collectives_of_rank) == [
        {"began": 3, "name": "all_reduce[7]", "is_pending": True},
        {"began": 2, "name": "all_reduce[5]", "is_pending": False},
    ]
