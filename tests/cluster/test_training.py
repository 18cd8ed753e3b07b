"""Runs over several hosts, by the real launchers: the losses of one process."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.hosts import ROOT, Hosts, records_in
from tests.distributed.runs import fresh, largest_difference, losses, pretrain_on_ranks, run_keys

TOLERANCE = 1.0e-5
"""Between layouts, in fp32: sums in another order."""
PACKAGES = {"openmpi": ("ompi_info", "openmpi-bin"), "mpich": ("mpiexec.hydra", "mpich")}
"""A program of each launcher that is not part of the Python environment, and Debian's package of it."""


@pytest.fixture(scope="module")
def expected(cluster, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the small run in one process of this machine."""
    corpus = Path(json.loads((cluster.directory / "hosts/host-1/host.json").read_text())["shared"][0]) / "tokens"
    keys = run_keys(str(corpus), tmp_path_factory.mktemp("expected") / "run")
    return losses(pretrain_on_ranks(1, fresh(keys)))


def losses_on(hosts: Hosts, output_dir: Path) -> list[float]:
    return losses(records_in(hosts.path("host-1", output_dir) / "metrics.jsonl"))


@pytest.mark.parametrize(
    ("slots", "layout"),
    [
        (["host-1 slots=1", "host-2 slots=1"], {}),
        (["host-1 slots=2", "host-2 slots=2"], {"parallel__tp_size": 2, "parallel__pp_size": 2}),
        (["host-1", "host-2", "host-3", "host-4"], {"parallel__pp_size": 2}),
    ],
    ids=["2-hosts-dp2", "2-hosts-tp2-pp2", "4-hosts-dp2-pp2"],
)
def test_hosts_that_share_nothing_have_the_losses_of_one_process(
    hosts: Hosts, expected: list[float], slots: list[str], layout: dict[str, int]
) -> None:
    _, config = hosts.write(hosts.own / "run", **layout)
    status, output = hosts.train(config, hosts.hostfile(*slots)).end()
    assert status == 0, output
    assert largest_difference(losses_on(hosts, hosts.own / "run"), expected) < TOLERANCE
    assert not hosts.left()
    for name in (line.split()[0] for line in slots):
        (checkpoint,) = hosts.path(name, hosts.own / "run" / "checkpoints").glob("step-*")
        assert list(checkpoint.glob("rank-*.safetensors")), name


TWO_HOSTS = ["host-1", "host-2"]
FOUR_HOSTS = [f"host-{number} slots=2" for number in range(1, 5)]


@pytest.mark.parametrize(
    ("launcher", "slots", "layout"),
    [
        ("openmpi", FOUR_HOSTS, {"parallel__tp_size": 2, "parallel__pp_size": 2}),
        ("mpich", TWO_HOSTS, {}),
        ("torchrun", TWO_HOSTS, {}),
    ],
    ids=["openmpi, 4-hosts-dp2-tp2-pp2", "mpich", "torchrun"],
)
def test_another_launcher_has_the_losses_of_one_process(
    hosts: Hosts, expected: list[float], launcher: str, slots: list[str], layout: dict[str, int]
) -> None:
    program, package = PACKAGES.get(launcher, ("ssh", "openssh-client"))
    if shutil.which(program) is None:
        pytest.skip(f"needs {program}, of Debian's {package}")
    _, config = hosts.write(hosts.own / "run", data__shared_filesystem=False, **layout)
    may_be_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    running = hosts.train(config, hosts.hostfile(*slots), "--launcher", launcher, **may_be_root)
    status, output = running.end()
    assert status == 0, output
    assert largest_difference(losses_on(hosts, hosts.own / "run"), expected) < TOLERANCE
    assert not hosts.left()


def test_torchrun_on_each_host_has_the_losses_of_one_process(hosts: Hosts, expected: list[float]) -> None:
    _, config = hosts.write(hosts.own / "run")
    where = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=host-1", "--master_port=29612"]
    started = [
        hosts.start(
            f"host-{number + 1}",
            "torchrun",
            *where,
            f"--node_rank={number}",
            "-m",
            "lmscale.pretrain",
            "--config",
            config,
        )
        for number in range(2)
    ]
    for running in started:
        status, output = running.end()
        assert status == 0, output
    assert largest_difference(losses_on(hosts, hosts.own / "run"), expected) < TOLERANCE
    assert not hosts.left()


def test_the_quick_starts_run_trains_on_two_hosts_by_the_script_for_several(hosts: Hosts) -> None:
    (hosts.shared / "ds_configs").symlink_to(ROOT / "ds_configs")
    text = hosts.shared / "text.jsonl"
    sources = sorted((ROOT / "lmscale").rglob("*.py"))
    text.write_text("".join(json.dumps({"text": path.read_text()}) + "\n" for path in sources))
    train = ["--input", str(text), "--vocab-size", "4096", "--model-type", "bpe", "--output", "quickstart/tokenizer"]
    commands = [["tokenizer", "train", *train]]
    for part in ("train", "valid"):
        to = ["--tokenizer", "quickstart/tokenizer", "--output", f"quickstart/{part}"]
        commands.append(["tokenize", "--input", str(text), *to])
    for command in commands:
        status, output = hosts.run("host-1", "lmscale", *command)
        assert status == 0, shlex.join(command) + output
    changes = ["train.stop_at_step=3", "batch.micro_batch_size=2", "batch.global_batch_size=4", "train.log_interval=1"]
    run = [str(ROOT / "launch/runs/quickstart.yaml"), *changes, f"output_dir={hosts.own / 'run'}"]
    argv = [str(ROOT / "launch/multi_node.sh"), hosts.hostfile("host-1", "host-2"), *run]
    status, output = hosts.run("host-1", *argv)
    assert status == 0, output
    found = records_in(hosts.path("host-1", hosts.own / "run") / "metrics.jsonl")
    assert [record["step"] for record in found] == [1, 2, 3]
    assert json.loads((hosts.path("host-1", hosts.own / "run") / "manifest.json").read_text())["layout"]["dp_size"] == 2
    assert not hosts.left()


def test_doctor_finds_two_hosts_ready_and_names_one_whose_link_is_cut(hosts: Hosts, cluster: Any) -> None:
    corpus = Path(json.loads((cluster.directory / "hosts/host-1/host.json").read_text())["shared"][0]) / "tokens"
    ask = ["lmscale", "doctor", "--hostfile", hosts.hostfile("host-1", "host-2"), "--data", str(corpus)]
    status, output = hosts.run("host-1", *ask)
    assert status == 0, output
    assert "all hosts: all-reduce: " in output
    cluster.cut("host-2")
    status, output = hosts.run("host-1", *ask)
    assert status == 1
    assert "host-2: ssh: " in output
    assert "host-1: ssh: " not in output
