"""Copies of a corpus on several hosts: the same content passes, another is named on every rank."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import pytest

from lmscale.config.io import parse_run
from lmscale.errors import DataError
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import run_keys, write_corpus

pytestmark = pytest.mark.distributed


def check_on_its_host(directory: Path, is_shared: bool) -> str:
    """Check as a rank of host-0 or host-1, each in a directory of its own; return the error's line."""
    import torch.distributed as dist

    from lmscale.feed.same_data import check_same_corpora

    host = f"host-{dist.get_rank()}"
    changes = {"data__shared_filesystem": is_shared}
    config = parse_run(run_keys("tokens", directory / "run", **changes))
    former, name = os.getcwd(), socket.gethostname
    os.chdir(directory / host)
    socket.gethostname = lambda: host
    try:
        check_same_corpora(config)
    except DataError as error:
        return str(error)
    finally:
        os.chdir(former)
        socket.gethostname = name
    return ""


def make_hosts(directory: Path, seeds: tuple[int, int]) -> None:
    for number, seed in enumerate(seeds):
        (directory / f"host-{number}").mkdir()
        write_corpus(directory / f"host-{number}" / "tokens", np.random.default_rng(seed), num_tokens=2_000)


def test_equal_copies_pass(tmp_path: Path) -> None:
    make_hosts(tmp_path, (7, 7))
    assert run_ranks(2, check_on_its_host, tmp_path, False) == ["", ""]


def test_a_copy_that_differs_is_named_on_every_rank(tmp_path: Path) -> None:
    make_hosts(tmp_path, (7, 8))
    first, second = run_ranks(2, check_on_its_host, tmp_path, False)
    assert first == second
    assert first.startswith("data = 'tokens': host-1 has content ")
    assert ", and host-0 " in first


def test_a_copy_that_is_missing_is_named_on_every_rank(tmp_path: Path) -> None:
    make_hosts(tmp_path, (7, 7))
    (tmp_path / "host-1" / "tokens.bin").unlink()
    first, second = run_ranks(2, check_on_its_host, tmp_path, False)
    assert first == second
    assert first.startswith("on host-1: ")


def test_a_shared_file_system_is_trusted(tmp_path: Path) -> None:
    make_hosts(tmp_path, (7, 8))
    assert run_ranks(2, check_on_its_host, tmp_path, True) == ["", ""]


def test_a_disk_that_fails_on_one_host_does_not_leave_the_others_waiting(tmp_path: Path, monkeypatch) -> None:
    from lmscale.feed import same_data

    def fail(config):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(same_data, "corpus_hashes", fail)
    assert same_data._hashes(parse_run(run_keys("tokens", tmp_path / "run"))) == "[Errno 5] Input/output error"
