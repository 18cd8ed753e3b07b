"""Hosts and links that fail under a real run: it ends or goes on as promised, and leaves no process on any host."""

from __future__ import annotations

import importlib.metadata
import json
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.hosts import ROOT, Hosts, Running, records_in, until
from tests.distributed.runs import Keys, fresh, largest_difference, losses, pretrain_on_ranks, run_keys

TOLERANCE = 1.0e-5
"""Between layouts, in fp32: sums in another order."""
SECONDS_TO_END = 30.0
"""Promised, from the loss of a host to the end on all others."""
CUT_S = 5.0
LONG = {"train__train_tokens": 200_000 * 8 * 32}
COMPARED_STEPS = 6


def wait_for_steps(running: Running, metrics: Path, step: int) -> None:
    until(lambda: running.process.poll() is not None or any(one["step"] >= step for one in records_in(metrics)))
    assert running.process.poll() is None, running.output


def check_beginning(found: list[Keys], hosts: Hosts, tmp_path: Path) -> None:
    """Compare the first steps to one process's, and see that no step is missing or there twice."""
    keys = run_keys(hosts.corpus, tmp_path / "here", train__stop_at_step=COMPARED_STEPS, **LONG)
    reference = losses(pretrain_on_ranks(1, fresh(keys)))
    assert largest_difference(losses(found)[:COMPARED_STEPS], reference) < TOLERANCE
    assert [record["step"] for record in found] == list(range(1, len(found) + 1))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("host-9", "Could not resolve hostname host-9"),
        ("host-4", "timed out|No route to host"),
        ("host-3", "Permission denied"),
    ],
    ids=["unknown", "cut off", "without sshd's key"],
)
def test_a_host_that_cannot_be_reached_is_refused_by_name(hosts: Hosts, name: str, reason: str) -> None:
    _, config = hosts.write(hosts.own / "run")
    hosts.cluster.cut("host-4")
    started = time.monotonic()
    with hosts.hiding("host-3", "/run/cluster/key.pub"):
        status, output = hosts.train(config, hosts.hostfile("host-1", name)).end()
    sys.stdout.write(f"{name} refused after {time.monotonic() - started:.1f} s\n")
    assert status == 2, output
    (line,) = output.splitlines()
    assert line.startswith(f"error: --hostfile = '{name}': cannot be reached by ssh: "), line
    assert re.search(reason, line), line
    assert not hosts.left()


def test_a_host_with_another_version_is_refused_by_name(hosts: Hosts) -> None:
    _, config = hosts.write(hosts.own / "run")
    metadata = Path(str(importlib.metadata.distribution("deepspeed").locate_file(""))) / "METADATA"
    (metadata,) = metadata.parent.glob("deepspeed-*.dist-info/METADATA")
    text, ours = metadata.read_text(), importlib.metadata.version("deepspeed")
    (hosts.shared / "METADATA").write_text(text.replace(f"Version: {ours}", "Version: 0.1.2", 1))
    with hosts.hiding("host-2", str(metadata), str(hosts.shared / "METADATA")):
        status, output = hosts.train(config, hosts.hostfile("host-1", "host-2")).end()
    assert status == 2, output
    (line,) = output.splitlines()
    has = f"has deepspeed=0.1.2 and this host deepspeed={ours}"
    assert line == f"error: --hostfile = 'host-2': {has}; install the same versions on every host"
    assert not hosts.left()


def test_without_a_shared_directory_a_run_resumes_rides_out_a_cut_link_and_is_stopped_by_ctrl_c(
    hosts: Hosts, tmp_path: Path
) -> None:
    _, config = hosts.write(hosts.own / "run", **LONG)
    hostfile, output_dir = hosts.hostfile("host-1", "host-2"), hosts.own / "run"
    metrics = hosts.path("host-1", output_dir) / "metrics.jsonl"
    status, output = hosts.train(config, hostfile, "train.stop_at_step=3").end()
    assert status == 0, output
    for number in range(2):
        (step,) = hosts.path(f"host-{number + 1}", output_dir / "checkpoints").glob("step-*")
        assert [path.name for path in step.glob("rank-*.safetensors")] == [f"rank-{number:05d}.safetensors"]
    running = hosts.train(config, hostfile)
    wait_for_steps(running, metrics, COMPARED_STEPS)
    hosts.cluster.cut("host-2")
    time.sleep(CUT_S)
    before = records_in(metrics)[-1]["step"]
    hosts.cluster.mend("host-2")
    wait_for_steps(running, metrics, before + 3)
    running.send(signal.SIGINT)
    status, output = running.end()
    assert status == 75, output
    assert "Traceback" not in output
    assert not hosts.left()
    found = records_in(metrics)
    check_beginning(found, hosts, tmp_path)
    for number in range(2):
        checkpoints = hosts.path(f"host-{number + 1}", output_dir / "checkpoints")
        assert (checkpoints / f"step-{found[-1]['step']:08d}" / f"rank-{number:05d}.safetensors").is_file()


