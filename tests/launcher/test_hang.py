"""A hang: found, looked into, blamed on the rank that the others wait for; by real processes, with and without a supervisor."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lmscale.launcher import hang
from lmscale.launcher.hang import verdict
from lmscale.train.pulse import Beat, Collective, Phase
from tests.launcher.test_supervise import HERE, Launch

GROUP = "default_pg (group 0)"


def beat(step: int, phase: Phase = Phase.TRAIN, number: int = 7, is_pending: bool = True) -> Beat:
    collectives = {GROUP: Collective(number, "all_reduce[4]", is_pending)}
    return Beat(1, "here", step, phase, 9.0, 5.0, 0.5, True, collectives)


def test_the_rank_behind_the_others_is_missing():
    beats = {0: beat(5), 1: beat(5, Phase.DATA, is_pending=False), 2: beat(5)}
    missing, line = verdict(beats)
    assert missing == (1,)
    assert line == (
        "rank 1 of 3 is behind, in step 5, waiting for data; "
        f"the others are in step 5, forward and backward, in all_reduce[4] number 7 of {GROUP}"
    )


def test_a_rank_that_went_ahead_of_many_has_left_them():
    assert verdict({0: beat(5), 1: beat(6), 2: beat(5)})[0] == (1,)
    assert "has gone ahead" in verdict({0: beat(5), 1: beat(6), 2: beat(5)})[1]
    # Of two, it is told where both are.
    missing, line = verdict({0: beat(5, Phase.AGREE), 1: beat(6)})
    assert missing == (0,)
    assert "step 5, behind the update" in line
    assert "step 6, forward" in line


def test_at_the_same_place_the_count_of_collectives_tells():
    missing, line = verdict({0: beat(5), 1: beat(5, number=6, is_pending=False), 2: beat(5)})
    assert missing == (1,)
    assert "has not come to the collective" in line


def test_ranks_that_all_wait_at_the_same_place_are_not_blamed():
    missing, line = verdict({0: beat(5), 1: beat(5)})
    assert missing == ()
    assert line.startswith("all 2 ranks stand in step 5, forward and backward, in all_reduce[4]")


def test_silence_weighs_more_than_places():
    assert verdict({0: beat(4), 1: beat(5)}, silent=(1,))[0] == (1,)


def test_where_there_are_several_hosts_that_of_the_missing_rank_is_named():
    beats = {0: beat(5), 1: replace(beat(4), host="there"), 2: beat(5)}
    assert verdict(beats)[1].startswith("rank 1 of 3 on there is behind, in step 4")
    assert verdict(beats, silent=(1,))[1].startswith("rank 1 of 3 on there does not answer")


def test_a_beat_is_read_as_it_was_written():
    assert Beat.from_json(beat(3).to_json()) == beat(3)


@pytest.mark.parametrize("behaviour", ["hang-stopped", "hang-lock-held", "hang-lock-free"])
def test_the_stuck_rank_is_named_all_are_ended_and_their_stacks_are_kept(tmp_path, behaviour):
    launch = Launch(tmp_path, behaviour, num_ranks=3)
    outcome = launch.run()
    assert outcome.status == 76
    assert outcome.error.startswith("hang: no progress for more than 1.5 s: rank 2 of 3 ")
    assert "step 5, waiting for data; the others are in step 5, forward and backward" in outcome.error
    assert outcome.lost == (() if behaviour == "hang-lock-free" else (2,))
    assert outcome.step == 5
    stacks = [(launch.logs / f"rank-{number:04d}.log").read_text() for number in range(3)]
    assert all("in hang" in text for text in stacks[:2])
    if behaviour != "hang-stopped":
        assert "in get_stuck" in stacks[2]
    elif not _has_py_spy():
        assert "but for rank 2: pip install lmscale[debug]" in outcome.error


def test_py_spy_shows_the_stacks_of_a_rank_that_does_not_answer(tmp_path, monkeypatch):
    launch = Launch(tmp_path, "hang-stopped")
    spy = tmp_path / "py-spy"
    spy.write_text('#!/bin/sh\necho "spied on: $*"\n')
    spy.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(hang.sys, "executable", str(tmp_path / "python"))
    outcome = hang_outcome(launch)
    assert "lmscale[debug]" not in outcome.error
    assert "spied on: dump --nonblocking --pid" in (launch.logs / "rank-0001.log").read_text()


def hang_outcome(launch):
    # The launcher is started by the real interpreter.
    interpreter = Path(sys.prefix) / "bin" / "python"
    argv = [str(interpreter), str(HERE / "fake_launcher.py"), str(launch.num_ranks), *launch.script]
    from lmscale.launcher.status import RUN_ID
    from lmscale.launcher.supervise import supervise

    environ = {**os.environ, RUN_ID: launch.run_id}
    return supervise(argv, environ, launch.status_dir, launch.num_ranks, logs=launch.logs)


def test_without_a_supervisor_a_rank_ends_itself_with_76_one_line_and_its_stacks(tmp_path):
    done = run_alone(tmp_path, "hang-lock-free")
    assert done.returncode == 76
    assert done.stderr.startswith("error: train.hang_timeout_s = 1.5: no progress for ")
    assert "rank 0 is in step 5, waiting for data; its stacks are in" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "in get_stuck" in (tmp_path / "rank-0000.log").read_text()


def test_without_a_supervisor_a_rank_that_keeps_pythons_lock_ends_too(tmp_path):
    done = run_alone(tmp_path, "hang-lock-held")
    assert done.returncode == 1
    assert "in get_stuck" in (tmp_path / "rank-0000.log").read_text()


def run_alone(directory: Path, behaviour: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LMSCALE_")}
    argv = [sys.executable, str(HERE / "stand_in.py"), behaviour, str(directory)]
    return subprocess.run(argv, env=environ, capture_output=True, text=True, check=False, timeout=60)


def _has_py_spy() -> bool:
    import shutil

    return shutil.which("py-spy") is not None or Path(sys.executable).with_name("py-spy").exists()
