"""What a device of a run has for tensors, without torch: by its type's name, by nvidia-smi, or the host's memory."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

from lmscale.launcher.compose import Placement
from lmscale.plan.device_types import device_type
from lmscale.plan.search import CONTEXT_BYTES, usable_bytes

_TIMEOUT_S = 10.0
_MIB = 2**20


@dataclass(frozen=True)
class Capacity:
    """A device and its memory."""

    name: str
    num_bytes: float
    is_cpu: bool = False


def device_capacity(placement: Placement, type_name: str | None = None) -> Capacity | None:
    """Find what each rank of a run can hold.

    Args:
        placement: where the ranks go.
        type_name: a device type of `lmscale plan`, or a YAML file; left out, this host's devices stand for all hosts'.

    Returns:
        None where it is not known: this host has GPUs that nvidia-smi does not describe, or ranks run on other hosts
        and this one has no GPU.

    Raises:
        ConfigError: if there is no such type.
    """
    if type_name is not None:
        kind = device_type(type_name)
        return Capacity(kind.name, usable_bytes(kind), kind.name == "cpu")
    if placement.cuda_devices:
        return _first_gpu()
    if placement.hosts or placement.launcher == "slurm":
        return None
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    here = placement.num_ranks if placement.nodes is None else placement.num_ranks // placement.nodes.most
    return Capacity("this host's share", total / here, is_cpu=True)


def _first_gpu() -> Capacity | None:
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S).stdout
        name, _, mebibytes = found.splitlines()[0].rpartition(",")
        return Capacity(name.strip(), float(mebibytes) * _MIB - CONTEXT_BYTES)
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None
