"""The command line that starts the ranks, for each launcher; the one place that knows it.

The ranks get a single resolved config file and no overrides: pdsh hands brackets and dollar signs to the remote shell.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lmscale.config.run import RunConfig
from lmscale.config.validation import nearest
from lmscale.errors import ConfigError
from lmscale.launcher.environment import free_port, threads_for, travelling, visible_devices
from lmscale.launcher.hosts import Host, read_hostfile
from lmscale.launcher.status import RUN_ID, STARTED_AT
from lmscale.launcher.validate import LaunchPlan

Launcher = Literal["deepspeed", "pdsh", "openmpi", "mpich", "slurm", "torchrun"]
PRETRAIN, FINETUNE = "lmscale.pretrain", "lmscale.finetune"
_SRUN_WAIT_S = 60
"""srun ends the other tasks this long after the first; at once, it would cut a save short that a signal asked for."""

_NEEDS = {"pdsh": ("pdsh", "pdsh"), "openmpi": ("mpirun", "openmpi-bin"), "mpich": ("mpirun", "mpich")}
_NEEDS |= {"slurm": ("srun", "slurm-client")}


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


@dataclass(frozen=True)
class Command:
    """What to run."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    """Set beside the environment that is there."""
    unset: tuple[str, ...]
    """Taken out of it."""
    travels: Mapping[str, str]
    """What DeepSpeed exports on the other hosts; empty on one host."""
    is_local: bool
    """All ranks are processes of this host, below the launcher."""
    passes_signals: bool = False
    """The launcher hands signals to its ranks by itself."""
    hosts: tuple[str, ...] = ()
    """Of the hostfile."""

    def show(self) -> str:
        """Render as a line for a shell."""
        unset = [f"-u {name}" for name in self.unset if name in os.environ]
        words = ["env", *unset] if unset else []
        return " ".join([*words, *(f"{name}={shlex.quote(v)}" for name, v in self.env.items()), shlex.join(self.argv)])


def place(
    launcher: str | None, devices: int | None, hostfile: str | None, environ: Mapping[str, str] = os.environ
) -> Placement:
    """Work out how many ranks run where.

    Args:
        launcher: as on the command line; None is DeepSpeed's own.
        devices: ranks of each host; None takes the hostfile's slots, or this host's CUDA devices, or 1.
        hostfile: None for this host alone.
        environ: to look for devices in.

    Raises:
        ConfigError: if the launcher is unknown, is not installed, or cannot serve the hosts.
    """
    name = _check_launcher(launcher or "deepspeed")
    cuda_devices = tuple(visible_devices(environ) or ())
    hosts = tuple(read_hostfile(hostfile)) if hostfile is not None else ()
    _check_hosts(name, hosts, devices)
    if devices is not None and devices < 1:
        raise ConfigError("must be at least 1", field="--devices", value=devices)
    if hosts:
        num_ranks = sum(host.slots if devices is None else devices for host in hosts)
    elif name == "slurm" and devices is None:
        num_ranks = int(environ.get("SLURM_NTASKS", "1"))
    else:
        num_ranks = devices or len(cuda_devices) or 1
    if not hosts and cuda_devices and num_ranks > len(cuda_devices) and name != "slurm":
        raise ConfigError(
            f"this host has {len(cuda_devices)} CUDA devices",
            field="--devices",
            value=num_ranks,
            remedy="use fewer, or DS_ACCELERATOR=cpu",
        )
    return Placement(name, hostfile, hosts, devices, num_ranks, cuda_devices)


def _check_launcher(name: str) -> Launcher:
    known: dict[str, Launcher] = {launcher: launcher for launcher in get_args(Launcher)}
    if name not in known:
        raise ConfigError("is no launcher", field="--launcher", value=name, remedy=nearest(name, known))
    program, package = _NEEDS.get(name, (None, ""))
    if program is not None and shutil.which(program) is None:
        remedy = f"install it, on Debian: apt-get install {package}"
        raise ConfigError(f"needs {program}, which is not on the PATH", field="--launcher", value=name, remedy=remedy)
    return known[name]


def _check_hosts(name: Launcher, hosts: tuple[Host, ...], devices: int | None) -> None:
    if name in {"pdsh", "openmpi", "mpich"} and not hosts:
        raise ConfigError(
            "starts ranks on the hosts of a hostfile", field="--launcher", value=name, remedy="give --hostfile"
        )
    if name in {"slurm", "torchrun"} and hosts:
        remedy = "Slurm knows its hosts" if name == "slurm" else "run torchrun on each host"
        raise ConfigError(
            "does not read a hostfile", field="--launcher", value=name, remedy=f"drop --hostfile: {remedy}"
        )
    if name in {"openmpi", "mpich"} and devices is not None:
        remedy = "drop --devices, or edit the hostfile"
        raise ConfigError("takes the number of ranks from the slots", field="--launcher", value=name, remedy=remedy)


def compose(
    plan: LaunchPlan, placement: Placement, config_file: Path, environ: Mapping[str, str] = os.environ
) -> Command:
    """Compose the command that starts a checked run.

    Args:
        plan: the run.
        placement: where its ranks go; plan.num_ranks of them.
        config_file: where the resolved config will lie, for every rank to read.
        environ: the environment that the launcher will start in.

    Raises:
        ConfigError: if the launcher cannot address the devices.
    """
    assert plan.num_ranks == placement.num_ranks
    is_local = not placement.hosts and placement.launcher != "slurm"
    busiest = max((placement.ranks_per_host or host.slots for host in placement.hosts), default=placement.num_ranks)
    env = {RUN_ID: uuid.uuid4().hex}
    if STARTED_AT in environ:
        env[STARTED_AT] = environ[STARTED_AT]
    if not placement.cuda_devices:
        env["DS_ACCELERATOR"] = "cpu"
    if "OMP_NUM_THREADS" not in environ:
        env["OMP_NUM_THREADS"] = str(threads_for(busiest))
    rank_argv = ["--module", module_of(plan.config), "--config", str(config_file)]
    # A rank's identity left over from an outer launch would make the launcher itself look like a rank.
    unset = ["RANK", "LOCAL_RANK", "WORLD_SIZE"]
    meeting: dict[str, str] = {}
    if placement.launcher == "torchrun":
        port = f"--master_port={free_port()}"
        argv = [_program("torchrun"), f"--nproc_per_node={placement.num_ranks}", port, *rank_argv]
    elif placement.launcher == "slurm":
        argv, more = _srun(placement, rank_argv, environ)
        env |= more
    else:
        port = str(free_port())
        argv = [_program("deepspeed"), *_deepspeed_options(placement, environ), "--master_port", port, *rank_argv]
        # Under mpirun DeepSpeed would ask mpi4py for it, and for the address, which is known once the hosts have answered.
        meeting = {"MASTER_PORT": port} if placement.launcher in {"openmpi", "mpich"} else {}
        unset += ["CUDA_VISIBLE_DEVICES"] if is_local and placement.cuda_devices else []
    travels = {**travelling({**environ, **env}), **meeting} if placement.hosts else {}
    return Command(
        tuple(argv),
        env,
        tuple(unset),
        travels,
        is_local,
        passes_signals=placement.launcher == "slurm",
        hosts=tuple(host.name for host in placement.hosts),
    )


def module_of(config: RunConfig) -> str:
    """Return the module that the ranks run."""
    return PRETRAIN if config.adapt is None and config.task is None else FINETUNE


def _program(name: str) -> str:
    """Prefer the script beside our own Python: the console command works without an activated environment."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else name


