"""What `lmscale train` does on the hosts of a hostfile by ssh: look at them, bring them the config, leave no process behind."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lmscale.errors import ConfigError
from lmscale.launcher.status import RUN_ID

_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-o", "ServerAliveInterval=3")
_SSH_S = 15.0
_PREPARE_S = 60.0
_SWEEP_S = 8.0
_AT_ONCE = 32
_PACKAGES = ("lmscale", "torch", "deepspeed", "megatron-core")
_NO_SUCH_PROGRAM = 127

Found = TypeVar("Found")


class HostError(ConfigError):
    """A host of the hostfile cannot take its ranks."""


def answers(host: str) -> bool:
    """Tell whether a host takes commands by ssh."""
    done = _ssh(host, "true", timeout_s=_SSH_S)
    return done is not None and done.returncode == 0


@dataclass(frozen=True)
class Addresses:
    """Where the hosts of a run find each other."""

    here: str
    """Of this host, as the first of the others sees it."""
    first: str
    """Of the first host, where rank 0 is."""


def prepare(hosts: Sequence[str], config_file: Path) -> Addresses:
    """Check that every host can take ranks, and write the config there: hosts need not share its directory.

    A host must be reachable by ssh without a password, have this Python at the same path, and the same versions.

    Args:
        hosts: by name.
        config_file: absolute; on this host it is there.

    Raises:
        HostError: naming the first host that cannot, and why.
    """
    text = config_file.read_text()
    ours = _versions()
    found = on_all(hosts, lambda host: _prepare(host, config_file, text, ours))
    here = next((seen.here for seen in found if not _is_loopback(seen.here)), found[0].here)
    # A name that leads this host to itself may lead the others elsewhere.
    return Addresses(here, here if _is_loopback(found[0].first) else found[0].first)


def sweep(hosts: Sequence[str], run_id: str) -> None:
    """Kill every process of a launch on the hosts that answer, found by the mark in their environment."""
    mark = shlex.quote(f"{RUN_ID}={run_id}")
    script = f'for p in /proc/[0-9]*; do grep -qs {mark} "$p/environ" && kill -9 "${{p#/proc/}}"; done; true'
    on_all(hosts, lambda host: _ssh(host, script, timeout_s=_SWEEP_S))


def on_all(hosts: Sequence[str], ask: Callable[[str], Found]) -> list[Found]:
    """Do something for many hosts at once; the first failure, in their order, is raised."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(ask, hosts))


def _prepare(host: str, config_file: Path, text: str, ours: str) -> Addresses:
    directory, final = shlex.quote(str(config_file.parent)), shlex.quote(str(config_file))
    python, program = shlex.quote(sys.executable), shlex.quote(_version_program())
    # The config lies beside its final place first: hosts that share the directory all write it.
    script = (
        f'set -e; echo "$SSH_CONNECTION"; '
        f'mkdir -p {directory}; part={final}.$(hostname).$$; cat > "$part"; mv "$part" {final}; {python} -c {program}'
    )
    done = _ssh(host, script, text, _PREPARE_S)
    if done is None:
        raise _wrong(host, f"has not answered for {_PREPARE_S:g} s", "is there ssh here? On Debian: openssh-client")
    if done.returncode == 255:
        reason = _last(done.stderr) or "ssh failed"
        raise _wrong(
            host, f"cannot be reached by ssh: {reason}", f"ssh {host} must work without a password, or correct the name"
        )
    if done.returncode == _NO_SUCH_PROGRAM:
        raise _wrong(host, f"has no {sys.executable}", "install lmscale at the same path on every host")
    if done.returncode:
        raise _wrong(host, f"cannot take the run: {_last(done.stderr)}")
    # Before them there may be what the host's shell says to everyone.
    lines = done.stdout.splitlines()[-2:]
    ends = lines[0].split() if len(lines) == 2 else []
    if len(ends) != 4:
        said = f"has not answered as an sshd's shell does, but {_last(done.stdout)!r}"
        raise _wrong(host, said, f"see what ssh {host} 'echo $SSH_CONNECTION' prints: two addresses with their ports")
    if lines[1] != ours:
        raise _wrong(host, f"has {_difference(lines[1], ours)}", "install the same versions on every host")
    return Addresses(here=ends[0], first=ends[2])


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _wrong(host: str, rule: str, remedy: str | None = None) -> HostError:
    return HostError(rule, field="--hostfile", value=host, remedy=remedy)


def _versions() -> str:
    return " ".join(
        [f"python={platform.python_version()}", *(f"{name}={importlib.metadata.version(name)}" for name in _PACKAGES)]
    )


def _version_program() -> str:
    """Return a program that prints what `_versions` returns; a package that is missing is none."""
    return (
        "import importlib.metadata as m, platform\n"
        "def v(n):\n"
        " try: return m.version(n)\n"
        " except m.PackageNotFoundError: return 'none'\n"
        f"print(' '.join(['python='+platform.python_version(), *(n+'='+v(n) for n in {_PACKAGES!r})]))"
    )


def _difference(there: str, here: str) -> str:
    pairs = zip(there.split(), here.split(), strict=False)
    return next((f"{theirs} and this host {ours}" for theirs, ours in pairs if theirs != ours), f"versions {there!r}")


def _last(text: str) -> str:
    return text.strip().rpartition("\n")[2].strip()


def _ssh(host: str, script: str, text: str = "", timeout_s: float = _SSH_S) -> subprocess.CompletedProcess[str] | None:
    """Run a script for sh on a host; None where it took too long or there is no ssh."""
    argv = [*_SSH, host, f"sh -c {shlex.quote(script)}"]
    try:
        return subprocess.run(argv, input=text, capture_output=True, text=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
