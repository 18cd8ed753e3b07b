"""The hosts of tools/cluster.py: namespaces, a switch between them, their faults, and their end."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

DIRECTORY = Path("/var/lib/lmscale-cluster")
PACKAGES = {"ip": "iproute2", "tc": "iproute2", "/usr/sbin/sshd": "openssh-server", "ssh": "openssh-client"}
PACKAGES |= {"ssh-keygen": "openssh-client", "pdsh": "pdsh", "nft": "nftables", "unshare": "util-linux"}
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
"""Where Debian has the programs of the administrator too."""
_PROBE = (
    "ip link add switch type bridge && ip link add name eth0 type veth peer name host-1 && mount -t tmpfs tmpfs /run"
)
_PROBE_FAULTS = (
    "ip link add name eth0 type veth peer name host-1",
    "tc qdisc add dev eth0 root tbf rate 1mbit burst 256kb latency 400ms",
    "nft add table inet lossy",
    "nft 'add chain inet lossy input { type filter hook input priority 0; }'",
    "nft add rule inet lossy input numgen random mod 100 '<' 50 counter drop",
)
_NETWORK = "10.77.0"
_PRIVATE = ("/tmp", "/var/tmp")
_UP_S = 20.0
_DOWN_S = 10.0
_SSHD = """\
HostKey /run/cluster/host_key
AuthorizedKeysFile /run/cluster/key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
MaxStartups 100
PidFile none
LogLevel ERROR
"""
_SSH = """\
Host *
    IdentityFile /run/cluster/key
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""


class ClusterError(Exception):
    """What stands in the way, in one line."""


@dataclass(frozen=True)
class Process:
    """A process that has not been replaced by another of its number."""

    pid: int
    started: str

    @staticmethod
    def of(pid: int) -> Process:
        """Take hold of a living process."""
        return Process(pid, _start_of(pid) or "")

    @property
    def is_alive(self) -> bool:
        """Tell whether it still runs."""
        return bool(self.started) and _start_of(self.pid) == self.started

    def kill(self) -> None:
        """End it, and wait until it is gone."""
        if self.is_alive:
            os.kill(self.pid, signal.SIGKILL)
        deadline_s = time.monotonic() + _DOWN_S
        while self.is_alive and time.monotonic() < deadline_s:
            time.sleep(0.02)


_NOBODY = Process(0, "")


@dataclass(frozen=True)
class ClusterHost:
    """A host: its first process, by whose end it ends."""

    name: str
    address: str
    init: Process


def missing_for_a_cluster() -> str | None:
    """Say what this machine lacks, naming the Debian package; None where nothing is missing."""
    if sys.platform != "linux":
        return "needs Linux's namespaces"
    if os.geteuid() != 0:
        return "needs root, for namespaces and interfaces; use sudo"
    for program, package in PACKAGES.items():
        if shutil.which(program, path=_PATH) is None:
            return f"needs {program}, which is not installed; on Debian: apt-get install {package}"
    refused = _refused(_PROBE)
    return refused and f"may not make hosts here ({refused}); in a container: --privileged"


def missing_for_faults() -> str | None:
    """Say why links cannot be slowed and lose packets here, where a cluster can be had; None where they can."""
    refused = _refused(" && ".join(_PROBE_FAULTS))
    return refused and f"has no kernel that slows links and drops packets, or may not here ({refused})"


def _refused(script: str) -> str | None:
    """Try a script in namespaces like a host's, which end with it; return what stands in its way, None for nothing."""
    namespaces = ["--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "--mount-proc"]
    argv = ["unshare", *namespaces, "sh", "-c", script]
    done = subprocess.run(argv, capture_output=True, text=True, env=_environ())
    return None if done.returncode == 0 else " ".join(done.stderr.split()) or f"status {done.returncode}"


class Cluster:
    """Hosts on this machine, each in network, process, mount, name and IPC namespaces of its own.

    A switch (a namespace with a bridge) connects them, so that nothing of the network is in the machine's own namespace.

    Attributes:
        directory: everything of the cluster that is on disk; a host's private files are below hosts/NAME/files.
        hosts: by name, in order.
    """

    def __init__(self, directory: Path, switch: Process, hosts: Sequence[ClusterHost]):
        self.directory, self._switch = directory, switch
        self.hosts = {host.name: host for host in hosts}

    @staticmethod
    def up(
        num_hosts: int, shared: Sequence[Path] = (), private: Sequence[Path] = (), directory: Path = DIRECTORY
    ) -> Cluster:
        """Start the hosts host-1, host-2 and so on.

        Args:
            num_hosts: how many, up to 200.
            shared: directories that all hosts see alike, though they may lie below a private one.
            private: directories that each host has of its own, besides /tmp and /var/tmp; empty at first.
            directory: of the cluster's files; absent or empty.

        Raises:
            ClusterError: if something is missing, or a cluster is there already.
        """
        lacking = missing_for_a_cluster()
        if lacking is not None:
            raise ClusterError(lacking)
        if not 1 <= num_hosts <= 200:
            raise ClusterError(f"{num_hosts} hosts: must be 1 to 200")
        for path in (*shared, *private):
            if not path.is_dir():
                raise ClusterError(f"{path}: is no directory")
        if directory.exists() and any(directory.iterdir()):
            raise ClusterError(f"{directory} holds a cluster already; end it with: tools/cluster.py down")
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        directory.chmod(0o755)  # sshd reads the authorized key as the user
        names = {f"host-{number}": f"{_NETWORK}.{number}" for number in range(1, num_hosts + 1)}
        cluster = Cluster(directory, _NOBODY, [])
        try:
            cluster._save()
            _write_common(directory, names)
            cluster._start_switch()
            for name, address in names.items():
                cluster._describe(name, address, shared, private)
                cluster._start(name, address)
            cluster._wait_for_sshd(*names)
        except BaseException:
            cluster.down()
            raise
        return cluster

    @staticmethod
    def load(directory: Path = DIRECTORY) -> Cluster:
        """Find the cluster that is up.

        Raises:
            ClusterError: if there is none.
        """
        try:
            found = json.loads((directory / "cluster.json").read_text())
        except OSError:
            raise ClusterError(f"{directory} holds no cluster; start one with: tools/cluster.py up") from None
        hosts = [ClusterHost(host["name"], host["address"], Process(**host["init"])) for host in found["hosts"]]
        return Cluster(directory, Process(**found["switch"]), hosts)

    def down(self) -> None:
        """End every host and the switch, and remove the cluster's files."""
        for host in self.hosts.values():
            host.init.kill()
        self._switch.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def command(self, name: str, argv: Sequence[str], cwd: Path | None = None) -> list[str]:
        """Return the command line that runs another on a host, in this environment."""
        host = self._living(name)
        inside = ["nsenter", "--target", str(host.init.pid), "--mount", "--uts", "--ipc", "--net", "--pid"]
        return [*inside, "env", "-C", str(cwd or Path.cwd()), *argv]

    def files_of(self, name: str, path: Path) -> Path:
        """Return where a host's private file is seen from outside."""
        self._known(name)
        return self.directory / "hosts" / name / "files" / path.relative_to("/")

    def kill(self, name: str) -> None:
        """Take a host away as a loss of power does: its peers get no word of it."""
        host = self._living(name)
        self.cut(name)
        host.init.kill()

    def boot(self, name: str) -> None:
        """Start a host that was killed again, with the files that it had."""
        host = self._known(name)
        if host.init.is_alive:
            raise ClusterError(f"{name}: is up")
        self._start(name, host.address)
        self._wait_for_sshd(name)

    def cut(self, name: str) -> None:
        """Pull a host's cable."""
        _in_network(self._switch, "ip", "link", "set", self._living(name).name, "down")

    def mend(self, name: str) -> None:
        """Put the cable back, and take away what slows or loses."""
        host = self._living(name)
        _in_network(host.init, "tc", "qdisc", "del", "dev", "eth0", "root", check=False)
        _in_network(self._switch, "tc", "qdisc", "del", "dev", name, "root", check=False)
        _in_network(host.init, "nft", "delete", "table", "inet", "lossy", check=False)
        _in_network(self._switch, "ip", "link", "set", name, "up")

    def slow(self, name: str, rate: str) -> None:
        """Limit a host's link in both directions.

        Args:
            name: the host.
            rate: as tc writes it: 100mbit.
        """
        host = self._living(name)
        shape = ("root", "tbf", "rate", rate, "burst", "256kb", "latency", "400ms")
        _in_network(host.init, "tc", "qdisc", "replace", "dev", "eth0", *shape)
        _in_network(self._switch, "tc", "qdisc", "replace", "dev", name, *shape)

    def lose(self, name: str, percent: int) -> None:
        """Drop a share of the packets that come to a host, at random."""
        if not 0 < percent < 100:
            raise ClusterError(f"{percent} %: must be 1 to 99; cut takes all")
        host = self._living(name)
        _in_network(host.init, "nft", "delete", "table", "inet", "lossy", check=False)
        _in_network(host.init, "nft", "add", "table", "inet", "lossy")
        _in_network(host.init, "nft", "add chain inet lossy input { type filter hook input priority 0; }")
        drop = f"numgen random mod 100 < {percent} counter drop"
        _in_network(host.init, "nft", f"add rule inet lossy input iifname eth0 {drop}")

    def _describe(self, name: str, address: str, shared: Sequence[Path], private: Sequence[Path]) -> None:
        home = self.directory / "hosts" / name
        home.mkdir(parents=True)
        spec = {"name": name, "address": address, "cluster": str(self.directory)}
        own = [*_PRIVATE, *(str(path.absolute()) for path in private)]
        spec_file = home / "host.json"
        spec_file.write_text(json.dumps({**spec, "shared": [str(path.absolute()) for path in shared], "private": own}))

    def _start_switch(self) -> None:
        self._switch, stdin = _start_process(["sleep", "infinity"], self.directory / "switch.log", "--net")
        os.close(stdin)
        self._save()
        _in_network(self._switch, "ip", "link", "add", "switch", "type", "bridge")
        _in_network(self._switch, "ip", "link", "set", "switch", "up")

    def _start(self, name: str, address: str) -> None:
        home = self.directory / "hosts" / name
        argv = [sys.executable, str(Path(__file__).with_name("cluster_host.py")), str(home / "host.json")]
        init, stdin = _start_process(argv, home / "host.log", "--net", "--uts", "--mount", "--ipc", "--mount-proc")
        self.hosts[name] = ClusterHost(name, address, init)
        try:
            self._save()
            self._connect(self.hosts[name])
            os.write(stdin, b"\n")
        except BaseException:
            init.kill()
            raise
        finally:
            os.close(stdin)

    def _connect(self, host: ClusterHost) -> None:
        """Give a host its interface, whose other end is at the switch under the host's name."""
        # The kernel takes its time to remove the interfaces of a host that was killed.
        _in_network(self._switch, "ip", "link", "delete", host.name, check=False)
        # The address of the card stays when a host is started again, as that of a real one.
        card = "02:00:" + ":".join(f"{int(byte):02x}" for byte in host.address.split("."))
        eth0 = ["eth0", "address", card, "netns", str(host.init.pid)]
        _run(["ip", "link", "add", *eth0, "type", "veth", "peer", "name", host.name, "netns", str(self._switch.pid)])
        _in_network(self._switch, "ip", "link", "set", host.name, "master", "switch", "up")

    def _wait_for_sshd(self, *names: str) -> None:
        deadline_s = time.monotonic() + _UP_S
        for name in names:
            host = self.hosts[name]
            log = self.directory / "hosts" / name / "host.log"
            while True:
                if not host.init.is_alive or time.monotonic() > deadline_s:
                    raise ClusterError(f"{name} did not start: {log.read_text().strip() or 'no sshd'}")
                answers = ["bash", "-c", f"exec 3<>/dev/tcp/{host.address}/22"]
                if subprocess.run(self.command(name, answers, Path("/")), capture_output=True).returncode == 0:
                    break
                time.sleep(0.05)

    def _save(self) -> None:
        found = {"switch": asdict(self._switch), "hosts": [asdict(host) for host in self.hosts.values()]}
        (self.directory / "cluster.json").write_text(json.dumps(found))

    def _known(self, name: str) -> ClusterHost:
        if name not in self.hosts:
            raise ClusterError(f"{name}: no such host; there are {', '.join(self.hosts)}")
        return self.hosts[name]

    def _living(self, name: str) -> ClusterHost:
        host = self._known(name)
        if not host.init.is_alive:
            raise ClusterError(f"{name}: was killed")
        return host


def _write_common(directory: Path, names: dict[str, str]) -> None:
    """Write what all hosts see: names, a key for the cluster alone, the settings of ssh and sshd."""
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in names.items())]
    (directory / "etc-hosts").write_text("\n".join(lines) + "\n")
    for key in ("key", "host_key"):
        _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lmscale-cluster", "-f", str(directory / key)])
    (directory / "sshd_config").write_text(_SSHD)
    (directory / "ssh_config").write_text(_SSH)


