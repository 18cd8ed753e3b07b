"""A run on fewer ranks than before: what is left, and how many of it the run can use."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from lmscale.config.check import dp_size_of
from lmscale.config.run import RunConfig
from lmscale.errors import ConfigError
from lmscale.launcher.compose import Placement
from lmscale.launcher.hosts import Host
from lmscale.launcher.remote import answers, on_all

HOSTFILE = "hostfile.elastic"
"""Under the run's directory: the hosts that a restart goes on with."""
_CONFIG_S = 5.0
_CONNECT_S = 2.0
"""Time for a packet that was lost to be sent again."""


def largest_legal(config: RunConfig, most: int, least: int = 1) -> int | None:
    """Return the largest number of ranks, between two, over which the layout and the batch divide; None without one."""
    for num_ranks in range(most, max(0, least - 1), -1):
        try:
            dp_size_of(config, num_ranks)
        except ConfigError:
            continue
        return num_ranks
    return None


def shrink(
    config: RunConfig,
    placement: Placement,
    lost: Collection[int],
    min_devices: int = 1,
    is_up: Callable[[str], bool] | None = None,
) -> Placement | None:
    """Place a run on what is left.

    Without a hostfile: as many ranks fewer as were lost, without their devices. With one: without the hosts that do not
    answer; a rank that was lost on a host that does may have it again.

    Args:
        config: the run.
        placement: where it was.
        lost: ranks whose process died or did not answer.
        min_devices: ranks that it must have.
        is_up: asks a host; ssh does, where its port takes a connection.

    Returns:
        The same placement where nothing is missing; None where what is left is too little.
    """
    if placement.hosts:
        return _without_hosts(config, placement, min_devices, is_up or _is_up)
    if not lost:
        return placement
    num_ranks = largest_legal(config, placement.num_ranks - len(lost), min_devices)
    if num_ranks is None:
        return None
    devices = tuple(device for number, device in enumerate(placement.cuda_devices) if number not in lost)
    return replace(placement, num_ranks=num_ranks, ranks_per_host=num_ranks, cuda_devices=devices)


def _is_up(host: str) -> bool:
    return _connects(host) and answers(host)


def _connects(host: str) -> bool:
    """Tell whether a host's port for ssh may be reached.

    A kernel takes a connection at once, however busy its host is; ssh waits longer for a host that is gone. Whatever else
    stands in the way is for ssh to say, and so is all of it where a connection goes through another host.
    """
    try:
        shown = subprocess.run(
            ["ssh", "-G", host], capture_output=True, text=True, timeout=_CONFIG_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return True
    settings = {key: value for key, _, value in (line.partition(" ") for line in shown.splitlines())}
    if not {"hostname", "port"} <= settings.keys() or {"proxyjump", "proxycommand"} & settings.keys():
        return True
    try:
        socket.create_connection((settings["hostname"], int(settings["port"])), _CONNECT_S).close()
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def _without_hosts(
    config: RunConfig, placement: Placement, min_devices: int, is_up: Callable[[str], bool]
) -> Placement | None:
    up = on_all([host.name for host in placement.hosts], is_up)
    if all(up):
        return placement
    hosts = [
        Host(host.name, placement.ranks_per_host or host.slots)
        for host, is_there in zip(placement.hosts, up, strict=True)
        if is_there
    ]
    num_ranks = largest_legal(config, sum(host.slots for host in hosts), min_devices)
    if num_ranks is None:
        return None
    left, used = num_ranks, []
    for host in hosts:
        if left:
            used.append(Host(host.name, min(left, host.slots)))
            left -= used[-1].slots
    path = Path(config.output_dir).absolute() / HOSTFILE
    path.write_text("".join(f"{host.name} slots={host.slots}\n" for host in used))
    return replace(placement, hostfile=str(path), hosts=tuple(used), ranks_per_host=None, num_ranks=num_ranks)