def test_a_link_cut_for_good_ends_the_run_on_both_sides_with_76_naming_the_host(hosts: Hosts) -> None:
    _, config = hosts.write(hosts.own / "run", **LONG)
    running = hosts.train(config, hosts.hostfile("host-1", "host-2"))
    wait_for_steps(running, hosts.path("host-1", hosts.own / "run") / "metrics.jsonl", 2)
    hosts.cluster.cut("host-2")
    cut_at = time.monotonic()
    status, output = running.end()
    seconds = time.monotonic() - cut_at
    sys.stdout.write(f"cut for good: {seconds:.1f} s to the end\n")
    assert status == 76, output
    last = output.splitlines()[-1]
    assert last.startswith(
        "error: hang: host-2 has not answered for 12 s, the host or its link is down: rank 1 of 2"
    ), last
    until(lambda: not hosts.processes("host-2"), SECONDS_TO_END)
    assert not hosts.left()
    assert seconds < SECONDS_TO_END


def test_a_run_whose_host_dies_goes_on_on_those_that_are_left(hosts: Hosts, tmp_path: Path) -> None:
    keys, config = hosts.write(hosts.shared / "run", checkpoint__save_interval=3, **LONG)
    metrics = Path(keys["output_dir"]) / "metrics.jsonl"
    hostfile = hosts.hostfile("host-1", "host-2", "host-3 slots=2")
    running = hosts.train(config, hostfile, "--max-restarts", "1", "--elastic")
    wait_for_steps(running, metrics, 5)
    hosts.cluster.kill("host-3")
    killed_at = time.monotonic()
    running.wait_for("restart 1 of 1", SECONDS_TO_END)
    sys.stdout.write(f"a host without power: {time.monotonic() - killed_at:.1f} s to the restart\n")
    (line,) = [line for line in running.output.splitlines() if line.startswith("restart ")]
    assert "on 2 ranks, from step-" in line
    assert "host-3 has not answered for 12 s, the host or its link is down: rank 2, 3 of 4" in line
    at_restart = records_in(metrics)[-1]["step"]
    wait_for_steps(running, metrics, at_restart + 2)
    running.send(signal.SIGTERM)
    status, output = running.end()
    assert status == 75, output
    manifest = json.loads((metrics.parent / "manifest.json").read_text())
    assert manifest["layout"]["dp_size"] == 2
    assert manifest["restarts"][0]["status"] == 76
    check_beginning(records_in(metrics), hosts, tmp_path)
    assert not hosts.left()


def test_the_loss_of_the_first_host_ends_the_ranks_of_the_others(hosts: Hosts) -> None:
    keys, config = hosts.write(hosts.shared / "run", **LONG)
    running = hosts.train(config, hosts.hostfile("host-1", "host-2"))
    wait_for_steps(running, Path(keys["output_dir"]) / "metrics.jsonl", 2)
    hosts.cluster.kill("host-1")
    killed_at = time.monotonic()
    until(lambda: not hosts.processes("host-2"), 2 * SECONDS_TO_END)
    seconds = time.monotonic() - killed_at
    sys.stdout.write(f"the first host without power: {seconds:.1f} s to the end on the other\n")
    assert seconds < SECONDS_TO_END


def test_ctrl_c_saves_and_leaves_no_process_with_torchrun_too(hosts: Hosts) -> None:
    _, config = hosts.write(hosts.own / "run", **LONG)
    running = hosts.train(config, hosts.hostfile("host-1", "host-2"), "--launcher", "torchrun")
    metrics = hosts.path("host-1", hosts.own / "run") / "metrics.jsonl"
    wait_for_steps(running, metrics, 3)
    running.send(signal.SIGINT)
    status, output = running.end()
    assert status == 75, output
    assert "Traceback" not in output
    assert not hosts.left()
    step = records_in(metrics)[-1]["step"]
    for number in range(2):
        saved = hosts.path(f"host-{number + 1}", hosts.own / "run" / "checkpoints") / f"step-{step:08d}"
        assert (saved / f"rank-{number:05d}.safetensors").is_file()


@pytest.mark.slow  # torchrun waits half a minute for a host that is not there
def test_an_elastic_torchrun_goes_on_with_the_hosts_that_are_there(hosts: Hosts, tmp_path: Path) -> None:
    """A host loses power, comes back, and joins again."""
    keys, config = hosts.write(hosts.shared / "run", checkpoint__save_interval=3, **LONG)
    output_dir = Path(keys["output_dir"])
    metrics = output_dir / "metrics.jsonl"
    join = [str(ROOT / "launch" / "torchrun_elastic.sh"), "1:2", "host-1", config]
    first, second = hosts.start("host-1", *join), hosts.start("host-2", *join)
    for size in (2, 1, 2):
        reached = (records_in(metrics) or [{"step": 0}])[-1]["step"]
        if size == 1:
            hosts.cluster.kill("host-2")
            hosts.cluster.boot("host-2")  # and answers that it knows of no connection
        elif reached:
            second = hosts.start("host-2", *join)
        until(lambda size=size: first.process.poll() is not None or dp_size(output_dir) == size)
        wait_for_steps(first, metrics, reached + 5)
    for running in (first, second):
        running.send(signal.SIGTERM)
    for running in (first, second):
        running.end()
    check_beginning(records_in(metrics), hosts, tmp_path)
    assert not hosts.left()


def dp_size(output_dir: Path) -> int | None:
    """Return the layout of a run that may not have begun, or be in the middle of saying so."""
    try:
        size: int = json.loads((output_dir / "manifest.json").read_text())["layout"]["dp_size"]
    except (OSError, ValueError):
        return None
    return size
