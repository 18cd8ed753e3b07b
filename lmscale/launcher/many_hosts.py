"""What each launcher of several hosts is given, and what it starts on each of them.

DeepSpeed's own backends for MPI and Slurm are left out: they need mpi4py, name the interface eth0, refuse a number of
ranks for each host, put every variable's value on a command line that other users see, or drop --module.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lmscale.errors import ConfigError
from lmscale.launcher.environment import slurm_number
from lmscale.launcher.placement import Placement
from lmscale.launcher.shell import HostCommand, python_line, python_module

_SRUN_WAIT_S = 60
"""srun ends the other tasks this long after the first; at once, it would cut a save short that a signal asked for."""
_SCONTROL_S = 10.0
_ID_DIGITS = 12
_DEEPSPEED_EXPORTS = ("MLFLOW", "PYTHON", "MV2", "UCX")
"""Beginnings of the names that DeepSpeed exports by itself; NCCL too, where it runs on CUDA."""

_CHANGES_IN_QUOTES = re.compile(r'[$`"\\\n]|%[hnu%]')
_CHANGES = re.compile(r"[^\w@%+=:,./-]|%[hnu%]")
"""What a shell, or pdsh, takes for something else between double quotes, and without them."""


@dataclass(frozen=True)
class Meeting:
    """Where the ranks meet: rank 0's host."""

    address: str
    port: int

    @property
    def environ(self) -> dict[str, str]:
        """Name it as torch reads it."""
        return {"MASTER_ADDR": self.address, "MASTER_PORT": str(self.port)}


Composed = tuple[list[str], list[HostCommand]]


def deepspeed(program: str, placement: Placement, rank_argv: list[str], meeting: Meeting) -> Composed:
    """Compose DeepSpeed's launcher over pdsh; what it makes of that is pinned by a test."""
    assert placement.hostfile is not None
    options = ["--hostfile", placement.hostfile]
    if placement.ranks_per_host is not None:
        options += ["--num_gpus", str(placement.ranks_per_host)]
    # With a single host in the file DeepSpeed would start the ranks here, whatever the host's name. Without an address it
    # would take the first that `hostname -I` prints there, whichever network that is on.
    meets = ["--master_addr", meeting.address, "--master_port", str(meeting.port)]
    argv = [program, *options, "--launcher", "pdsh", "--force_multi", *meets, *rank_argv]
    world = {host.name: list(range(placement.slots(host))) for host in placement.hosts}
    info = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    on_hosts = []
    for number, host in enumerate(placement.hosts):
        where = [f"--world_info={info}", f"--node_rank={number}", f"--master_addr={meeting.address}"]
        where += [f"--master_port={meeting.port}", "--module", "--enable_each_rank_log=None"]
        launch = python_module("deepspeed.launcher.launch", *where, *rank_argv[1:])
        line = f"cd {os.path.abspath('.')}; {' '.join(launch)}"
        on_hosts.append(HostCommand(host.name, placement.slots(host), line))
    return argv, on_hosts


def deepspeed_exports(environ: Mapping[str, str]) -> dict[str, str]:
    """Select what DeepSpeed's launcher exports of its environment beside what it is told to."""
    return {name: value for name, value in environ.items() if name.startswith(_DEEPSPEED_EXPORTS)}


def check_pdsh(rank_argv: Sequence[str], travels: Mapping[str, str]) -> None:
    """Check that the hosts' shells get from pdsh what is meant, and what --dry-run shows.

    DeepSpeed's launcher puts a variable's value between double quotes and cuts off blanks and lines around it; the working
    directory, the Python and arguments without a blank it does not quote at all; pdsh puts the host for %h, and so on.

    Raises:
        ConfigError: naming what would become something else there.
    """
    for name, value in travels.items():
        if _CHANGES_IN_QUOTES.search(value) or value != value.strip():
            remedy = "set it on the hosts, or use --launcher torchrun"
            raise ConfigError("cannot travel by pdsh: a shell would change it", field=name, value=value, remedy=remedy)
    places = {"the working directory": os.getcwd(), "Python": sys.executable, "output_dir": rank_argv[-1]}
    for field, path in places.items():
        is_quoted = field == "output_dir" and " " in path
        if (_CHANGES_IN_QUOTES if is_quoted else _CHANGES).search(path):
            remedy = "give it a name of letters, digits and .-_/, or use --launcher torchrun"
            raise ConfigError(
                "cannot be passed on by pdsh: a shell would change it", field=field, value=path, remedy=remedy
            )


def openmpi(placement: Placement, rank_argv: list[str], meeting: Meeting, travels: Sequence[str]) -> Composed:
    """Compose OpenMPI's mpirun, for processes alone: the ranks talk by NCCL or gloo."""
    program = next(filter(shutil.which, ("mpirun.openmpi", "mpirun")), "mpirun")
    # Values stay off the command line: with a name alone mpirun takes them from its environment.
    exports = [word for name in sorted(travels) for word in ("-x", name)]
    spread = ["--map-by", "slot", "--bind-to", "none"]  # a rank and its data workers share the host's cores
    argv = [program, "-np", str(placement.num_ranks), "--host", _slots(placement), *spread, *exports]
    return _mpi(argv, placement, rank_argv)


