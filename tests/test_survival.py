"""Real ranks under `lmscale train` that die, get stuck or are asked to stop: the run ends as promised, or goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lmscale.launcher.environment import free_port
from tests.distributed.runs import Keys, largest_difference, losses, pretrain_on_ranks, records, run_keys
from tests.test_train_command import BIN, ENVIRONMENT, processes_of, wait_for_a_record, write_config

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

INJECTED = Path(__file__).parent / "launcher" / "injected"
HANG_TIMEOUT_S = 6
TOLERANCE = 1.0e-5
"""Between layouts, in fp32: sums in another order."""
SECONDS_TO_END = 20.0
"""From the death of a rank to the end of all, on a busy machine; some 5 on an idle one."""


@dataclass
class Faulty:
    """A run of two ranks, one of which comes to grief in a step."""

    corpus: str
    directory: Path
    kind: str
    rank: int = 1
    step: int = 5
    changes: Keys = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.output_dir, self.marker = self.directory / "run", self.directory / "marker"
        zero1 = {"zero_optimization": {"stage": 1}}
        changes = {"checkpoint__save_interval": 3, "deepspeed": zero1, **self.changes}
        self.keys = run_keys(self.corpus, self.output_dir, **changes)
        self.config = write_config(self.keys, self.directory / "run.yaml")
        path = os.pathsep.join([str(INJECTED), os.environ.get("PYTHONPATH", "")])
        fault = f"{self.kind} {self.rank} {self.step} {self.marker}"
        self.environment = {**ENVIRONMENT, "PYTHONPATH": path, "INJECTED_FAULT": fault}

    def train(self, *options: str) -> subprocess.CompletedProcess[str]:
        limits = [f"train.hang_timeout_s={HANG_TIMEOUT_S}", "train.first_step_timeout_s=300"]
        command = [str(BIN / "lmscale"), "train", self.config, "--devices", "2", *options, *limits]
        return self._run(command)

    def bare(self) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port())]
        command += ["--module", "lmscale.pretrain", "--config", self.config, f"train.hang_timeout_s={HANG_TIMEOUT_S}"]
        return self._run(command)

    def _run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=600)
        self.seconds = time.time() - float(self.marker.read_text()) if self.marker.exists() else float("nan")
        sys.stdout.write(f"{self.kind}: {self.seconds:.1f} s from the fault to the end\n")
        assert not processes_of(self.output_dir)
        return done

    def log(self, rank: int) -> str:
        return (self.output_dir / "logs" / f"rank-{rank:04d}.log").read_text()


def test_a_rank_that_does_not_answer_is_named_and_the_run_goes_on_without_it_as_if_it_had_never_been(
    corpus: str, tmp_path: Path
) -> None:
    run = Faulty(corpus, tmp_path, "stop")
    done = run.train("--max-restarts", "1", "--elastic")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("restart ")]
    assert line.startswith("restart 1 of 1 in 1 s, on 1 ranks, from step-00000003, after status 76: hang: no progress ")
    assert "rank 1 of 2 does not answer, and told last of " in line
    assert "the others are in step 5" in line
    assert "in train_step" in run.log(0)
    manifest = json.loads((run.output_dir / "manifest.json").read_text())
    assert manifest["layout"]["dp_size"] == 1
    (restart,) = manifest["restarts"]
    assert (restart["status"], restart["resumed_step"]) == (76, 3)
    whole = pretrain_on_ranks(2, run_keys(corpus, tmp_path / "whole", deepspeed={"zero_optimization": {"stage": 1}}))
    went_on = records(run.keys)
    assert [record["step"] for record in went_on] == list(range(1, 7))
    assert largest_difference(losses(went_on), losses(whole)) < TOLERANCE


def test_a_killed_rank_ends_the_others_within_seconds_and_is_named(corpus: str, tmp_path: Path) -> None:
    run = Faulty(corpus, tmp_path, "kill")
    done = run.train()
    assert done.returncode == 1
    assert "error: died without a word, killed or crashed: rank 1 of 2\n" in done.stderr
    assert run.seconds < SECONDS_TO_END


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--max-restarts", "1"), ("--max-restarts", "1", "--elastic")])
def test_a_run_that_lost_a_rank_goes_on_from_its_newest_checkpoint(corpus, tmp_path, options) -> None:
    run = Faulty(corpus, tmp_path, "kill", rank=0)
    done = run.train(*options)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((run.output_dir / "manifest.json").read_text())
    assert manifest["layout"]["dp_size"] == (1 if "--elastic" in options else 2)
    assert [restart["resumed_step"] for restart in manifest["restarts"]] == [3]
    whole = pretrain_on_ranks(2, run_keys(corpus, tmp_path / "whole", deepspeed={"zero_optimization": {"stage": 1}}))
    assert largest_difference(losses(records(run.keys)), losses(whole)) < TOLERANCE


@pytest.mark.slow
def test_a_rank_that_keeps_pythons_lock_is_named_with_its_stacks(corpus: str, tmp_path: Path) -> None:
    run = Faulty(corpus, tmp_path, "lock")
    done = run.train()
    assert done.returncode == 76
    assert "rank 1 of 2 does not answer" in done.stderr
    assert "in act" in run.log(1)


@pytest.mark.slow
def test_a_rank_that_leaves_out_a_collective_ends_in_the_watchdog(corpus: str, tmp_path: Path) -> None:
    run = Faulty(corpus, tmp_path, "skip", step=5, changes={"train__log_interval": 1000, "parallel__pp_size": 2})
    done = run.train()
    assert done.returncode == 76, done.stderr
    assert "error: hang: no progress for more than 6 s: rank " in done.stderr


@pytest.mark.slow
def test_under_the_bare_launcher_the_watchdogs_end_the_run_with_76(corpus: str, tmp_path: Path) -> None:
    run = Faulty(corpus, tmp_path, "stop")
    done = run.bare()
    assert done.returncode == 76
    assert "error: train.hang_timeout_s = 6.0: no progress for" in done.stderr
    assert "rank 0 is in step 5" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("request_", ["INT", "HUP", "USR1", "STOP", "max_minutes"])
def test_what_is_asked_of_a_run_is_done_by_all_ranks(corpus: str, tmp_path: Path, request_: str) -> None:
    keys = run_keys(corpus, tmp_path / "run", train__train_tokens=200_000 * 8 * 32)
    checkpoints = tmp_path / "run" / "checkpoints"
    if request_ == "max_minutes":
        keys["train"]["max_minutes"] = 0.001
    config = write_config(keys, tmp_path / "run.yaml")
    command = [str(BIN / "lmscale"), "train", config, "--devices", "2", "--max-restarts", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)
    if request_ != "max_minutes":
        wait_for_a_record(keys, process)
    if request_ == "STOP":
        (tmp_path / "run" / "STOP").touch()
    elif request_ == "USR1":
        process.send_signal(signal.SIGUSR1)
        while not (checkpoints / "latest").exists():
            assert process.poll() is None
            time.sleep(0.1)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
    elif request_ != "max_minutes":
        process.send_signal(getattr(signal, f"SIG{request_}"))
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 75, output
    assert "restart " not in output
    assert (checkpoints / f"step-{records(keys)[-1]['step']:08d}").is_dir()
    assert not (tmp_path / "run" / "STOP").exists()
    assert not processes_of(tmp_path / "run")
