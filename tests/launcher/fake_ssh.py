"""A stand-in for ssh on the PATH: runs the line on this host, as sshd would, or fails as ssh does.

What a host's line prints can be altered by a filter, a Python expression over `text`.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

_SCRIPT = """#!{python}
import json, os, subprocess, sys

failures, filters = json.loads({failures!r}), json.loads({filters!r})
words = sys.argv[1:]
while words and words[0].startswith("-"):
    if words[0] == "-G":
        print("hostname", "10.0.0.1" if words[1] == "alias" else words[1].rpartition("@")[2])
        sys.exit(0)
    del words[: 2 if words[0] in ("-o", "-p") else 1]
host, line = words[0], " ".join(words[1:])
with open({log!r}, "a") as log:
    log.write(host + "\\n")
if host in failures:
    sys.exit(failures[host][1] if sys.stderr.write(failures[host][0] + "\\n") else 0)
environ = {{**os.environ, "SSH_CONNECTION": "127.0.0.1 40000 127.0.0.1 22", "FAKE_SSH_HOST": host}}
if host not in filters:
    os.execve("/bin/sh", ["sh", "-c", line], environ)
child = subprocess.Popen(["/bin/sh", "-c", line], stdout=subprocess.PIPE, text=True, env=environ)
for text in child.stdout:
    sys.stdout.write(eval(filters[host]))
    sys.stdout.flush()
sys.exit(child.wait())
"""
NO_NAME = ("ssh: Could not resolve hostname gone: Name or service not known", 255)
NO_KEY = ("root@locked: Permission denied (publickey,password).", 255)


@contextlib.contextmanager
def standard_input(text: bytes) -> Iterator[None]:
    """Give this process's children something to read, as a script that is piped to a shell does; see that it is left."""
    source, end = os.pipe()
    os.write(end, text)
    os.close(end)
    former = os.dup(0)
    os.dup2(source, 0)
    try:
        yield
        assert os.read(0, len(text)) == text
    finally:
        os.dup2(former, 0)
        os.close(former)
        os.close(source)


def put_ssh_on_path(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    failures: Mapping[str, tuple[str, int]] | None = None,
    filters: Mapping[str, str] | None = None,
) -> Path:
    """Put the stand-in before everything else on the PATH.

    Args:
        directory: for the script.
        monkeypatch: undoes it.
        failures: what ssh says, and its status, of hosts that it does not reach.
        filters: of lines that a host prints.

    Returns:
        A file that names the hosts that were asked.
    """
    log = directory / "ssh.log"
    log.touch()
    script = directory / "bin" / "ssh"
    script.parent.mkdir()
    described = {"failures": json.dumps(dict(failures or {})), "filters": json.dumps(dict(filters or {}))}
    script.write_text(_SCRIPT.format(python=sys.executable, log=str(log), **described))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    return log
