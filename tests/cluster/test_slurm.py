"""launch/slurm.sbatch under a real Slurm: the signal before the time limit, the requeue, the resume; two nodes."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.cluster.hosts import Hosts, records_in
from tests.cluster.slurm import Slurm, SlurmOnHosts, SlurmRefusedError, eventually, missing_for_slurm
from tests.distributed.runs import fresh, largest_difference, losses, pretrain_on_ranks, run_keys, write_corpus

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1.0e-5
"""Between layouts, in fp32: sums in another order."""
STARTED_S, SIGNALLED_S, REQUEUED_S = 120.0, 300.0, 180.0


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    lacking = missing_for_slurm()
    if lacking is not None:
        pytest.skip(f"Slurm {lacking}")
    made = Slurm()
    try:
        made.up()
        yield made
    except SlurmRefusedError as error:
        pytest.skip(f"Slurm {error}")
    finally:
        made.down()


def environ() -> dict[str, str]:
    """Return what a user has who has activated the environment."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    secret = {"WANDB_API_KEY": "hush", "DS_ACCELERATOR": "cpu"}
    return {"PATH": path, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", **secret}


def write_run(directory: Path, **changes: object) -> Path:
    import yaml

    write_corpus(directory / "tokens", np.random.default_rng(7), num_tokens=20_000)
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(run_keys(str(directory / "tokens"), directory / "run", **changes)))
    return path


def submit(slurm: Slurm, directory: Path, *options: str, **changes: str) -> tuple[str, Path]:
    """Submit the script with a small run of two tasks."""
    log = directory / "job.log"
    here = ["--parsable", f"--chdir={directory}", f"--output={log}", "--ntasks-per-node=2", "--gpus-per-node=0"]
    done = slurm.run("sbatch", *here, *options, environ=environ() | changes)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), log


def steps(directory: Path) -> list[int]:
    path = directory / "run" / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def end_of(log: Path) -> str:
    """Return the last lines of a job's log, for a message."""
    return log.read_text()[-3000:] if log.exists() else f"no {log}"


@pytest.mark.timeout(STARTED_S + SIGNALLED_S + 3 * REQUEUED_S + 120.0)
def test_a_job_is_saved_before_its_limit_and_goes_on_from_there(slurm: Slurm, tmp_path: Path) -> None:
    run = write_run(tmp_path, train__train_tokens=10**9, train__log_interval=10)
    script = str(ROOT / "launch" / "slurm.sbatch")
    job, log = submit(slurm, tmp_path, "--time=01:00:00", "--signal=TERM@120", script, str(run))
    assert eventually(lambda: len(steps(tmp_path)) > 1, STARTED_S), end_of(log)
    # Before its ranks are up TERM would kill them, so the limit is set now: 2 to 3 minutes from here.
    minutes = int(slurm.run("squeue", "-h", "-j", job, "-o", "%M").stdout.partition(":")[0])
    slurm.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + 3}")
    latest = tmp_path / "run" / "checkpoints" / "latest"
    assert eventually(latest.exists, SIGNALLED_S), end_of(log)
    saved = int(re.search(r"\d+$", latest.read_text().strip())[0])
    assert eventually(lambda: slurm.state(job) == "PENDING", REQUEUED_S), end_of(log)
    slurm.run(
        "scontrol", "update", f"JobId={job}", "TimeLimit=60", "StartTime=now"
    )  # Slurm lets a requeued job wait two minutes
    assert eventually(lambda: len(steps(tmp_path)) > 1 and steps(tmp_path)[-1] > saved, REQUEUED_S), end_of(log)
    assert slurm.state(job) == "RUNNING"
    text = log.read_text()
    assert f"step-{saved:08d}: step {saved}" in text  # "resumed from ...: step N"
    logged = [step for step in steps(tmp_path) if step != saved]  # the last step before a save is logged too
    assert logged == list(range(10, logged[-1] + 1, 10))
    assert "hush" not in text
    slurm.run("scancel", job)
    assert eventually(lambda: slurm.state(job) in {"", "CANCELLED"}, REQUEUED_S)


def test_wrong_input_ends_the_job_and_is_not_requeued(slurm: Slurm, tmp_path: Path) -> None:
    run = write_run(tmp_path)
    script = str(ROOT / "launch" / "slurm.sbatch")
    job, log = submit(slurm, tmp_path, "--time=00:02:00", script, str(run), "parallel.tp_size=4")
    assert eventually(lambda: slurm.state(job) in {"", "FAILED"}, STARTED_S)
    assert "error: ranks = 2: must be a multiple of parallel.tp_size x parallel.pp_size" in log.read_text()
    shown = slurm.run("scontrol", "show", "job", job).stdout
    assert "ExitCode=2:0" in shown
    assert "Restarts=0" in shown


def test_a_dry_run_names_the_hosts_of_the_allocation(slurm: Slurm, tmp_path: Path) -> None:
    run = write_run(tmp_path)
    script = str(ROOT / "launch" / "slurm.sbatch")
    job, log = submit(slurm, tmp_path, "--time=00:02:00", script, str(run), "--dry-run")
    assert eventually(lambda: slurm.state(job) in {"", "COMPLETED"}, STARTED_S)
    host = slurm.run("sinfo", "-h", "-o", "%n").stdout.strip()
    assert f"# on {host}, 2 ranks, with" in log.read_text()
    assert "hush" not in log.read_text()


def test_two_nodes_have_the_losses_of_one_process(hosts: Hosts, tmp_path: Path) -> None:
    lacking = missing_for_slurm()
    if lacking is not None:
        pytest.skip(f"Slurm {lacking}")
    run = write_run(hosts.shared)
    keys = run_keys(str(hosts.shared / "tokens"), tmp_path / "here")
    (hosts.shared / "slurm").mkdir()
    slurm = SlurmOnHosts(hosts.cluster, ["host-1", "host-2"], hosts.shared / "slurm")
    script, nodes = str(ROOT / "launch" / "slurm.sbatch"), ["--nodes=2", "--ntasks-per-node=1", "--time=00:05:00"]
    try:
        slurm.up()
        job, log = submit(slurm, hosts.shared, *nodes, script, str(run), GLOO_SOCKET_IFNAME="eth0")
        eventually(lambda: slurm.state(job) not in {"PENDING", "RUNNING", "COMPLETING"}, STARTED_S)
        assert slurm.state(job) in {"", "COMPLETED"}, end_of(log)
    except SlurmRefusedError as error:
        pytest.skip(f"Slurm {error}")
    finally:
        slurm.down()
    expected = losses(pretrain_on_ranks(1, fresh(keys)))
    assert largest_difference(losses(records_in(hosts.shared / "run" / "metrics.jsonl")), expected) < TOLERANCE
    manifest = json.loads((hosts.shared / "run" / "manifest.json").read_text())
    assert manifest["layout"]["dp_size"] == 2
    assert not hosts.left()
