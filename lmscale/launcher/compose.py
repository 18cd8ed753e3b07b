"""The command line that starts the ranks, for each launcher; the one place that knows it.

The ranks get a single resolved config file and no overrides: pdsh hands brackets and dollar signs to the remote shell.
Where ranks run on several hosts, `Command.on_hosts` says what the launcher starts on each (many_hosts.py), and
`Command.travels` with which variables. Names that look like secrets are taken out of the launcher's environment, so that
no launcher passes them on.
"""

from __future__ import annotations

import os
import shlex
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lmscale.config.run import RunConfig
from lmscale.errors import ConfigError
from lmscale.launcher import many_hosts
from lmscale.launcher.environment import free_port, is_secret, threads_for, travelling, user_exports
from lmscale.launcher.placement import Launcher, Nodes, Placement, place
from lmscale.launcher.shell import HostCommand, remote_python_path, rendezvous_address
from lmscale.launcher.status import RUN_ID, STARTED_AT, STATUS_ADDRESS, STATUS_BY_FILE, STATUS_DIR
from lmscale.launcher.validate import LaunchPlan

__all__ = ["Command", "Launcher", "Nodes", "Placement", "compose", "module_of", "place"]

PRETRAIN, FINETUNE = "lmscale.pretrain", "lmscale.finetune"
_PORT = 29500
"""Where the parts of a torchrun meet that each host starts by itself: the same on each, as torchrun has it."""
_PDSH_SSH = "PDSH_SSH_ARGS_APPEND"
_SAVE_S = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "100"}
"""From TERM to KILL, by torchrun: its 30 s may cut off a save. Shorter than launch/kubernetes.yaml lets a pod have."""
_OWN_STORES = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""torchrun's agents share a store that a host which joins later never learns of; so each start of the ranks has its own."""


