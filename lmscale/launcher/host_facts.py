"""What a host is, told to another one as JSON: `python -m lmscale.launcher.host_facts DIRECTORY [PREFIX ...]`.

Each line of standard input is answered with this host's time, so that the asker can compare clocks; at its end come the
facts. No torch: a host answers in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import ipaddress
import json
import os
import platform
import shutil
import socket
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lmscale.errors import LmscaleError
from lmscale.launcher.environment import free_port, visible_devices

PACKAGES = ("lmscale", "torch", "deepspeed", "megatron-core")
_PACKAGE_DIR = Path(__file__).parents[1]
_SIOCGIFADDR = 0x8915
_AVOIDED = ("lo", "docker")


def gather(directory: Path, prefixes: Sequence[str], environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Gather what must agree between the hosts of a run, and what must suffice.

    Args:
        directory: whose disk the run writes to; the nearest one that is there is looked at.
        prefixes: of corpora, to hash.
        environ: names interfaces and devices.
    """
    there = next(path for path in (directory, *directory.parents) if path.exists())
    shm = Path("/dev/shm")
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "code": code_hash(),
        "disk_free_bytes": shutil.disk_usage(there).free,
        "shm_free_bytes": shutil.disk_usage(shm).free if shm.is_dir() else 0,
        "num_devices": len(visible_devices(environ) or ()),
        "gloo": gloo_interface(environ),
        "nccl": nccl_interface(environ),
        "free_port": free_port(),
        "data": {prefix: _content(prefix) for prefix in prefixes},
    }


def code_hash(directory: Path = _PACKAGE_DIR) -> str:
    """Hash the names and the contents of lmscale's own modules."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*.py")):
        digest.update(f"{path.relative_to(directory)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def interfaces() -> dict[str, str]:
    """Return the IPv4 address of each network interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                reply = fcntl.ioctl(asker, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found[name] = socket.inet_ntoa(reply[20:24])
    return found


def gloo_interface(environ: Mapping[str, str], known: Mapping[str, str] | None = None) -> dict[str, str | None]:
    """Find the interface that gloo takes: the one that is named, or that of the host name's address.

    Source: torch.distributed.ProcessGroupGloo, createDefaultDevice.
    """
    known = interfaces() if known is None else known
    named = environ.get("GLOO_SOCKET_IFNAME")
    if named:
        first = named.split(",")[0]
        return {"interface": first, "address": known.get(first)}
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "127.0.0.1"  # as gloo does
    is_loopback = ipaddress.ip_address(address).is_loopback
    name = next((each for each, at in known.items() if at == address), "lo" if is_loopback else None)
    return {"interface": name, "address": address}


def nccl_interface(environ: Mapping[str, str], known: Mapping[str, str] | None = None) -> dict[str, str | None]:
    """Find the interface that NCCL bootstraps over: as NCCL_SOCKET_IFNAME says, or ib* first and loopback last.

    Source: NCCL's documentation of NCCL_SOCKET_IFNAME: names are beginnings, "=" makes them whole, "^" excludes.
    """
    known = interfaces() if known is None else known
    rule = environ.get("NCCL_SOCKET_IFNAME", "")
    names = list(known)
    if rule:
        parts = tuple(part for part in rule.lstrip("^=").split(",") if part)
        is_whole = "=" in rule[:2]
        hits = [name for name in names if (name in parts if is_whole else name.startswith(parts))]
        names = [name for name in names if name not in hits] if rule.startswith("^") else hits
    else:
        names.sort(key=lambda name: (not name.startswith("ib"), name.startswith(_AVOIDED[1]), name == _AVOIDED[0]))
    return {"interface": names[0] if names else None, "address": known[names[0]] if names else None}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _content(prefix: str) -> dict[str, str | None]:
    from lmscale.data.indexed import IndexedCorpus

    try:
        return {"hash": IndexedCorpus(prefix).content_hash, "problem": None}
    except (LmscaleError, OSError) as error:
        return {"hash": None, "problem": str(error)}


def main(arguments: Sequence[str]) -> int:
    """Answer with the time until standard input ends, and then with the facts."""
    while sys.stdin.readline():
        sys.stdout.write(f"{time.time()!r}\n")
        sys.stdout.flush()
    sys.stdout.write(json.dumps(gather(Path(arguments[0]), arguments[1:])) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