def mpich(placement: Placement, rank_argv: list[str], meeting: Meeting, travels: Sequence[str]) -> Composed:
    """Compose MPICH's mpiexec (Hydra), for processes alone."""
    argv = ["mpiexec.hydra", "-launcher", "ssh", "-n", str(placement.num_ranks), "-hosts", _slots(placement)]
    # Left to itself, Hydra passes on everything.
    return _mpi([*argv, "-genvlist", ",".join(sorted(travels))], placement, rank_argv)


def _mpi(argv: list[str], placement: Placement, rank_argv: list[str]) -> Composed:
    rank = _rank(rank_argv)
    line = f"cd {shlex.quote(os.getcwd())}; {shlex.join(rank)}"
    return [*argv, *rank], [HostCommand(host.name, placement.slots(host), line) for host in placement.hosts]


def _slots(placement: Placement) -> str:
    return ",".join(f"{host.name}:{placement.slots(host)}" for host in placement.hosts)


def torchrun_over_ssh(placement: Placement, rank_argv: list[str], meeting: Meeting, travels: Sequence[str]) -> Composed:
    """Compose a torchrun with static rendezvous on each host, started over ssh by over_ssh.py."""
    argv, on_hosts = python_module("lmscale.launcher.over_ssh", ",".join(sorted(travels))), []
    for number, host in enumerate(placement.hosts):
        static = [f"--nnodes={len(placement.hosts)}", f"--node-rank={number}"]
        meets = [f"--master-addr={meeting.address}", f"--master-port={meeting.port}"]
        options = [*static, f"--nproc-per-node={placement.slots(host)}", *meets]
        torchrun = python_module("torch.distributed.run", *options, *rank_argv)
        line = python_line("lmscale.launcher.tether", *torchrun)
        argv += [host.name, line]
        on_hosts.append(HostCommand(host.name, placement.slots(host), line))
    return argv, on_hosts


def node_options(placement: Placement, port: int, output_dir: str) -> list[str]:
    """Compose torchrun's options on a host that joins by itself: fixed places, or a range that finds its own order.

    The hosts of a range know each other by the run's directory: those of another run that come to the same place are not
    taken in.
    """
    nodes, address = placement.nodes, placement.master_addr or "127.0.0.1"
    assert nodes is not None
    port = placement.master_port or port
    each = f"--nproc-per-node={placement.num_ranks // nodes.most}"
    if not nodes.is_elastic:
        static = [f"--nnodes={nodes.most}", f"--node-rank={nodes.rank}"]
        return [*static, each, f"--master-addr={address}", f"--master-port={port}"]
    run = hashlib.sha256(os.path.abspath(output_dir).encode()).hexdigest()[:_ID_DIGITS]
    meets = ["--rdzv-backend=c10d", f"--rdzv-endpoint={address}:{port}", f"--rdzv-id=lmscale-{run}"]
    return [f"--nnodes={nodes.least}:{nodes.most}", each, f"--max-restarts={nodes.max_restarts}", *meets]


def slurm(placement: Placement, rank_argv: list[str], environ: Mapping[str, str]) -> Composed:
    """Compose srun; what runs on which host Slurm has decided."""
    rank = _rank(rank_argv)
    keep = ["--kill-on-bad-exit=0", f"--wait={_SRUN_WAIT_S}", "--export=ALL"]
    each = placement.ranks_per_host
    spread = [] if each is None else [f"--ntasks-per-node={each}"]
    argv = ["srun", f"--ntasks={placement.num_ranks}", *spread, *keep, *rank]
    line = f"cd {shlex.quote(os.getcwd())}; {shlex.join(rank)}"
    return argv, [HostCommand(name, each or count, line) for name, count in _allocation(environ)]


def slurm_meeting(placement: Placement, environ: Mapping[str, str]) -> dict[str, str]:
    """Choose where Slurm's tasks meet, but for what the user has set."""
    env = {}
    if placement.master_addr is not None or "MASTER_ADDR" not in environ:
        # The batch script runs on the first host of the allocation, where rank 0 is.
        env["MASTER_ADDR"] = placement.master_addr or environ.get("SLURMD_NODENAME") or os.uname().nodename
    if placement.master_port is not None or "MASTER_PORT" not in environ:
        port = placement.master_port or 20000 + (slurm_number(environ, "SLURM_JOB_ID") or 0) % 20000
        env["MASTER_PORT"] = str(port)
    return env


def _allocation(environ: Mapping[str, str]) -> Iterator[tuple[str, int | None]]:
    """Name the hosts of the job and their tasks, as far as Slurm has told."""
    names: list[str] = []
    if "SLURM_JOB_NODELIST" in environ:
        command = ["scontrol", "show", "hostnames", environ["SLURM_JOB_NODELIST"]]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SCONTROL_S)
            names = done.stdout.split()
        except (OSError, subprocess.SubprocessError):
            names = []
    tasks = list(_tasks(environ.get("SLURM_TASKS_PER_NODE", "")))
    if not names:
        yield "each host of Slurm's allocation", None
    for number, name in enumerate(names):
        yield name, tasks[number] if len(tasks) == len(names) else None


def _tasks(text: str) -> Iterator[int]:
    """Read Slurm's "8(x2),4" as 8, 8, 4."""
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        yield from [int(count)] * int(times or 1)


def _rank(rank_argv: list[str]) -> list[str]:
    """Compose a rank that is started by itself: "--module M" becomes "-m M"."""
    return [sys.executable, "-u", "-m", *rank_argv[1:]]
