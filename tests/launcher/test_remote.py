"""What is done on other hosts by ssh; an ssh of the tests' own runs it here."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmscale.launcher import remote
from lmscale.launcher.remote import answers, prepare, sweep
from lmscale.launcher.shell import HostError
from lmscale.launcher.status import RUN_ID

SSH = """#!/bin/sh
while [ "$1" = -o ]; do shift 2; done
case "$1" in
    gone*) echo "ssh: Could not resolve hostname $1: Name or service not known" >&2; exit 255;;
    silent) exit 0;;
    lonely) exec sh -c "$2";;
    polite) echo "Welcome to $1!"; SSH_CONNECTION="10.0.0.7 5 10.0.0.8 22" exec sh -c "$2";;
    *) SSH_CONNECTION="10.0.0.7 5 10.0.0.8 22" exec sh -c "$2";;
esac
"""


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(SSH)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "a run" / "config.yaml"
    path.parent.mkdir()
    path.write_text("model: {$x: '`y`'}\n")
    return path


def test_every_host_gets_the_config_and_the_address_is_what_it_sees(ssh, config):
    assert prepare(["one", "two"], config) == "10.0.0.7"
    assert config.read_text() == "model: {$x: '`y`'}\n"
    assert [path.name for path in config.parent.iterdir()] == ["config.yaml"]


def test_a_host_that_is_not_there_is_named(ssh, config):
    with pytest.raises(HostError) as caught:
        prepare(["one", "gone-2"], config)
    assert caught.value.exit_status == 2
    assert str(caught.value).startswith("--hostfile = 'gone-2': cannot be reached by ssh: ssh: Could not resolve")
    assert answers("one")
    assert not answers("gone-2")


@pytest.mark.parametrize("host", ["silent", "lonely"])
def test_an_answer_that_is_none_is_told_in_a_line(ssh, config, host, monkeypatch):
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    with pytest.raises(HostError, match=rf"'{host}': has not answered as an sshd's shell does, .*see what ssh {host}"):
        prepare([host], config)


def test_what_a_hosts_shell_says_to_everyone_is_passed_over(ssh, config):
    assert prepare(["polite"], config) == "10.0.0.7"


def test_another_version_is_named_with_ours(ssh, config, monkeypatch):
    monkeypatch.setattr(platform, "python_version", lambda: "3.99.1")
    with pytest.raises(
        HostError, match=r"'one': has python=3\.\d+\.\d+ and this host python=3\.99\.1; install the same"
    ):
        prepare(["one"], config)


def test_a_missing_package_is_named(ssh, config, monkeypatch):
    here = remote._versions()
    monkeypatch.setattr(remote, "_versions", lambda: here + " apex=9")
    monkeypatch.setattr(remote, "PACKAGES", (*remote.PACKAGES, "no-such-package"))
    with pytest.raises(HostError, match=r"has no-such-package=none and this host apex=9"):
        prepare(["one"], config)


def test_a_missing_python_is_named(ssh, config, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(HostError, match=r"'one': has no /nowhere/python; install lmscale at the same path"):
        prepare(["one"], config)


def test_a_directory_that_cannot_be_written_is_told(ssh, tmp_path, config):
    (tmp_path / "file").write_text("")
    blocked = tmp_path / "file" / "config.yaml"
    with pytest.raises(HostError, match=r"'one': cannot take the run: "):
        remote._prepare("one", blocked, "text", remote._versions())


def test_a_sweep_kills_what_bears_the_mark_and_nothing_else(ssh):
    processes = {
        name: subprocess.Popen(["sleep", "60"], env={**os.environ, RUN_ID: name}) for name in ("abc123", "another")
    }
    try:
        time.sleep(0.1)
        sweep(["one", "gone-2"], "abc123")
        assert processes["abc123"].wait(10) == -9
        assert processes["another"].poll() is None
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
