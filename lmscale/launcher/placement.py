"""Where the ranks of a run go: which launcher, which hosts, how many ranks on each."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from lmscale.config.validation import nearest
from lmscale.errors import ConfigError
from lmscale.launcher.environment import is_free_port, is_of_this_host, slurm_number, visible_devices
from lmscale.launcher.hosts import Host, read_hostfile

Launcher = Literal["deepspeed", "pdsh", "openmpi", "mpich", "slurm", "torchrun"]
_OVER_HOSTS = ("deepspeed", "pdsh", "openmpi", "mpich", "torchrun")
"""Launchers that read a hostfile."""

_SSH = ("ssh", "openssh-client")
_NEEDS = {
    "deepspeed": (("pdsh", "pdsh"), _SSH),
    "pdsh": (("pdsh", "pdsh"), _SSH),
    "openmpi": (("ompi_info", "openmpi-bin"), _SSH),
    "mpich": (("mpiexec.hydra", "mpich"), _SSH),
    "slurm": (("srun", "slurm-client"),),
    "torchrun": (_SSH,),
}
"""Programs, and Debian's packages of them, that a launcher needs for several hosts."""


@dataclass(frozen=True)
class Nodes:
    """The hosts of a torchrun that is started on each of them by itself, as a scheduler does."""

    least: int
    most: int
    """Above `least`: elastic, hosts may come and go between the two."""
    rank: int | None = None
    """Of this host; None where they find their order by themselves."""
    max_restarts: int = 0
    """That torchrun does by itself, on all hosts together."""

    @property
    def is_elastic(self) -> bool:
        """Whether hosts may come and go."""
        return self.least < self.most


@dataclass(frozen=True)
class Placement:
    """Where the ranks go."""

    launcher: Launcher = "deepspeed"
    hostfile: str | None = None
    hosts: tuple[Host, ...] = ()
    """From the hostfile; empty for this host alone, and under Slurm, which knows."""
    ranks_per_host: int | None = None
    """None takes the hostfile's slots."""
    num_ranks: int = 1
    """On all hosts together."""
    cuda_devices: tuple[str, ...] = ()
    """Of this host; empty where there are none."""
    nodes: Nodes | None = None
    """Of a torchrun that is started on each host by itself."""
    master_addr: str | None = None
    """Where the ranks meet; None finds it."""
    master_port: int | None = None
    """On that host; None takes one."""

    def slots(self, host: Host) -> int:
        """Return the ranks of a host."""
        return self.ranks_per_host or host.slots


def place(
    launcher: str | None,
    devices: int | None,
    hostfile: str | None,
    environ: Mapping[str, str] = os.environ,
    *,
    nnodes: str | None = None,
    node_rank: int | None = None,
    master_addr: str | None = None,
    master_port: int | None = None,
    max_restarts: int = 0,
) -> Placement:
    """Work out how many ranks run where.

    Args:
        launcher: as on the command line; None is DeepSpeed's own.
        devices: ranks of each host; None takes the hostfile's slots, or this host's CUDA devices, or 1.
        hostfile: None for this host alone.
        environ: to look for devices in.
        nnodes: hosts of a torchrun that each starts by itself, "N" or "MIN:MAX".
        node_rank: of this host among N.
        master_addr: where the ranks meet.
        master_port: on that host.
        max_restarts: of such a torchrun's ranks.

    Raises:
        ConfigError: if the launcher is unknown, is not installed, or cannot serve the hosts.
    """
    name = _known(launcher or "deepspeed")
    cuda_devices = tuple(visible_devices(environ) or ())
    hosts = tuple(read_hostfile(hostfile)) if hostfile is not None else ()
    _check_hosts(name, hosts)
    nodes = _nodes(name, nnodes, node_rank, hosts, master_addr)
    if nodes is not None:
        nodes = replace(nodes, max_restarts=max_restarts)
    _check_installed(name, hosts)
    if devices is not None and devices < 1:
        raise ConfigError("must be at least 1", field="--devices", value=devices)
    _check_meeting(name, hosts, nodes, master_addr, master_port)
    placement = Placement(name, hostfile, hosts, devices, 1, cuda_devices, nodes, master_addr, master_port)
    if hosts:
        _check_slots(hosts, devices)
        return replace(placement, num_ranks=sum(map(placement.slots, hosts)))
    if name == "slurm":
        return replace(placement, num_ranks=_slurm_ranks(devices, environ))
    here = devices or len(cuda_devices) or 1
    if cuda_devices and here > len(cuda_devices):
        remedy = "use fewer, or DS_ACCELERATOR=cpu"
        raise ConfigError(
            f"this host has {len(cuda_devices)} CUDA devices", field="--devices", value=here, remedy=remedy
        )
    return replace(placement, num_ranks=here * (nodes.most if nodes else 1))


def _check_slots(hosts: tuple[Host, ...], devices: int | None) -> None:
    small = next((host for host in hosts if devices is not None and host.slots < devices), None)
    if small is not None:
        rule = f"{small.name} has {small.slots} slot{'s' * (small.slots != 1)} in the hostfile"
        raise ConfigError(rule, field="--devices", value=devices, remedy="use fewer, or correct its slots")


