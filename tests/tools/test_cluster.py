"""The cluster of namespaces by its command: hosts that are separate, links that fail, nothing left at the end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import cluster_network
from cluster_network import PACKAGES, Cluster, ClusterError, missing_for_a_cluster, missing_for_faults

LACKING = missing_for_a_cluster()
needs_cluster = pytest.mark.skipif(LACKING is not None, reason=f"a cluster {LACKING}")
LACKING_FAULTS = LACKING or missing_for_faults()


def cluster(directory: Path, command: str, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(ROOT / "tools" / "cluster.py"), command, "--directory", str(directory), *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120)


def test_what_is_missing_is_named_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setitem(PACKAGES, "no-such-program", "some-package")
    assert missing_for_a_cluster().startswith("needs ")
    with pytest.raises(ClusterError, match=r"on Debian: apt-get install \w+"):
        Cluster.up(2, directory=tmp_path / "cluster")
    assert not (tmp_path / "cluster").exists()


def test_a_cluster_that_is_not_up_is_told_with_status_2(tmp_path):
    done = cluster(tmp_path / "none", "down")
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'none'} holds no cluster; start one with: tools/cluster.py up\n"


@pytest.mark.cluster
@needs_cluster
def test_hosts_are_separate_fail_alone_and_leave_nothing(tmp_path):
    directory, shared = tmp_path / "cluster", tmp_path / "shared"
    shared.mkdir()
    mounts = Path("/proc/mounts").read_text()
    interfaces = os.listdir("/sys/class/net")

    def run(host: str, script: str) -> str:
        done = cluster(directory, "run", host, "--", "sh", "-c", script)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def do(*words: str) -> None:
        done = cluster(directory, *words)
        assert done.returncode == 0, done.stderr

    up = cluster(directory, "up", "--hosts", "2", "--share", str(shared))
    assert up.stdout == "10.77.0.1 host-1\n10.77.0.2 host-2\n", up.stderr
    try:
        assert "holds a cluster already" in cluster(directory, "up").stderr
        assert run("host-2", "hostname; hostname -I").split() == ["host-2", "10.77.0.2"]
        assert run("host-1", "ssh host-2 hostname") == "host-2"
        run("host-1", f"echo mine > /tmp/own; echo ours > {shared}/file")
        assert run("host-2", f"cat {shared}/file; ls /tmp/own 2>&1 || true").splitlines()[0] == "ours"
        assert "mine" not in run("host-2", "cat /tmp/own 2>/dev/null || true")
        reach = "timeout 5 bash -c 'exec 3<>/dev/tcp/host-2/22' 2>/dev/null && echo reached || echo not"
        do("cut", "host-2")
        assert run("host-1", reach) == "not"
        do("mend", "host-2")
        assert run("host-1", reach) == "reached"
        do("kill", "host-2")
        assert run("host-1", reach) == "not"
        assert cluster(directory, "run", "host-2", "--", "true").stderr == "error: host-2: was killed\n"
        do("boot", "host-2")
        assert run("host-1", reach) == "reached"
    finally:
        inits = [host.init for host in Cluster.load(directory).hosts.values()]
        assert cluster(directory, "down").returncode == 0
    assert not any(init.is_alive for init in inits)
    assert Path("/proc/mounts").read_text() == mounts
    assert os.listdir("/sys/class/net") == interfaces
    assert not directory.exists()


@pytest.mark.cluster
@pytest.mark.skipif(LACKING_FAULTS is not None, reason=f"this machine {LACKING_FAULTS}")
def test_links_lose_packets_are_slowed_and_mended(tmp_path):
    made = Cluster.up(2, directory=tmp_path / "cluster")

    def run(host: str, *argv: str) -> str:
        command = made.command(host, argv, Path("/"))
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    try:
        with pytest.raises(ClusterError, match="must be 1 to 99"):
            made.lose("host-2", 100)
        made.lose("host-2", 30)
        run("host-1", "bash", "-c", "for n in {1..50}; do echo >/dev/udp/host-2/9; done 2>/dev/null; true")
        assert "counter packets 0" not in run("host-2", "nft", "list", "table", "inet", "lossy")
        made.mend("host-2")
        assert "lossy" not in run("host-2", "nft", "list", "ruleset")
        made.slow("host-2", "8mbit")
        assert "rate 8Mbit" in run("host-2", "tc", "qdisc", "show", "dev", "eth0")
        made.mend("host-2")
        assert "rate" not in run("host-2", "tc", "qdisc", "show", "dev", "eth0")
    finally:
        made.down()


@needs_cluster
def test_what_the_kernel_refuses_is_a_reason_to_skip(monkeypatch):
    monkeypatch.setattr("cluster_network._PROBE", "ip link add name eth0 type no-such-type")
    assert re.fullmatch(r"may not make hosts here \(.+\); in a container: --privileged", missing_for_a_cluster())


@pytest.mark.cluster
@needs_cluster
def test_programs_are_found_where_a_users_path_does_not_lead(tmp_path):
    program = "from cluster_network import Cluster; from pathlib import Path; import sys; d = Path(sys.argv[1])\n"
    program += "Cluster.up(1, directory=d).down()"
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    environ = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT / "tools")}
    argv = [sys.executable, "-c", program, str(tmp_path / "cluster")]
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.cluster
@needs_cluster
def test_a_cluster_that_cannot_be_made_leaves_nothing(tmp_path, monkeypatch):
    """The second host's interface cannot be made; then nothing can be written at all."""
    started = []
    start = cluster_network._start_process

    def noting(*args):
        started.append(start(*args))
        return started[-1]

    def failing(argv, check=True):
        if "veth" in argv and "host-2" in argv:
            raise ClusterError("no more interfaces")
        run(argv, check)

    run = cluster_network._run
    monkeypatch.setattr(cluster_network, "_start_process", noting)
    monkeypatch.setattr(cluster_network, "_run", failing)
    with pytest.raises(ClusterError, match="no more interfaces"):
        Cluster.up(2, directory=tmp_path / "cluster")
    assert len(started) == 3
    assert not any(process.is_alive for process, _ in started)
    assert not (tmp_path / "cluster").exists()
    monkeypatch.setattr(cluster_network, "_write_common", lambda *_: failing(["veth", "host-2"]))
    with pytest.raises(ClusterError, match="no more interfaces"):
        Cluster.up(2, directory=tmp_path / "cluster")
    assert not (tmp_path / "cluster").exists()


@pytest.mark.cluster
@needs_cluster
def test_a_host_is_started_again_while_another_is_dead(tmp_path):
    made = Cluster.up(3, directory=tmp_path / "cluster")
    try:
        made.kill("host-2")
        made.kill("host-3")
        made.boot("host-2")
        command = made.command("host-1", ["ssh", "host-2", "hostname"], Path("/"))
        assert subprocess.run(command, capture_output=True, text=True, timeout=60).stdout == "host-2\n"
    finally:
        made.down()