def _deepspeed_options(placement: Placement, environ: Mapping[str, str]) -> list[str]:
    if not placement.hosts:
        quiet = ["--log_level", "error"]  # it warns of each run without a hostfile
        return [*_local_devices(placement, environ), *quiet]
    assert placement.hostfile is not None
    options = ["--hostfile", placement.hostfile]
    if placement.ranks_per_host is not None:
        options += ["--num_gpus", str(placement.ranks_per_host)]
    backend = "pdsh" if placement.launcher == "deepspeed" else placement.launcher
    # With a single host in the file DeepSpeed would start the ranks here, whatever the host's name.
    return [*options, "--launcher", backend, "--force_multi"]


def _local_devices(placement: Placement, environ: Mapping[str, str]) -> list[str]:
    if not placement.cuda_devices:
        # Without a number a CPU host gets one rank for each NUMA node.
        return ["--num_accelerators", str(placement.num_ranks)]
    chosen = placement.cuda_devices[: placement.num_ranks]
    if not environ.get("CUDA_VISIBLE_DEVICES") and chosen == tuple(map(str, range(placement.num_ranks))):
        return ["--num_gpus", str(placement.num_ranks)]
    # DeepSpeed ignores the variable where it is given a number, and would take the first devices of the host.
    if not all(name.isdecimal() for name in chosen):
        raise ConfigError(
            "DeepSpeed's launcher takes devices by number",
            field="CUDA_VISIBLE_DEVICES",
            value=",".join(chosen),
            remedy="use numbers, or --launcher torchrun",
        )
    return ["--include", f"localhost:{','.join(chosen)}"]


def _srun(placement: Placement, rank_argv: list[str], environ: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Start the ranks by srun itself: DeepSpeed's Slurm backend drops --module."""
    argv = [
        "srun",
        f"--ntasks={placement.num_ranks}",
        "--kill-on-bad-exit=0",
        f"--wait={_SRUN_WAIT_S}",
        "--export=ALL",
        sys.executable,
        "-u",
        "-m",
    ]
    env = {}
    if "MASTER_ADDR" not in environ:
        # The batch script runs on the first host of the allocation, where rank 0 is.
        env["MASTER_ADDR"] = environ.get("SLURMD_NODENAME") or os.uname().nodename
    if "MASTER_PORT" not in environ:
        env["MASTER_PORT"] = str(20000 + int(environ.get("SLURM_JOB_ID", "0")) % 20000)
    return [*argv, *rank_argv[1:]], env
