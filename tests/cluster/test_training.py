"""Runs over several hosts, by the real launchers: the losses of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, records_in
from tests.distributed.runs import fresh, largest_difference, losses, pretrain_on_ranks, run_keys

TOLERANCE = 1.0e-5
"""Between layouts, in fp32: sums in another order."""


def expected(hosts: Hosts, tmp_path: Path, ranks: int = 1, **changes: object) -> list[float]:
    """The losses of the same run on ranks of this machine."""
    return losses(pretrain_on_ranks(ranks, fresh(run_keys(hosts.corpus, tmp_path / "here", **changes))))


@pytest.mark.parametrize("is_shared", [False, True])
def test_two_hosts_by_pdsh_have_the_losses_of_one_process(hosts: Hosts, tmp_path: Path, is_shared: bool) -> None:
    output_dir = (hosts.shared if is_shared else hosts.own) / "run"
    _, config = hosts.write(output_dir)
    status, output = hosts.end(hosts.train(config, hosts.hostfile("host-1", "host-2")))
    assert status == 0, output
    there = output_dir if is_shared else hosts.path("host-1", output_dir)
    ours = losses(records_in(there / "metrics.jsonl"))
    assert largest_difference(ours, expected(hosts, tmp_path)) < TOLERANCE
    assert not hosts.left()
