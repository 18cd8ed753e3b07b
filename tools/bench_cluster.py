"""Two hosts of tools/cluster.py, a rank each, against two ranks on one of them: what the network costs."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench_sheet import Sheet
from bench_train import BATCH, SEQ_LENGTH, SMALL, write_tokens
from cluster_network import Cluster

from lmscale.monitor.metrics import PERF_STEP_TIME_S

GOAL_OF_HOSTS = 0.8
ROUNDS, WARM_UP, STEPS = 3, 5, 25
ZERO_STAGE = 1
_BIN = Path(sys.executable).parent


def two_hosts() -> Iterator[Sheet]:
    """Train the small model by `lmscale train` on one host and on two, in turn, and compare the steps' times."""
    with tempfile.TemporaryDirectory(prefix="lmscale-bench-") as name:
        directory = Path(name)
        (directory / "shared").mkdir()
        write_tokens(directory / "shared" / "tokens")
        cluster = Cluster.up(2, [directory / "shared"], directory=directory / "cluster")
        try:
            times = _race(cluster, directory / "shared")
        finally:
            cluster.down()
    one = statistics.median(next(iter(times.values())))
    sheet = Sheet(
        f"Two hosts over a virtual network, a rank of one thread each, ZeRO {ZERO_STAGE}, fp32",
        ["", "ms a step", "tokens/s", "throughput of one host's", "goal"],
        note=f"Started by `lmscale train`, `--devices 2` and `--hostfile` over pdsh; {BATCH} x {SEQ_LENGTH} tokens; "
        f"{ROUNDS} starts of each in turn, the median of their last {STEPS - WARM_UP} steps. gloo over veth and a bridge; "
        "both hosts are namespaces of this machine.",
    )
    for shown, taken in times.items():
        step = statistics.median(taken)
        goal = f">= {GOAL_OF_HOSTS}" if step != one else ""
        sheet.row(shown, f"{1e3 * step:,.0f}", f"{BATCH * SEQ_LENGTH / step:,.0f}", f"{one / step:.2f}", goal)
    yield sheet


def _race(cluster: Cluster, shared: Path) -> dict[str, list[float]]:
    hostfile = shared / "hostfile"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in cluster.hosts))
    placements = {
        "two ranks on one host": ["--devices", "2"],
        "two hosts, a rank each": ["--hostfile", str(hostfile)],
    }
    times: dict[str, list[float]] = {shown: [] for shown in placements}
    for number in range(ROUNDS):
        for kind, (shown, options) in enumerate(placements.items()):
            times[shown] += _train(cluster, shared / f"run-{kind}-{number}", shared, options)
    return times


def _train(cluster: Cluster, output_dir: Path, shared: Path, options: list[str]) -> list[float]:
    keys = {
        "model": SMALL.model_dump(mode="json"),
        "data": {"train": [{"prefix": str(shared / "tokens")}], "seq_length": SEQ_LENGTH, "num_workers": 0},
        "batch": {"micro_batch_size": BATCH // 2, "global_batch_size": BATCH},
        "optim": {"lr": 1.0e-4},
        "train": {"train_tokens": 10**9, "stop_at_step": STEPS, "log_interval": 1},
        "checkpoint": {"save_interval": 0},
        "monitor": {"tensorboard": False},
        "deepspeed": {"zero_optimization": {"stage": ZERO_STAGE}},
        "output_dir": str(output_dir),
    }
    config = shared / "run.yaml"
    config.write_text(json.dumps(keys))  # YAML reads JSON
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{_BIN}{os.pathsep}{os.environ['PATH']}"}
    command = cluster.command("host-1", [str(_BIN / "lmscale"), "train", str(config), *options], shared)
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    records = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [record[PERF_STEP_TIME_S] for record in records[WARM_UP:]]
