"""Slurm on this machine, started by hand in a directory of its own: munged, slurmctld and one slurmd."""

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
from collections.abc import Callable, Mapping
from pathlib import Path

PROGRAMS = {"munged": "munge", "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm"}
"""And Debian's packages of them."""
_SBIN = "/usr/sbin:/sbin"
_START_S = 60.0
_END_S = 20.0
_REFUSALS = ("cgroup", "Permission denied", "Operation not permitted", "Read-only file system")
"""In the log of a slurmd that has ended: what a container may not do."""
_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
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
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
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
    """One node. Its daemons are ended by `down`; a job that runs then is cancelled first."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.directory.chmod(0o755)  # munged wants its socket to be reached by everybody
        for name in ("state", "spool"):
            (self.directory / name).mkdir()
        key = self.directory / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        self.config = self.directory / "slurm.conf"
        host = socket.gethostname().split(".")[0]
        self.config.write_text(_CONFIG.format(host=host, ports=_free_ports(2), directory=self.directory))
        path = f"{os.environ['PATH']}:{_SBIN}"
        self.environ = {**os.environ, "SLURM_CONF": str(self.config), "PATH": path}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def up(self) -> None:
        """Start the daemons and wait for the node.

        Raises:
            SlurmRefusedError: if slurmd ends because this container does not let it work.
            RuntimeError: if the node does not come up otherwise, with the daemons' logs.
        """
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid"}
        files |= {"log-file": "munged.log", "seed-file": "munged.seed"}
        self._start(
            "munged", "--foreground", "--force", *(f"--{key}={self.directory / name}" for key, name in files.items())
        )
        if not eventually((self.directory / "munge.socket").exists, _START_S):
            raise RuntimeError("munged did not start:\n" + self.logs())
        self._start("slurmctld", "-D", "-i", "-f", str(self.config))
        self._start("slurmd", "-D", "-f", str(self.config))
        slurmd = self._daemons[-1]
        eventually(lambda: self._is_idle() or slurmd.poll() is not None, _START_S)
        if slurmd.poll() is not None:
            lines = (self.directory / "slurmd.log").read_text(errors="replace").splitlines()
            refused = [line for line in lines if any(word in line for word in _REFUSALS)]
            if refused:
                raise SlurmRefusedError(f"cannot start slurmd here: {refused[-1]}")
        if slurmd.poll() is not None or not self._is_idle():
            raise RuntimeError("the node did not come up:\n" + self.logs())

    def _is_idle(self) -> bool:
        try:
            return self.run("sinfo", "-h", "-o", "%T").stdout.strip() == "idle"
        except subprocess.TimeoutExpired:
            return False

    def logs(self) -> str:
        """Return the ends of the daemons' logs."""
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(self.directory.glob("*.log")))

    def run(
        self, *argv: str, environ: Mapping[str, str] | None = None, timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's commands."""
        given = {**self.environ, **(environ or {})}
        return subprocess.run(argv, env=given, capture_output=True, text=True, check=False, timeout=timeout_s)

    def state(self, job: str) -> str:
        """Return a job's state, as PENDING or RUNNING; empty where it is forgotten."""
        return self.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").stdout.strip()

    def down(self) -> None:
        """Cancel every job, end the daemons and remove their files."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # a controller that does not answer has no jobs
            self.run("scancel", "-u", "root", timeout_s=_END_S)
            eventually(lambda: not self.run("squeue", "-h", timeout_s=_END_S).stdout.strip(), _END_S)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(_END_S)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _start(self, *argv: str) -> None:
        with (self.directory / f"{argv[0]}.out.log").open("wb") as out:
            self._daemons.append(subprocess.Popen(argv, env=self.environ, stdout=out, stderr=out))


def _free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [int(listener.getsockname()[1]) for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports
