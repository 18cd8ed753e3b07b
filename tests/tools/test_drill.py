"""The drills of tools/drill.py: a cover of them by default, every one and two hundred random kills as slow tests."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import close_pools

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
faults: Any = importlib.import_module("drill_faults")
sites: Any = importlib.import_module("drill_site")

pytestmark = pytest.mark.distributed

SINGLE = {
    drill.name: drill
    for drill in [*faults.damages(), *faults.steps(), *faults.numbers(), *faults.requests(), *faults.disks()]
}
COVER = {
    "a flipped bit: rank-00001.safetensors",
    "a flipped bit: manifest.json",
    "truncated: rank-00000.json",
    "missing: rank-00001.safetensors",
    "a file of another checkpoint: rank-00001.safetensors",
    "`latest` is empty",
    "all checkpoints damaged",
    "a checkpoint that is asked for is missing",
    "kill -9 of rank 1 in the update of a step",
    "a NaN in a gradient of rank 1: skip",
    "a poisoned batch (the loss is NaN) on rank 1: rewind",
    "a NaN in a gradient of rank 1: stop",
    "SIGTERM to rank 1",
    "a rank that stops answering (SIGSTOP)",
    "a full disk, written behind the loop",
    "a read-only disk while saving",
    "a vanished directory while saving",
    "a full disk at the last save",
}
EVERY = 5
"""Of the points at which a save writes, those that are broken by default."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Any:
    close_pools()  # the drills fork ranks of their own
    made = sites.Site(tmp_path_factory.mktemp("drill"))
    made.prepare()
    return made


def run(drill: Any, site: Any) -> None:
    try:
        assert drill.run(site)
    except sites.NotHere as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize(
    "name", [name if name in COVER else pytest.param(name, marks=pytest.mark.slow) for name in SINGLE]
)
def test_what_is_promised_holds(name: str, site: Any) -> None:
    run(SINGLE[name], site)


def test_the_cover_is_of_drills_that_are_there() -> None:
    assert SINGLE.keys() >= COVER


@pytest.mark.parametrize("every", [EVERY, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_point_of_a_save_loses_nothing(every: int, site: Any) -> None:
    drills = faults.write_points(site)
    assert len(drills) >= 25
    for drill in drills[::every]:
        run(drill, site)


@pytest.mark.timeout(3600)  # each kill costs a start
@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_kills_at_random_times_lose_nothing(count: int, site: Any) -> None:
    run(faults.random_kills(count), site)


def test_a_promise_that_is_broken_is_told(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drill that cannot fail proves nothing: with saves that are not atomic, kills show."""
    from lmscale.train import saving

    def in_place(saver: Any, progress: Any) -> Path:
        return Path(sites.step_directory(saver._checkpoints, progress.step))

    monkeypatch.setattr(saving.Saver, "_partial", in_place)
    with pytest.raises(Exception, match=r"is not a checkpoint|is missing|bytes of"):
        faults._KillAtPoint(1, 1, False)(site)
