"""Restarts: after what, how often, on what, and what is told of them."""

import json
import os
import signal
import time

import pytest

from lmscale.errors import ConfigError
from lmscale.launcher import restarts
from lmscale.launcher.compose import Nodes, Placement
from lmscale.launcher.restarts import RestartPolicy, check_policy, keep_running
from lmscale.launcher.supervise import Outcome
from lmscale.launcher.validate import LaunchPlan, validate_run
from lmscale.monitor.manifest import write_manifest
from tests.launcher.runs import make_run


class Starts:
    """Stands for the launches of a run: outcomes in turn, and the step of a checkpoint that each leaves, or None."""

    def __init__(self, tmp_path, monkeypatch, *outcomes, saves=(), overrides=()):
        self.outcomes, self.saves, self.seen = list(outcomes), list(saves), []
        self.plan = validate_run(make_run(tmp_path, *overrides), 4)
        self.checkpoints = tmp_path / "run" / "checkpoints"
        # What these checkpoints lack is not the subject.
        monkeypatch.setattr(restarts, "validate_run", lambda config, num: LaunchPlan(config, self.plan.zero, num, num))

    def __call__(self, plan, placement) -> Outcome:
        self.seen.append((placement.num_ranks, plan.config.checkpoint.resume))
        step = self.saves.pop(0) if self.saves else None
        if step is not None:
            (self.checkpoints / f"step-{step:08d}").mkdir(parents=True)
        return self.outcomes.pop(0)

    def run(self, max_restarts=0, **options) -> Outcome:
        policy = RestartPolicy(max_restarts, first_delay_s=0.0, **options)
        return keep_running(self.plan, Placement(num_ranks=4), policy, self)


CRASH, HANG, DONE = Outcome(1, "rank 1 failed"), Outcome(76, "hang: rank 1"), Outcome(0)


def test_a_crash_and_a_hang_are_started_again(tmp_path, monkeypatch, capsys):
    starts = Starts(tmp_path, monkeypatch, CRASH, HANG, DONE)
    assert starts.run(max_restarts=2) == DONE
    assert capsys.readouterr().err.splitlines() == [
        "restart 1 of 2 in 0 s, on 4 ranks, from the beginning, after status 1: rank 1 failed",
        "restart 2 of 2 in 0 s, on 4 ranks, from the beginning, after status 76: hang: rank 1",
    ]


def test_without_restarts_a_failure_is_the_end(tmp_path, monkeypatch, capsys):
    assert Starts(tmp_path, monkeypatch, CRASH).run() == CRASH
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("status", [0, 2, 75, 77])
def test_what_another_start_cannot_mend_is_not_started_again(tmp_path, monkeypatch, status):
    starts = Starts(tmp_path, monkeypatch, Outcome(status, "so"))
    assert starts.run(max_restarts=3) == Outcome(status, "so")


def test_a_failure_after_the_user_asked_for_the_end_is_the_end(tmp_path, monkeypatch):
    starts = Starts(tmp_path, monkeypatch, Outcome(1, "rank 1 failed", is_final=True))
    assert starts.run(max_restarts=3).status == 1


def test_restarts_in_a_row_are_counted(tmp_path, monkeypatch):
    starts = Starts(tmp_path, monkeypatch, CRASH, CRASH, CRASH)
    outcome = starts.run(max_restarts=2)
    assert outcome == Outcome(1, "rank 1 failed; after 2 restarts without a new checkpoint")
    assert len(starts.seen) == 3


def test_the_count_begins_anew_with_a_new_checkpoint(tmp_path, monkeypatch, capsys):
    starts = Starts(tmp_path, monkeypatch, CRASH, CRASH, CRASH, DONE, saves=[10, None, 20])
    assert starts.run(max_restarts=2) == DONE
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" in ")[0] for line in lines] == ["restart 1 of 2", "restart 2 of 2", "restart 1 of 2"]
    assert "from step-00000020" in lines[2]


def test_a_restart_resumes_from_the_runs_own_checkpoint_once_there_is_one(tmp_path, monkeypatch):
    keys = ("checkpoint.resume=never",)
    starts = Starts(tmp_path, monkeypatch, CRASH, CRASH, DONE, saves=[None, 10], overrides=keys)
    starts.run(max_restarts=2)
    assert [resume for _, resume in starts.seen] == ["never", "never", "auto"]


