"""What a host of tools/cluster.py runs first, in namespaces of its own: it makes them a host, and stays as its process 1.

    python cluster_host.py HOST.json

The host sees the machine's files, but for these: /tmp, /var/tmp, /run, /dev/shm, ~/.ssh and the directories that are to be
private are its own; /etc/hosts, /etc/hostname and /etc/ssh/ssh_config are the cluster's. When this process ends, the kernel
ends all others of the host and removes its namespaces, mounts and interfaces.
"""

from __future__ import annotations

import json
import os
import pwd
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

CLUSTER = Path("/run/cluster")
"""Where a host sees the cluster's files."""


def call(*argv: str | Path) -> None:
    """Run a command that must not fail."""
    subprocess.run([str(word) for word in argv], check=True)


def bind(source: Path, target: Path) -> None:
    """Show a file or directory of the cluster at another place."""
    call("mount", "--bind", source, target)


def mount_all(spec: dict[str, Any]) -> None:
    """Give the host what is its own, and then again what hosts share below it."""
    held = [(Path(path), Path(f"/run/shared-{number}")) for number, path in enumerate(spec["shared"])]
    call("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    for path, place in [(Path(spec["cluster"]), CLUSTER), *held]:  # before a private /tmp hides them
        bind(path, _made(place))
    home = CLUSTER / "hosts" / spec["name"]
    for path in map(Path, spec["private"]):
        bind(_made(home / "files" / path.relative_to("/"), path), path)
    for path, place in held:
        bind(place, _made(path))
    call("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/dev/shm")
    Path("/run/sshd").mkdir()
    ssh = Path(pwd.getpwuid(os.getuid()).pw_dir, ".ssh")
    if ssh.is_dir():  # the user's keys and settings are none of the cluster's
        call("mount", "-t", "tmpfs", "-o", "mode=700", "tmpfs", ssh)
    bind(CLUSTER / "etc-hosts", Path("/etc/hosts"))
    bind(CLUSTER / "ssh_config", Path("/etc/ssh/ssh_config"))
    if Path("/etc/hostname").is_file():
        (home / "hostname").write_text(spec["name"] + "\n")
        bind(home / "hostname", Path("/etc/hostname"))


def _made(path: Path, like: Path | None = None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    if like is not None:
        path.chmod(like.stat().st_mode & 0o7777)
    return path


def main() -> int:
    """Make the host, start its sshd, and look after processes until that ends."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    sys.stdin.readline()  # until the machine has given this host its interface
    socket.sethostname(spec["name"])
    mount_all(spec)
    call("ip", "link", "set", "lo", "up")
    call("ip", "address", "add", f"{spec['address']}/24", "dev", "eth0")
    call("ip", "link", "set", "eth0", "up")
    sshd = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", str(CLUSTER / "sshd_config")])
    while True:  # processes whose parent is gone come to process 1
        pid, status = os.wait()
        if pid == sshd.pid:
            return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main())
