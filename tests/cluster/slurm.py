"""Slurm, started by hand in a directory of its own: munged, slurmctld, and slurmd on this machine or on hosts of the cluster."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PROGRAMS = {"munged": "munge", "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm"}
"""And Debian's packages of them."""
_SBIN = "/usr/sbin:/sbin"
_START_S = 60.0
_END_S = 20.0
_REFUSALS = ("cgroup", "Permission denied", "Operation not permitted", "Read-only file system")
"""In the log of a slurmd that has ended: what a container may not do."""
_CONFIG = """\
ClusterName=test
SlurmctldHost={controller}
SlurmUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={local}/munge.socket
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={local}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
KillWait=10
SchedulerParameters=sched_interval=5
ReturnToService=2
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_for_slurm() -> str | None:
    """Say why Slurm cannot be started here; None where it can."""
    if os.geteuid() != 0:
        return "needs root"
    path = f"{os.environ['PATH']}:{_SBIN}"
    lacking = sorted({package for program, package in PROGRAMS.items() if shutil.which(program, path=path) is None})
    return f"needs Debian's {' and '.join(lacking)}" if lacking else None


class SlurmRefusedError(RuntimeError):
    """slurmd may not do here what it must; its own words."""


def eventually(condition: Callable[[], bool], within_s: float) -> bool:
    """Wait until something holds, and say whether it does."""
    until = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
    return True


class Slurm:
    """One node, this machine. Its daemons are ended by `down`; a job that runs then is cancelled first."""

    def __init__(self) -> None:
        name, directory = socket.gethostname().split(".")[0], Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self._write(directory, directory, {name: "127.0.0.1"})

    def _write(self, directory: Path, local: Path, nodes: Mapping[str, str]) -> None:
        """Write the settings; sockets, whose paths must be short, lie in a directory that each node has of its own."""
        self.directory, self._local, self._nodes = directory, local, list(nodes)
        self.directory.chmod(0o755)  # munged wants its socket to be reached by everybody
        (self.directory / "state").mkdir()
        key = self.directory / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        self.config = self.directory / "slurm.conf"
        controller = "{}({})".format(*next(iter(nodes.items())))
        lines = [f"NodeName={name} NodeAddr={address} CPUs=4 State=UNKNOWN" for name, address in nodes.items()]
        places = {"directory": directory, "local": local, "ports": _free_ports(2)}
        self.config.write_text(_CONFIG.format(controller=controller, nodes="\n".join(lines), **places))
        path = f"{os.environ['PATH']}:{_SBIN}"
        self.environ = {**os.environ, "SLURM_CONF": str(self.config), "PATH": path}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def up(self) -> None:
        """Start the daemons and wait for the nodes.

        Raises:
            SlurmRefusedError: if slurmd ends because this container does not let it work.
            RuntimeError: if the nodes do not come up otherwise, with the daemons' logs.
        """
        for node in self._nodes:
            self._start_munged(node)
        self._start(self._nodes[0], "slurmctld", "-D", "-i", "-f", str(self.config))
        slurmds = [self._start(node, "slurmd", "-D", "-N", node, "-f", str(self.config)) for node in self._nodes]

        def has_ended() -> bool:
            return any(slurmd.poll() is not None for slurmd in slurmds)

        eventually(lambda: self._is_idle() or has_ended(), _START_S)
        if has_ended():
            logs = [path.read_text(errors="replace") for path in self.directory.glob("slurmd-*.log")]
            lines = [line for log in logs for line in log.splitlines() if any(word in line for word in _REFUSALS)]
            if lines:
                raise SlurmRefusedError(f"cannot start slurmd here: {lines[-1]}")
        if has_ended() or not self._is_idle():
            raise RuntimeError("the nodes did not come up:\n" + self.logs())

    def _start_munged(self, node: str) -> None:
        files = {"key-file": self.directory / "munge.key", "log-file": self.directory / f"munged-{node}.log"}
        files |= {f"{name}-file": self._local / f"munged.{name}" for name in ("pid", "seed")}
        words = [f"--{name}={path}" for name, path in files.items()]
        socket_file = self._local / "munge.socket"
        self._start(node, "munged", "--foreground", "--force", f"--socket={socket_file}", *words)
        if not eventually(lambda: self.run("test", "-S", str(socket_file), node=node).returncode == 0, _START_S):
            raise RuntimeError("munged did not start:\n" + self.logs())

    def _is_idle(self) -> bool:
        try:
            return self.run("sinfo", "-h", "-o", "%T").stdout.strip() == "idle"
        except subprocess.TimeoutExpired:
            return False

    def logs(self) -> str:
        """Return the ends of the daemons' logs."""
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(self.directory.glob("*.log")))

    def run(
        self, *argv: str, environ: Mapping[str, str] | None = None, timeout_s: float = 60.0, node: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's commands, on the first node."""
        given = {**self.environ, **(environ or {})}
        command = self._on(node or self._nodes[0], argv)
        return subprocess.run(command, env=given, capture_output=True, text=True, check=False, timeout=timeout_s)

    def state(self, job: str) -> str:
        """Return a job's state, as PENDING or RUNNING; empty where it is forgotten."""
        return self.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").stdout.strip()

    def down(self) -> None:
        """Cancel every job, end the daemons and remove their files."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # a controller that does not answer has no jobs
            self.run("scancel", "-u", "root", timeout_s=_END_S)
            eventually(lambda: not self.run("squeue", "-h", timeout_s=_END_S).stdout.strip(), _END_S)
        for daemon in reversed(self._daemons):
            self._send_term(daemon)
            try:
                daemon.wait(_END_S)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _on(self, node: str, argv: Sequence[str]) -> list[str]:
        """Return the command line that runs another on a node."""
        return list(argv)

    def _send_term(self, daemon: subprocess.Popen[bytes]) -> None:
        daemon.send_signal(signal.SIGTERM)

    def _start(self, node: str, *argv: str) -> subprocess.Popen[bytes]:
        with (self.directory / f"{argv[0]}-{node}.out.log").open("wb") as out:
            self._daemons.append(subprocess.Popen(self._on(node, argv), env=self.environ, stdout=out, stderr=out))
        return self._daemons[-1]


class SlurmOnHosts(Slurm):
    """Nodes that are hosts of the cluster; slurmctld runs on the first.

    Args:
        cluster: whose hosts they are.
        names: of the hosts.
        directory: that they share.
    """

    def __init__(self, cluster: Any, names: Sequence[str], directory: Path):
        self._cluster = cluster
        self._write(directory, Path("/run/slurm"), {name: cluster.hosts[name].address for name in names})
        for name in names:
            self.run("mkdir", "-p", str(self._local), node=name)

    def _on(self, node: str, argv: Sequence[str]) -> list[str]:
        command: list[str] = self._cluster.command(node, argv, Path("/"))
        return command

    def _send_term(self, daemon: subprocess.Popen[bytes]) -> None:
        """Send it below nsenter, which keeps it to itself."""
        with contextlib.suppress(OSError, ValueError):  # it has ended
            (child,) = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
            os.kill(int(child), signal.SIGTERM)


def _free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [int(listener.getsockname()[1]) for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports
