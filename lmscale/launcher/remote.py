"""What `lmscale train` does on the hosts of a hostfile by ssh: look at them, bring them the config, leave no process behind."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from lmscale.launcher.host_facts import PACKAGES
from lmscale.launcher.shell import NO_SUCH_PROGRAM, SSH, SSH_FAILED, HostError, is_loopback, ssh_remedy
from lmscale.launcher.status import RUN_ID

_ALIVE = ("-o", "ServerAliveInterval=3")
_SSH_S = 15.0
_PREPARE_S = 60.0
_SWEEP_S = 8.0
_AT_ONCE = 32

Found = TypeVar("Found")


def answers(host: str) -> bool:
    """Tell whether a host takes commands by ssh."""
    done = _ssh(host, "true", timeout_s=_SSH_S)
    return done is not None and done.returncode == 0


def prepare(hosts: Sequence[str], config_file: Path) -> str:
    """Check that every host can take ranks, and write the config there: hosts need not share its directory.

    A host must be reachable by ssh without a password, have this Python at the same path, and the same versions.

    Args:
        hosts: by name.
        config_file: absolute; on this host it is there.

    Returns:
        This host's address, as the first of the others sees it.

    Raises:
        HostError: naming the first host that cannot, and why.
    """
    text = config_file.read_text()
    ours = _versions()
    seen = on_all(hosts, lambda host: _prepare(host, config_file, text, ours))
    return next((address for address in seen if not is_loopback(address)), seen[0])


def sweep(hosts: Sequence[str], run_id: str) -> None:
    """Kill every process of a launch on the hosts that answer, found by the mark in their environment."""
    mark = shlex.quote(f"{RUN_ID}={run_id}")
    script = f'for p in /proc/[0-9]*; do grep -qs {mark} "$p/environ" && kill -9 "${{p#/proc/}}"; done; true'
    on_all(hosts, lambda host: _ssh(host, script, timeout_s=_SWEEP_S))


def on_all(hosts: Sequence[str], ask: Callable[[str], Found]) -> list[Found]:
    """Do something for many hosts at once; the first failure, in their order, is raised."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(ask, hosts))


def _prepare(host: str, config_file: Path, text: str, ours: str) -> str:
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
    if done.returncode == SSH_FAILED:
        reason = _last(done.stderr) or "ssh failed"
        raise _wrong(host, f"cannot be reached by ssh: {reason}", ssh_remedy(host, reason))
    if done.returncode == NO_SUCH_PROGRAM:
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
    return ends[0]


def _wrong(host: str, rule: str, remedy: str | None = None) -> HostError:
    return HostError(rule, field="--hostfile", value=host, remedy=remedy)


def _versions() -> str:
    return " ".join(
        [f"python={platform.python_version()}", *(f"{name}={importlib.metadata.version(name)}" for name in PACKAGES)]
    )


def _version_program() -> str:
    """Return a program that prints what `_versions` returns; a package that is missing is none."""
    return (
        "import importlib.metadata as m, platform\n"
        "def v(n):\n"
        " try: return m.version(n)\n"
        " except m.PackageNotFoundError: return 'none'\n"
        f"print(' '.join(['python='+platform.python_version(), *(n+'='+v(n) for n in {PACKAGES!r})]))"
    )


def _difference(there: str, here: str) -> str:
    pairs = zip(there.split(), here.split(), strict=False)
    return next((f"{theirs} and this host {ours}" for theirs, ours in pairs if theirs != ours), f"versions {there!r}")


def _last(text: str) -> str:
    return text.strip().rpartition("\n")[2].strip()


def _ssh(host: str, script: str, text: str = "", timeout_s: float = _SSH_S) -> subprocess.CompletedProcess[str] | None:
    """Run a script for sh on a host; None where it took too long or there is no ssh."""
    argv = [*SSH, *_ALIVE, host, f"sh -c {shlex.quote(script)}"]
    try:
        return subprocess.run(argv, input=text, capture_output=True, text=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
