"""Forked ranks: results by rank, and failures that name the rank, with its traceback."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

from lmscale.config.io import parse_run
from lmscale.parallel.inherited import keep_inherited_groups
from lmscale.parallel.local_ranks import RankFailure, RankPool, _join
from lmscale.train.simulate import simulate_ranks
from tests.distributed.runs import run_keys

pytestmark = pytest.mark.distributed


def _add_ranks(more: int) -> tuple[int, int, str]:
    import torch
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator

    total = torch.tensor(dist.get_rank() + more)
    dist.all_reduce(total)
    sys.stderr.write(f"rank {dist.get_rank()} speaks\n")
    os.system("echo a child of it speaks")
    return dist.get_rank(), int(total), get_accelerator().device_name()


def _misbehave(how: str) -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        if how == "raise":
            raise ValueError("a defect\nin two lines")
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _sleep() -> None:
    time.sleep(60)


def test_ranks_run_together_again_and_again_and_keep_logs(tmp_path: Path) -> None:
    with RankPool(2, logs=tmp_path / "logs") as pool:
        assert pool.run(_add_ranks, 1) == [(0, 3, "cpu"), (1, 3, "cpu")]
        assert pool.run(_add_ranks, 2) == [(0, 5, "cpu"), (1, 5, "cpu")]
    assert pool.is_closed
    log = (tmp_path / "logs" / "rank-0001.log").read_text()
    assert log.count("rank 1 speaks") == log.count("a child of it speaks") == 2


def test_ranks_run_where_their_caller_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RankPool(1) as pool:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            monkeypatch.chdir(tmp_path / name)
            assert pool.run(os.getcwd) == [str(tmp_path / name)]


@pytest.mark.parametrize(
    ("how", "reason", "part"),
    [
        ("raise", "rank 1: ValueError: a defect", "Traceback"),
        ("die", "rank 1 died of signal 9", "rank 1 died"),
    ],
)
def test_a_failure_names_its_rank_and_ends_the_others(how: str, reason: str, part: str) -> None:
    pool = RankPool(2)
    start = time.monotonic()
    with pytest.raises(RankFailure) as failure:
        pool.run(_misbehave, how)
    assert time.monotonic() - start < 50
    assert failure.value.reason == reason
    assert part in str(failure.value)
    assert pool.is_closed


def test_a_hang_names_the_ranks_and_shows_where_they_are() -> None:
    with pytest.raises(RankFailure, match=r"ranks \[0, 1\] did not answer within 1 s") as failure:
        RankPool(2).run(_sleep, timeout_s=1.0)
    for rank in (0, 1):
        stacks = str(failure.value).split(f"rank {rank}:\n")[1]
        assert "in _sleep" in stacks
        assert "in _serve" in stacks


def test_ranks_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    parent = os.fork()
    if not parent:
        try:
            _keep_ranks(tmp_path)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = [int(pid) for pid in (tmp_path / "ready").read_text().split()]
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    while any(_is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_is_alive(pid) for pid in pids)


def _keep_ranks(directory: Path) -> None:
    tempfile.tempdir = str(directory)  # nobody is left to remove what the pool makes
    pool = RankPool(2)
    (directory / "pids").write_text(" ".join(str(process.pid) for process in pool._processes))
    (directory / "pids").rename(directory / "ready")
    time.sleep(60)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("ends_them", [True, False])
def test_ranks_of_a_process_that_has_groups_make_their_own(ends_them: bool, tmp_path: Path) -> None:
    """A rank that drops a group that it has inherited would wait for its threads for good."""
    user = os.fork()
    if not user:
        status = 1
        try:
            keep_inherited_groups()  # this process is a fork too
            _join(0, 1, tmp_path)
            _make_groups(ends_them)
            simulate_ranks(parse_run(run_keys("corpus", tmp_path)), 2, [0])
            if ends_them:
                RankPool(1).run(_make_groups, True, timeout_s=60)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(user, 0)[1] == 0


def _make_groups(ends_them: bool) -> None:
    from lmscale.parallel.topology import close_topology, init_topology

    init_topology(1, 1)
    if ends_them:
        close_topology()


def test_groups_that_are_ended_leave_nothing() -> None:
    with RankPool(1) as pool:
        assert pool.run(_groups_left) == [[]]


def _groups_left() -> list[str]:
    import torch.distributed as dist
    from megatron.core import parallel_state

    _make_groups(True)
    return [name for name, value in vars(parallel_state).items() if isinstance(value, dist.ProcessGroup)]