def test_an_elastic_restart_leaves_lost_ranks_out(tmp_path, monkeypatch, capsys):
    starts = Starts(tmp_path, monkeypatch, Outcome(1, "died", lost=(2,)), CRASH, DONE)
    assert starts.run(max_restarts=2, elastic=True) == DONE
    assert [num_ranks for num_ranks, _ in starts.seen] == [4, 2, 2]  # 3 does not divide the batch
    assert "on 2 ranks" in capsys.readouterr().err


def test_without_elastic_a_lost_rank_is_started_again(tmp_path, monkeypatch):
    starts = Starts(tmp_path, monkeypatch, Outcome(1, "died", lost=(2,)), DONE)
    starts.run(max_restarts=1)
    assert [num_ranks for num_ranks, _ in starts.seen] == [4, 4]


def test_too_little_is_left(tmp_path, monkeypatch):
    starts = Starts(tmp_path, monkeypatch, Outcome(1, "died", lost=(2,)))
    outcome = starts.run(max_restarts=2, elastic=True, min_devices=4)
    assert outcome.error == "died; what is left is too little for the layout and --min-devices"


def test_the_manifest_counts_restarts_and_says_where_they_went_on(tmp_path, monkeypatch):
    path = tmp_path / "run" / "manifest.json"
    starts = Starts(tmp_path, monkeypatch, CRASH, HANG, DONE)
    launch = starts.__call__

    def writing(plan, placement):
        write_manifest(path, plan.config, {}, [], {"resume_step": 10 * len(starts.seen)})
        return launch(plan, placement)

    policy = RestartPolicy(2, first_delay_s=0.0)
    assert keep_running(starts.plan, Placement(num_ranks=4), policy, writing) == DONE
    manifest = json.loads(path.read_text())
    told = [(entry["status"], entry["reason"], entry["resumed_step"]) for entry in manifest["restarts"]]
    assert told == [(1, "rank 1 failed", 10), (76, "hang: rank 1", 20)]
    assert all(entry["time"] for entry in manifest["restarts"])
    assert len(manifest["earlier_starts"]) == 2
    assert all("restarts" not in start for start in manifest["earlier_starts"])


def test_the_alert_command_hears_of_hang_restart_and_failure(tmp_path, monkeypatch):
    heard = tmp_path / "heard"
    overrides = [f'monitor.alert_command=echo "$LMSCALE_EVENT $LMSCALE_STEP" >> {heard}']
    starts = Starts(
        tmp_path, monkeypatch, Outcome(76, "hang", step=7), Outcome(1, "broken", step=9), overrides=overrides
    )
    starts.run(max_restarts=1)
    end = time.monotonic() + 30
    while not heard.exists() or len(heard.read_text().splitlines()) < 3:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert sorted(heard.read_text().splitlines()) == ["failure 9", "hang 7", "restart 7"]


def test_a_term_between_two_starts_ends_the_run(tmp_path, monkeypatch):
    starts = Starts(tmp_path, monkeypatch, CRASH)
    policy = RestartPolicy(3, first_delay_s=30.0)
    # Sent while it waits: a timer might be too early on a busy machine.
    monkeypatch.setattr(restarts.time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    outcome = keep_running(starts.plan, Placement(num_ranks=4), policy, starts)
    assert outcome == Outcome(75, "stopped before it was started again")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ((-1, False, None), "--max-restarts"),
        ((0, True, None), "--elastic"),
        ((1, False, 2), "--min-devices"),
        ((1, True, 0), "--min-devices"),
        ((1, True, 5), "--min-devices"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, field):
    with pytest.raises(ConfigError) as caught:
        check_policy(*options, Placement(num_ranks=4))
    assert caught.value.field == field


def test_slurm_cannot_leave_out_a_node():
    with pytest.raises(ConfigError, match="Slurm requeues"):
        check_policy(1, True, None, Placement("slurm", num_ranks=4))


def test_a_fixed_number_of_hosts_that_start_by_themselves_is_not_restarted_by_torchrun():
    with pytest.raises(ConfigError, match=r"--max-restarts = 2: is not for a fixed --nnodes; drop it"):
        check_policy(2, False, None, Placement("torchrun", num_ranks=4, nodes=Nodes(2, 2, 0)))
    check_policy(2, False, None, Placement("torchrun", num_ranks=4, nodes=Nodes(1, 2)))
