"""Commands on the hosts of a cluster, and what became of them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.distributed.runs import Keys, run_keys

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
BIN = Path(sys.executable).parent
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
}
TIMEOUT_S = 300.0
ZERO1: Keys = {"zero_optimization": {"stage": 1}}


@dataclass(frozen=True)
class Running:
    """A command that was started on a host."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def output(self) -> str:
        """What it has written so far."""
        return self.log.read_text()

    def end(self) -> tuple[int, str]:
        """Wait for its end, and return its status and output."""
        self.process.wait(timeout=TIMEOUT_S)
        return self.process.returncode, self.output

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the command itself, below the program that took it to the host."""
        pid = self.process.pid
        (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(int(child), number)

    def wait_for(self, text: str, seconds: float = TIMEOUT_S) -> None:
        """Wait until it has written something."""
        until(lambda: text in self.output or self.process.poll() is not None, seconds)
        assert text in self.output, self.output

    def kill(self) -> None:
        """End it if it has not ended."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Hosts:
    """A cluster during a test.

    Attributes:
        shared: a directory of this test that all hosts see; the corpus lies beside it.
        own: a path at which each host has a directory of its own, made when something is written.
    """

    def __init__(self, cluster: Any, test: str):
        self.cluster = cluster
        spec = json.loads((cluster.directory / "hosts" / "host-1" / "host.json").read_text())
        root, name = Path(spec["shared"][0]), re.sub(r"\W+", "-", test)
        self.corpus = str(root / "tokens")
        self.shared, self.own = root / name, Path("/tmp") / name
        self.shared.mkdir()
        self._started: list[Running] = []

    def start(self, name: str, *argv: str, **environ: str) -> Running:
        """Start a command on a host, in a session of its own."""
        log = self.shared / f"output-{len(self._started)}.log"
        command = self.cluster.command(name, argv, self.shared)
        with log.open("w") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**ENVIRONMENT, **environ},
                start_new_session=True,
            )
        self._started.append(Running(process, log))
        return self._started[-1]

    def run(self, name: str, *argv: str, **environ: str) -> tuple[int, str]:
        """Run a command on a host and return its status and output."""
        return self.start(name, *argv, **environ).end()

    def hostfile(self, *lines: str) -> str:
        """Write a hostfile: names with one slot each, or whole lines."""
        path = self.shared / "hostfile"
        path.write_text("".join(f"{line}\n" if "slots" in line else f"{line} slots=1\n" for line in lines))
        return str(path)

    def write(self, output_dir: Path, **changes: Any) -> tuple[Keys, str]:
        """Write the config of a small run that reads the corpus; return its keys and its path."""
        keys = run_keys(self.corpus, output_dir, **{"deepspeed": ZERO1, **changes})
        path = self.shared / "run.yaml"
        path.write_text(json.dumps(keys))  # YAML reads JSON
        return keys, str(path)

    def train(self, config: str, hostfile: str, *options: str, **environ: str) -> Running:
        """Start `lmscale train` on the first host."""
        return self.start("host-1", "lmscale", "train", config, "--hostfile", hostfile, *options, **environ)

    def path(self, name: str, path: Path) -> Path:
        """Return where a host's own file is seen from here."""
        return self.cluster.files_of(name, path)

    @contextlib.contextmanager
    def hiding(self, name: str, path: str, behind: str = "/dev/null") -> Iterator[None]:
        """Let a host alone see another file at a path."""
        status, output = self.run(name, "mount", "--bind", behind, path)
        assert status == 0, output
        try:
            yield
        finally:
            self.run(name, "umount", path)

    def processes(self, name: str) -> list[str]:
        """Command lines on a host, but for its first process and sshd's; its namespace's processes are seen from here."""
        namespace = os.readlink(f"/proc/{self.cluster.hosts[name].init.pid}/ns/pid")
        lines = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if os.readlink(process / "ns" / "pid") == namespace:
                    lines.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip())
        # A zombie has no command line.
        return [line for line in lines if line and not any(word in line for word in ("cluster_host.py", "sshd"))]

    def left(self) -> dict[str, list[str]]:
        """What still runs, by host that is up, once it has had a moment to end."""
        until(lambda: not any(self._left().values()), 10.0, fail=False)
        return {name: lines for name, lines in self._left().items() if lines}

    def _left(self) -> dict[str, list[str]]:
        return {name: self.processes(name) for name, host in self.cluster.hosts.items() if host.init.is_alive}

    def restore(self) -> None:
        """End what a failed test has left, and bring all hosts and links back."""
        for running in self._started:
            running.kill()
        for name, host in list(self.cluster.hosts.items()):
            if not host.init.is_alive:
                self.cluster.boot(name)
            self.cluster.mend(name)
            if self.processes(name):
                self.cluster.kill(name)
                self.cluster.boot(name)


def until(condition: Callable[[], bool], seconds: float = TIMEOUT_S, fail: bool = True) -> None:
    """Wait for something to come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            assert not fail, "waited too long"
            return
        time.sleep(0.2)


def records_in(metrics: Path) -> list[Keys]:
    """Read a metrics.jsonl, which may not be there yet, or be in the middle of a line."""
    try:
        lines: Sequence[str] = metrics.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found
