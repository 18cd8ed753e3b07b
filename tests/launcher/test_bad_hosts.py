"""Wrong hosts, seen from the console: one line, status 2, and nothing was started or is left behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmscale.cli.main import main
from lmscale.launcher.environment import free_port
from lmscale.launcher.processes import marked
from tests.launcher.fake_ssh import NO_KEY, NO_NAME, put_ssh_on_path
from tests.launcher.runs import write_run

OVER_HOSTS = ["pdsh", "openmpi", "mpich", "torchrun"]
STARTED = "started"


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a run; launchers that would leave a file there, and ssh to hosts of which two do not answer."""
    put_ssh_on_path(tmp_path, monkeypatch, {"gone": NO_NAME, "locked": NO_KEY})
    for name in ("pdsh", "ompi_info", "mpirun", "mpirun.openmpi", "mpiexec.hydra", "deepspeed", "srun"):
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\ntouch {tmp_path}/{STARTED}\n")
        program.chmod(0o755)
    monkeypatch.setattr("lmscale.launcher.compose._program", lambda name: str(tmp_path / "bin" / "deepspeed"))
    monkeypatch.setattr("lmscale.launcher.many_hosts.python_module", lambda *_: [str(tmp_path / "bin" / "pdsh")])
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    write_run(tmp_path)
    return tmp_path


@pytest.fixture
def used_port() -> Iterator[int]:
    with socket.create_server(("", 0)) as listener:
        yield listener.getsockname()[1]


def refuse(directory: Path, capsys: pytest.CaptureFixture[str], hosts: str | None, *options: str) -> str:
    """Start the run, see it refused, and return the line."""
    arguments = ["train", str(directory / "run.yaml"), *options]
    if hosts is not None:
        (directory / "hosts").write_text(hosts)
        arguments += ["--hostfile", str(directory / "hosts")]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not (directory / STARTED).exists()
    return err


@pytest.mark.parametrize("launcher", OVER_HOSTS)
@pytest.mark.parametrize(
    ("hosts", "part"),
    [
        ("a slots=1\na slots=1\n", "names a host again"),
        ("a slots=0\n", "at least one slot"),
        ("a slots=two\n", "must be as"),
        ("a 2\n", "must be as"),
        ("", "names no host"),
        ("a slots=1\ngone slots=1\n", "--hostfile = 'gone': cannot be reached by ssh: ssh: Could not resolve hostname"),
        ("a slots=1\nlocked slots=1\n", "--hostfile = 'locked': cannot be reached by ssh: .*without a password"),
    ],
)
def test_a_wrong_hostfile(directory, capsys, launcher, hosts, part):
    line = refuse(directory, capsys, hosts, "--launcher", launcher)
    assert re.search(part, line)


@pytest.mark.parametrize("launcher", OVER_HOSTS)
def test_slots_that_do_not_give_the_layout(directory, capsys, launcher):
    options = ["--launcher", launcher, "parallel.tp_size=2"]
    line = refuse(directory, capsys, "a slots=2\nb slots=1\n", *options)
    assert "ranks = 3: must be a multiple of parallel.tp_size x parallel.pp_size = 2 x 1" in line


@pytest.mark.parametrize("launcher", OVER_HOSTS)
def test_a_port_in_use_on_the_first_host(directory, capsys, launcher, used_port):
    line = refuse(directory, capsys, "a slots=1\nb slots=1\n", "--launcher", launcher, "--master-port", str(used_port))
    assert f"--master-port = {used_port}: cannot be used on a: address already in use" in line


@pytest.mark.parametrize("launcher", OVER_HOSTS)
def test_a_port_that_nobody_named_is_exchanged_where_it_is_in_use_on_the_first_host(
    directory, launcher, used_port, monkeypatch
):
    (directory / "hosts").write_text("a slots=1\nb slots=1\n")
    ports = iter([used_port, used_port, free_port()])
    monkeypatch.setattr("lmscale.launcher.compose.free_port", lambda: next(ports))
    main(
        [
            "train",
            str(directory / "run.yaml"),
            "--hostfile",
            str(directory / "hosts"),
            "--launcher",
            launcher,
            "train.seed=1",
        ]
    )
    assert (directory / STARTED).exists()
    assert not list(ports)


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_port_in_use_here(directory, capsys, launcher, used_port):
    line = refuse(directory, capsys, None, "--launcher", launcher, "--master-port", str(used_port))
    assert f"--master-port = {used_port}: is in use on this host" in line


@pytest.mark.parametrize("launcher", ["deepspeed", *OVER_HOSTS])
def test_a_launcher_that_is_not_installed(directory, capsys, launcher, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _: None)
    line = refuse(directory, capsys, "a slots=1\n", "--launcher", launcher)
    assert "which is not on the PATH; install it, on Debian: apt-get install " in line


@pytest.mark.parametrize("hosts", ["a slots=1\ngone slots=1\n", "a slots=1\nb slots=1\n"])
def test_nothing_is_left_of_a_start_that_was_refused(directory, capsys, hosts, used_port, monkeypatch):
    monkeypatch.setattr("uuid.uuid4", lambda: type("Id", (), {"hex": "refused-start"}))
    refuse(directory, capsys, hosts, "--launcher", "pdsh", "--master-port", str(used_port))
    assert not marked("refused-start")
    left = {path.name for path in (directory / "run").iterdir()}
    assert left == {"config.resolved.yaml"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_nothing_is_left_of_a_start_that_is_stopped_while_the_hosts_are_asked(directory, capsys, number, monkeypatch):
    def ask(hosts, config_file):
        os.kill(os.getpid(), number)
        time.sleep(30)

    (directory / "tmp").mkdir()
    (directory / "hosts").write_text("a slots=1\nb slots=1\n")
    monkeypatch.setattr("tempfile.tempdir", str(directory / "tmp"))
    monkeypatch.setattr("lmscale.launcher.start.prepare", ask)
    options = ["--launcher", "pdsh", "--max-restarts", "3"]
    assert main(["train", str(directory / "run.yaml"), "--hostfile", str(directory / "hosts"), *options]) == 75
    assert capsys.readouterr().err == "error: stopped before the ranks were started\n"
    assert not (directory / STARTED).exists()
    assert not list((directory / "tmp").iterdir())