def _start_process(argv: Sequence[str], log: Path, *namespaces: str) -> tuple[Process, int]:
    """Start process 1 of a host, which outlives this program; return it and the pipe to its standard input."""
    read_end, write_end = os.pipe()
    unshare = ["setsid", "unshare", "--fork", "--pid", "--kill-child", *namespaces, *argv]
    # A shell in between, so that it is nobody's child: this program may end first, and pytest wants none left.
    script = f'exec 3<&0; "$@" <&3 3<&- >{shlex.quote(str(log))} 2>&1 & echo $!'
    parent = _NOBODY
    try:
        started = subprocess.run(
            ["sh", "-c", script, "sh", *unshare],
            stdin=read_end,
            stdout=subprocess.PIPE,
            cwd="/",
            env=_environ(),
            check=True,
        )
        parent = Process.of(int(started.stdout))
        return _first_child(parent, log), write_end
    except BaseException:
        os.close(write_end)
        parent.kill()  # and the kernel its child
        raise
    finally:
        os.close(read_end)


def _first_child(parent: Process, log: Path) -> Process:
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    deadline_s = time.monotonic() + _UP_S
    while not (found := children.read_text().split() if parent.is_alive else []):
        if not parent.is_alive or time.monotonic() > deadline_s:
            raise ClusterError(f"cannot make namespaces: {log.read_text().strip()}")
        time.sleep(0.01)
    return Process.of(int(found[0]))


def _in_network(process: Process, *argv: str, check: bool = True) -> None:
    _run(["nsenter", "--target", str(process.pid), "--net", *argv], check)


def _run(argv: Sequence[str], check: bool = True) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, env=_environ())
    if check and done.returncode:
        raise ClusterError(f"{' '.join(argv)}: {done.stderr.strip()}")


def _environ() -> dict[str, str]:
    return {**os.environ, "PATH": _PATH}


def _start_of(pid: int) -> str | None:
    """Return when a process began, in clock ticks; None where it is gone or waits for its parent to look."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
