"""A shell line for another host, and what ssh makes of a host's name."""

from __future__ import annotations

import ipaddress
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from lmscale.errors import ConfigError

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5")
"""Asks nothing, and gives up soon."""
SSH_FAILED, NO_SUCH_PROGRAM = 255, 127
"""Statuses: of ssh where it does not come through, of a shell where it does not find what it should run."""
_CONFIG_S = 5.0
_PORT_S = 15.0


class HostError(ConfigError):
    """A host of the hostfile cannot take its ranks."""


class PortError(HostError):
    """The port at which the ranks were to meet is taken on that host."""


@dataclass(frozen=True)
class HostCommand:
    """What the launcher starts on a host."""

    host: str
    num_ranks: int | None
    """None where it is not known before the start."""
    line: str
    """For that host's shell, without the variables that travel."""


def with_exports(line: str, environ: Mapping[str, str]) -> str:
    """Put variables before a line for a remote shell."""
    exports = [f"{name}={shlex.quote(value)}" for name, value in environ.items()]
    return f"export {' '.join(exports)}; {line}" if exports else line


def remote_python_path(environ: Mapping[str, str]) -> str:
    """Return the PYTHONPATH of the other hosts, as DeepSpeed's launcher makes it: the working directory comes first."""
    return ":".join([os.getcwd(), *filter(None, [environ.get("PYTHONPATH")])])


def python_module(name: str, *arguments: str) -> list[str]:
    """Compose the command line of a module, for the Python that is at this one's path on the other host."""
    return [sys.executable, "-u", "-m", name, *arguments]


def python_line(module: str, *arguments: str) -> str:
    """Compose a line that runs a module on another host, in this working directory."""
    return f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(python_module(module, *arguments))}"


def check_port(host: str, port: int) -> None:
    """Check that ranks can meet at a port of a host that is known to answer.

    Raises:
        PortError: if somebody listens there already.
    """
    # As the ranks' store binds it; torch does not tell whose port it was before it gives up.
    program = f"import socket as s; l = s.socket(); l.setsockopt(s.SOL_SOCKET, s.SO_REUSEADDR, 1); l.bind(('', {port}))"
    line = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(program)}"
    try:
        argv, nothing = [*SSH, host, line], subprocess.DEVNULL  # ssh would take what a caller's script has yet to read
        done = subprocess.run(argv, stdin=nothing, capture_output=True, text=True, timeout=_PORT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return
    if "Address already in use" in done.stderr or "Permission denied" in done.stderr:
        reason = done.stderr.strip().rpartition("] ")[2].lower()
        remedy = "name another one, or end what listens there"
        raise PortError(f"cannot be used on {host}: {reason}", field="--master-port", value=port, remedy=remedy)


def ssh_remedy(host: str, said: str) -> str:
    """Say what to do where ssh does not come through to a host.

    Args:
        host: its name.
        said: ssh's last line.
    """
    if "Permission denied" in said:
        return f"it must work without a password: ssh-copy-id {host}"
    if "Host key verification failed" in said:
        return f"call ssh {host} once by hand, and accept its key"
    return "correct the name, or start the host and its sshd"


def rendezvous_address(first: str, is_alone: bool) -> str:
    """Return the name by which every host reaches the first one.

    A name of the user's ~/.ssh/config becomes what it stands for: the ranks do not read that file. A loopback name means
    another host to each, and becomes this host's own.

    Args:
        first: as in the hostfile.
        is_alone: there is no other host.
    """
    name = _ssh_host_name(first)
    return socket.gethostname() if is_loopback(name) and not is_alone else name


def is_loopback(name: str) -> bool:
    """Tell whether a host's name or address is that of every host's own loopback interface."""
    if name in {"localhost", "ip6-localhost"}:
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _ssh_host_name(name: str) -> str:
    """Ask ssh what it would connect to; it reads its files, and connects to nothing."""
    command = ["ssh", "-G", name]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=_CONFIG_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return name.rpartition("@")[2]
    found = (line.partition(" ") for line in shown.splitlines())
    return next((value for key, _, value in found if key == "hostname" and value), name)