def _slurm_ranks(devices: int | None, environ: Mapping[str, str]) -> int:
    """Count the ranks in a job of Slurm's: its tasks, or as many as are asked for on each of its hosts."""
    num_hosts = slurm_number(environ, "SLURM_JOB_NUM_NODES") or slurm_number(environ, "SLURM_NNODES")
    num_tasks = slurm_number(environ, "SLURM_NTASKS")
    if devices is not None and num_hosts is not None:
        return devices * num_hosts
    if devices is None and num_tasks is not None:
        return num_tasks
    if num_hosts is not None:
        remedy = "give it, or submit the job with --ntasks-per-node"
        raise ConfigError(
            "is required in a job without a number of tasks", field="--devices", value=None, remedy=remedy
        )
    remedy = "start it by sbatch launch/slurm.sbatch, or in what salloc gives"
    raise ConfigError("starts ranks in a job of Slurm's", field="--launcher", value="slurm", remedy=remedy)


def _known(name: str) -> Launcher:
    known: dict[str, Launcher] = {launcher: launcher for launcher in get_args(Launcher)}
    if name not in known:
        raise ConfigError("is no launcher", field="--launcher", value=name, remedy=nearest(name, known))
    return known[name]


def _check_installed(name: Launcher, hosts: tuple[Host, ...]) -> None:
    """Look for the programs that several hosts need; on one host DeepSpeed and torchrun are in the environment."""
    if not hosts and name != "slurm":
        return
    for program, package in _NEEDS[name]:
        if shutil.which(program) is None:
            remedy = f"install it, on Debian: apt-get install {package}"
            raise ConfigError(
                f"needs {program}, which is not on the PATH", field="--launcher", value=name, remedy=remedy
            )


def _check_hosts(name: Launcher, hosts: tuple[Host, ...]) -> None:
    if name in {"pdsh", "openmpi", "mpich"} and not hosts:
        raise ConfigError(
            "starts ranks on the hosts of a hostfile", field="--launcher", value=name, remedy="give --hostfile"
        )
    if name not in _OVER_HOSTS and hosts:
        remedy = "drop --hostfile: Slurm knows its hosts"
        raise ConfigError("does not read a hostfile", field="--launcher", value=name, remedy=remedy)
    if name == "openmpi" and os.geteuid() == 0:
        missing = [each for each in _OPENMPI_AS_ROOT if os.environ.get(each) != "1"]
        if missing:
            remedy = f"be another user, or set {' and '.join(f'{each}=1' for each in missing)}"
            raise ConfigError("does not start as root", field="--launcher", value=name, remedy=remedy)


_OPENMPI_AS_ROOT = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")


def _nodes(
    name: Launcher, nnodes: str | None, node_rank: int | None, hosts: tuple[Host, ...], master_addr: str | None
) -> Nodes | None:
    """Read --nnodes and --node-rank, torchrun's own words."""
    if nnodes is None:
        if node_rank is not None:
            raise ConfigError("is read with --nnodes only", field="--node-rank", value=node_rank)
        return None
    if name != "torchrun":
        raise ConfigError("is torchrun's", field="--nnodes", value=nnodes, remedy="add --launcher torchrun")
    if hosts:
        remedy = "drop one of the two: with a hostfile torchrun is started on its hosts, over ssh"
        raise ConfigError("is for a start on each host by itself", field="--nnodes", value=nnodes, remedy=remedy)
    match = re.fullmatch(r"(\d+)(?::(\d+))?", nnodes)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most:
        raise ConfigError("must be a number of hosts, or a range", field="--nnodes", value=nnodes, remedy="as in 2:4")
    nodes = Nodes(least, most, node_rank)
    if nodes.is_elastic and node_rank is not None:
        remedy = "drop it: the hosts of a range find their order by themselves"
        raise ConfigError("is for a fixed --nnodes", field="--node-rank", value=node_rank, remedy=remedy)
    if not nodes.is_elastic and (node_rank is None or not 0 <= node_rank < most):
        raise ConfigError(
            f"must be between 0 and {most - 1}, another on each host", field="--node-rank", value=node_rank
        )
    if most > 1 and master_addr is None:
        remedy = "name one of the hosts, the same on each"
        raise ConfigError("is required with --nnodes", field="--master-addr", value=None, remedy=remedy)
    return nodes


def _check_meeting(
    name: Launcher, hosts: tuple[Host, ...], nodes: Nodes | None, address: str | None, port: int | None
) -> None:
    """Check the address and the port at which the ranks meet; a port of another host is checked at the start."""
    if address is not None and not hosts and nodes is None and name != "slurm":
        remedy = "drop it, or name the hosts"
        raise ConfigError("is for several hosts", field="--master-addr", value=address, remedy=remedy)
    if port is None:
        return
    if not 1 <= port <= 65535:
        raise ConfigError("must be between 1 and 65535", field="--master-port", value=port)
    meets_here = not hosts and name != "slurm" and (nodes is None or nodes.rank == 0)
    if nodes is not None and nodes.is_elastic:
        meets_here = is_of_this_host(address or "localhost")
    if meets_here and not is_free_port(port):
        raise ConfigError("is in use on this host", field="--master-port", value=port, remedy="use another, or none")