@dataclass(frozen=True)
class Command:
    """What to run."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    """Set beside the environment that is there."""
    unset: tuple[str, ...]
    """Taken out of it."""
    travels: Mapping[str, str]
    """What ranks on other hosts get of it; empty on one host."""
    is_local: bool
    """All ranks are processes of this host, below the launcher."""
    passes_usr1: bool = False
    """The launcher hands USR1 to its ranks by itself. (At TERM srun kills them at once, at INT it prints where they are.)"""
    on_hosts: tuple[HostCommand, ...] = ()
    """What the launcher starts on each of several hosts."""
    withheld: tuple[str, ...] = ()
    """Names that the user's .deepspeed_env asks to pass on, and that look like secrets."""
    meets_at: tuple[str, int] | None = None
    """The host of the hostfile, and the port there, at which the ranks meet."""
    reads_env_file: bool = False
    """The launcher takes what travels from the file that DS_ENV_FILE names."""
    is_part: bool = False
    """The ranks of this host alone, of a run that each host joins by itself."""
    hosts: tuple[str, ...] = ()
    """Of the hostfile."""

    @property
    def rank_hosts(self) -> tuple[str, ...]:
        """The host of each rank, in their order, where there is a hostfile."""
        return tuple(each.host for each in self.on_hosts for _ in range(each.num_ranks or 0)) if self.hosts else ()

    def show(self) -> str:
        """Render as a line for a shell."""
        unset = [f"-u {name}" for name in self.unset if name in os.environ]
        words = ["env", *unset] if unset else []
        return " ".join([*words, *(f"{name}={shlex.quote(v)}" for name, v in self.env.items()), shlex.join(self.argv)])

    def show_hosts(self) -> str:
        """Render what runs on each of several hosts, as comments of a shell; empty for one host."""
        names = sorted(self.travels)
        environ = [f"#   {name}={shlex.quote(self.travels[name])}" for name in names]
        environ += [f"#   {STATUS_ADDRESS}=(where this command listens, known at the start)"] if self.hosts else []
        lines = []
        for each in self.on_hosts:
            count = "" if each.num_ranks is None else f", {each.num_ranks} rank{'s' * (each.num_ranks != 1)}"
            lines += [f"# on {each.host}{count}, with", *environ, f"#   {each.line}"]
        return "\n".join(lines)


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
        ConfigError: if the launcher cannot address the devices, or cannot pass on a variable or a path.
    """
    assert plan.num_ranks == placement.num_ranks
    busiest = max(map(placement.slots, placement.hosts), default=placement.ranks_per_host or placement.num_ranks)
    if placement.nodes is not None:
        busiest = placement.num_ranks // placement.nodes.most
    env = {RUN_ID: uuid.uuid4().hex}
    if STARTED_AT in environ:
        env[STARTED_AT] = environ[STARTED_AT]
    if not placement.cuda_devices:
        env["DS_ACCELERATOR"] = "cpu"
    if "OMP_NUM_THREADS" not in environ:
        env["OMP_NUM_THREADS"] = str(threads_for(busiest))
    rank_argv = ["--module", module_of(plan.config), "--config", str(config_file)]
    if placement.hosts:
        return _on_hosts(placement, rank_argv, env, environ)
    if placement.launcher == "slurm":
        return _in_slurm(placement, rank_argv, env, environ)
    # A rank's identity left over from an outer launch would make the launcher itself look like a rank.
    unset = ["RANK", "LOCAL_RANK", "WORLD_SIZE"]
    if placement.nodes is not None:
        argv = [_program("torchrun"), *many_hosts.node_options(placement, _PORT, plan.config.output_dir), *rank_argv]
        nodes = placement.nodes
        where = "each host" if nodes.rank is None else f"host {nodes.rank} of {nodes.most}"
        here = HostCommand(where, busiest, shlex.join(argv))
        ours = _SAVE_S | (_OWN_STORES if nodes.is_elastic else {})
        env |= {name: value for name, value in ours.items() if name not in environ}
        travels = travelling({**environ, **env})
        # A supervisor of an outer launch cannot hear the ranks of all hosts.
        unset += [STATUS_DIR, STATUS_ADDRESS, STATUS_BY_FILE]
        return Command(tuple(argv), env, tuple(unset), travels, is_local=False, on_hosts=(here,), is_part=True)
    port = str(placement.master_port or free_port())
    if placement.launcher == "torchrun":
        argv = [_program("torchrun"), f"--nproc_per_node={placement.num_ranks}", f"--master_port={port}", *rank_argv]
    else:
        # It warns of each run without a hostfile.
        options = [*_local_devices(placement, environ), "--master_port", port, "--log_level", "error"]
        argv = [_program("deepspeed"), *options, *rank_argv]
        unset += ["CUDA_VISIBLE_DEVICES"] if placement.cuda_devices else []
    return Command(tuple(argv), env, tuple(unset), {}, is_local=True)


def module_of(config: RunConfig) -> str:
    """Return the module that the ranks run."""
    return PRETRAIN if config.adapt is None and config.task is None else FINETUNE


def _on_hosts(placement: Placement, rank_argv: list[str], env: dict[str, str], environ: Mapping[str, str]) -> Command:
    """Compose for the hosts of a hostfile."""
    first = placement.hosts[0].name
    address = placement.master_addr or rendezvous_address(first, is_alone=len(placement.hosts) == 1)
    meeting = many_hosts.Meeting(address, placement.master_port or free_port())
    asked = user_exports(environ)
    env["PYTHONPATH"] = remote_python_path(environ)
    unset = ("RANK", "LOCAL_RANK", "WORLD_SIZE", STATUS_DIR, *sorted(filter(is_secret, environ)))
    inherited = {name: value for name, value in environ.items() if name not in unset}
    travels = travelling(inherited) | env | {name: value for name, value in asked.items() if not is_secret(name)}
    travels[STATUS_BY_FILE] = "1"
    build = {"openmpi": many_hosts.openmpi, "mpich": many_hosts.mpich, "torchrun": many_hosts.torchrun_over_ssh}
    reads_env_file = placement.launcher not in build
    if reads_env_file:
        travels = many_hosts.deepspeed_exports(inherited) | travels
        many_hosts.check_pdsh(rank_argv, travels)
        # ssh would wait for ever for a host that falls silent before its ranks are there.
        env[_PDSH_SSH] = f"{environ.get(_PDSH_SSH, '')} -o ServerAliveInterval=5 -o ServerAliveCountMax=4".strip()
        argv, on_hosts = many_hosts.deepspeed(_program("deepspeed"), placement, rank_argv, meeting)
        del env["PYTHONPATH"]  # DeepSpeed puts the working directory before it, once more
    else:
        travels |= meeting.environ
        argv, on_hosts = build[placement.launcher](placement, rank_argv, meeting, [*travels, STATUS_ADDRESS])
        env |= travels  # where these launchers look for the values
    return Command(
        tuple(argv),
        env,
        unset,
        travels,
        is_local=False,
        hosts=tuple(host.name for host in placement.hosts),
        on_hosts=tuple(on_hosts),
        withheld=tuple(sorted(filter(is_secret, asked))),
        meets_at=(first, meeting.port),
        reads_env_file=reads_env_file,
    )


def _in_slurm(placement: Placement, rank_argv: list[str], env: dict[str, str], environ: Mapping[str, str]) -> Command:
    """Compose for the hosts of Slurm's allocation, which get the whole environment but for secrets."""
    env |= many_hosts.slurm_meeting(placement, environ)
    unset = ("RANK", "LOCAL_RANK", "WORLD_SIZE", *sorted(filter(is_secret, environ)))
    argv, on_hosts = many_hosts.slurm(placement, rank_argv, environ)
    travels = travelling(environ) | env
    return Command(tuple(argv), env, unset, travels, False, passes_usr1=True, on_hosts=tuple(on_hosts))


def _program(name: str) -> str:
    """Prefer the script beside our own Python: the console command works without an activated environment."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else name


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
