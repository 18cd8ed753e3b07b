"""The ranks' environment: who is which rank, how many threads each may use, and what has to travel to other hosts."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from lmscale.errors import ConfigError

_RANK_NAMES = {
    "RANK": ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"),
    "LOCAL_RANK": ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"),
    "WORLD_SIZE": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS"),
    "LOCAL_WORLD_SIZE": ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE"),
}

_TRAVELS = re.compile(
    r"^(NCCL_|GLOO_|UCX_|FI_|OMP_NUM_THREADS$|DS_ACCELERATOR$|LMSCALE_|TORCH_EXTENSIONS_DIR$|TORCH_NCCL_|TRITON_CACHE_DIR$"
    r"|CUDA_DEVICE_MAX_CONNECTIONS$|CUBLAS_WORKSPACE_CONFIG$|TOKENIZERS_PARALLELISM$|HF_HOME$|HF_HUB_OFFLINE$|PYTORCH_)"
)
_SECRET = re.compile(
    r"TOKEN(?!IZERS)|SECRET|PASSWORD|PASSWD|PASSPHRASE|PASSFILE|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|JWT"
    r"|_(KEYS?|PASS|PAT|AUTH)$",  # at the end alone: NCCL_PAT_ENABLE chooses an algorithm
    re.IGNORECASE,
)
_ENV_FILE = ".deepspeed_env"
"""DeepSpeed's name of the user's file of variables for the other hosts, in the home and in the working directory."""


def adopt_rank(environ: MutableMapping[str, str] = os.environ) -> None:
    """Fill in RANK, LOCAL_RANK and WORLD_SIZE where srun or mpirun started this process and named them otherwise.

    A process that no launcher started is a run's only rank; DeepSpeed would ask MPI.
    """
    for name, sources in _RANK_NAMES.items():
        given = next((environ[source] for source in sources if source in environ), None)
        if name not in environ and given is not None:
            environ[name] = given
    if not {"RANK", "WORLD_SIZE"} & environ.keys():
        environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))


def is_secret(name: str) -> bool:
    """Tell whether a variable's name looks like that of a secret: its value goes to no other host, and is never shown."""
    return _SECRET.search(name) is not None


def travelling(environ: Mapping[str, str]) -> dict[str, str]:
    """Select what ranks on other hosts need of an environment: communication, devices, caches; never a secret."""
    return {name: value for name, value in environ.items() if _TRAVELS.match(name) and not is_secret(name)}


def user_exports(environ: Mapping[str, str]) -> dict[str, str]:
    """Read what the user's files .deepspeed_env name for the other hosts, one NAME=value to a line; secrets too.

    The working directory's file outweighs the one in the home directory. DS_ENV_FILE gives another name, as for DeepSpeed.
    """
    variables: dict[str, str] = {}
    for directory in (Path.home(), Path.cwd()):
        try:
            lines = (directory / environ.get("DS_ENV_FILE", _ENV_FILE)).read_text().splitlines()
        except (OSError, UnicodeDecodeError):
            continue
        pairs = (line.partition("=") for line in lines)
        variables |= {name.strip(): value.strip() for name, equals, value in pairs if equals}
    return variables


def slurm_number(environ: Mapping[str, str], name: str) -> int | None:
    """Read one of the numbers that Slurm gives a job; None where it gives none.

    Raises:
        ConfigError: if it is not a positive number.
    """
    text = environ.get(name)
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError("must be a number above 0", field=name, value=text, remedy="it is Slurm's: do not set it")
    return int(text)


def visible_devices(environ: Mapping[str, str], device_directory: Path = Path("/dev")) -> list[str] | None:
    """List the CUDA devices of this host without importing torch; None where there is no such device.

    What CUDA_VISIBLE_DEVICES names, or else every /dev/nvidiaN.
    """
    if environ.get("DS_ACCELERATOR") == "cpu":
        return None
    nodes = sorted(path.name.removeprefix("nvidia") for path in device_directory.glob("nvidia[0-9]*"))
    if not nodes:
        return None
    if "CUDA_VISIBLE_DEVICES" in environ:
        return [name.strip() for name in environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()] or None
    return [str(number) for number in range(len(nodes))]


def threads_for(num_ranks: int) -> int:
    """Compute the threads of each of num_ranks ranks on this host: an even share of the cores, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // num_ranks)


def free_port() -> int:
    """Find a TCP port that nobody listens on, so that two runs on one host do not meet on the launcher's fixed one."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def is_free_port(port: int) -> bool:
    """Tell whether a TCP port of this host can be listened on."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        # A port whose last connections are still fading away can be had, as the ranks' store has it.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError:
            return False
    return True


def is_of_this_host(address: str) -> bool:
    """Tell whether a name or an address is one of this host's own: only then it can be listened at."""
    try:
        found = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, protocol, _, at in found:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as listener:
            listener.bind(at)
            return True
    return False
