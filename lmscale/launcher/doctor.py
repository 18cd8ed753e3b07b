"""What this machine has and lacks for training: `lmscale doctor`."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from lmscale.config.implementation import choose_implementation
from lmscale.config.nvidia_apex import apex_problem
from lmscale.config.optim import OptimConfig
from lmscale.config.run import ZeroChoice
from lmscale.launcher.environment import visible_devices
from lmscale.parallel.op_builds import builds_directory

_GIB = 1 << 30
_REQUIRED = ("torch", "deepspeed", "megatron-core", "sentencepiece")
_SCRIPTS = ("deepspeed", "torchrun")
_MIN_DISK_GIB = 10.0
_MIN_SHM_GIB = 1.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: Literal["ok", "missing", "note"]
    """missing: training needs it; note: worth knowing, or optional."""
    value: str
    remedy: str = ""


def examine() -> Iterator[Finding]:
    """Look at everything that `lmscale doctor` shows, one finding at a time; importing torch takes some seconds."""
    yield Finding("python", "ok", f"{platform.python_version()} at {sys.executable}")
    yield from (_version(name) for name in _REQUIRED)
    yield _devices()
    yield _apex()
    yield _optimizer()
    yield from _op_builder()
    yield from (_program(name, "missing", "pip install lmscale, in this environment") for name in _SCRIPTS)
    yield from _several_hosts()
    yield from _space()


def _version(distribution: str) -> Finding:
    try:
        return Finding(distribution, "ok", metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return Finding(distribution, "missing", "not installed", f"pip install {distribution}")


def _devices() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("devices", "missing", f"torch does not import: {error}", "pip install torch")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        return Finding("devices", "ok", f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}")
    cores = f"{len(os.sched_getaffinity(0))} CPU cores"
    present = visible_devices(os.environ)
    if present is not None:
        remedy = "install a CUDA build of torch that fits the driver (nvidia-smi shows it)"
        return Finding(
            "devices", "missing", f"{len(present)} CUDA devices that torch {torch.__version__} cannot use", remedy
        )
    return Finding("devices", "ok", f"{cores}, no CUDA device: ranks run on the CPU over gloo")


def _apex() -> Finding:
    """Tell NVIDIA's apex from the package of that name on PyPI, which is a toolkit for web pages."""
    problems = {part: apex_problem(part) for part in ("adam", "norms")}
    if problems["adam"] is None:
        norms = "and fused norms" if problems["norms"] is None else f"no fused norms: {problems['norms']}"
        return Finding("apex", "ok", f"NVIDIA's, with FusedAdam, {norms}")
    remedy = "optional; built from NVIDIA's source"
    if "PyPI" in problems["adam"]:
        remedy = "pip uninstall apex; NVIDIA's is built from its source"
    return Finding("apex", "note", problems["adam"], remedy)


def _optimizer() -> Finding:
    """Say whose Adam optim.implementation: auto takes here."""
    has_gpu = visible_devices(os.environ) is not None
    chosen = choose_implementation(OptimConfig(lr=1.0), ZeroChoice(stage=1), has_gpu=has_gpu)
    offloaded = choose_implementation(OptimConfig(lr=1.0), ZeroChoice(stage=1, offload_optimizer=True), has_gpu=has_gpu)
    return Finding("adam, adamw", "ok", f"{chosen.name}: {chosen.because}; {offloaded.name} where {offloaded.because}")


def _op_builder() -> Iterator[Finding]:
    compiler = os.environ.get("CXX", "c++")
    yield _program(compiler, "missing", "a C++ compiler; on Debian: apt-get install g++", "C++ compiler")
    yield _program("ninja", "missing", "pip install ninja")
    header = Path(importlib.import_module("sysconfig").get_paths()["include"]) / "Python.h"
    if header.is_file():
        yield Finding("python headers", "ok", str(header))
    else:
        yield Finding("python headers", "missing", f"no {header}", "on Debian: apt-get install python3-dev")
    yield _compiled_ops(builds_directory())


def _compiled_ops(root: Path) -> Finding:
    locked = next(root.glob("**/lock"), None)
    if locked is not None:
        # Our ranks build under a lock of the kernel; other programs wait for torch's, which a killed builder leaves behind.
        value = f"{locked.parent.name} is locked: another program compiles it, or was cut off"
        return Finding("DeepSpeed ops", "note", value, f"if no ninja runs: rm {locked}")
    names = sorted({path.stem for path in root.glob("**/*.so")})
    if names:
        return Finding("DeepSpeed ops", "ok", f"{', '.join(names)} compiled in {root}")
    return Finding("DeepSpeed ops", "note", f"none in {root}", "the first run compiles them, half a minute, once")


def _several_hosts() -> Iterator[Finding]:
    yield _program("ssh", "note", "for --hostfile; on Debian: apt-get install openssh-client")
    yield _program("pdsh", "note", "for --hostfile; on Debian: apt-get install pdsh")


def _program(name: str, absent: Literal["missing", "note"], remedy: str, label: str | None = None) -> Finding:
    beside = Path(sys.executable).with_name(name)
    found = shutil.which(name) or (str(beside) if beside.exists() else None)
    return Finding(label or name, absent, "not found", remedy) if found is None else Finding(label or name, "ok", found)


def _space() -> Iterator[Finding]:
    disk = shutil.disk_usage(Path.cwd()).free / _GIB
    enough = disk >= _MIN_DISK_GIB
    remedy = "" if enough else "a checkpoint takes about 14 bytes for each parameter"
    yield Finding("disk here", "ok" if enough else "note", f"{disk:.1f} GiB free", remedy)
    shm = Path("/dev/shm")
    size = shutil.disk_usage(shm).free / _GIB if shm.is_dir() else 0.0
    enough = size >= _MIN_SHM_GIB
    remedy = "" if enough else "in a container: --shm-size=8g; ranks and data workers meet there"
    yield Finding("/dev/shm", "ok" if enough else "note", f"{size:.1f} GiB free", remedy)
