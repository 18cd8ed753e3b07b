"""What is asked of a run, as its ranks agree on it: time that is over, the stop file, whose it is."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lmscale.train.resilience import Request, Requests
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import pretrain_in_rank, records, run_keys

pytestmark = pytest.mark.distributed


def agreed_in_rank(directory: str, seconds_ago: list[float], stop_file: str | None, run_id: str | None) -> list[int]:
    """Return what the ranks agree on, once before and once after a stop file is made."""
    path = Path(directory) / "STOP"
    if stop_file is not None and dist.get_rank() == 0:
        path.write_text(stop_file)
    dist.barrier()
    began = time.time() - seconds_ago[dist.get_rank()]
    requests = Requests(Path(directory), torch.device("cpu"), 0, 1.0, started_at=began, run_id=run_id)
    requests.install()
    found = [int(requests.agreed())]
    dist.barrier()
    if dist.get_rank() == 0:
        path.touch()
    found.append(int(requests.agreed()))
    return found


@pytest.mark.parametrize(("seconds_ago", "expected"), [([59, 3600], Request.NONE), ([61, 0], Request.STOP)])
def test_rank_0s_clock_decides_when_the_time_is_over(tmp_path, seconds_ago, expected):
    found = run_ranks(2, agreed_in_rank, str(tmp_path), seconds_ago, None, None)
    assert found == [[expected, Request.STOP]] * 2


@pytest.mark.parametrize(
    ("content", "run_id", "expected"),
    [
        ("", "this", Request.NONE),
        ("that", "this", Request.NONE),
        ("this", "this", Request.STOP),
        ("", None, Request.NONE),
    ],
)
def test_a_stop_file_of_this_launch_outlives_the_start_and_an_earlier_one_does_not(tmp_path, content, run_id, expected):
    found = run_ranks(2, agreed_in_rank, str(tmp_path), [0, 0], content, run_id)
    assert found == [[expected, Request.STOP]] * 2


def test_a_run_whose_time_is_over_ends_its_step_saves_and_goes_on_later(corpus, tmp_path):
    keys = run_keys(corpus, tmp_path / "run", train__max_minutes=1e-3)
    assert run_ranks(2, pretrain_in_rank, keys) == [75, 75]
    assert [record["step"] for record in records(keys)] == [1]
    assert run_ranks(2, pretrain_in_rank, keys) == [75, 75]
    assert [record["step"] for record in records(keys)] == [1, 2]
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()
