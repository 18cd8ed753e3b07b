"""Extensions are built once, and a builder that is killed holds nobody up."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from torch.utils import cpp_extension

from lmscale.parallel.op_builds import KernelBaton, builds_directory, mend_builds


def test_programs_of_this_environment_come_first_so_that_one_ninja_builds_all(tmp_path, monkeypatch):
    other = tmp_path / "ninja"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    own = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), own, "/usr/bin"]))
    assert shutil.which("ninja") == str(other)
    mend_builds()
    mend_builds()
    assert os.environ["PATH"] == os.pathsep.join([own, str(tmp_path), "/usr/bin"])
    assert cpp_extension.FileBaton is KernelBaton


def test_each_environment_builds_in_a_place_of_its_own(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = builds_directory()
    assert here.parent == tmp_path / "torch_extensions"
    monkeypatch.setattr(sys, "prefix", "/opt/other")
    assert builds_directory() != here
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/scratch/ops")
    assert builds_directory() == Path("/scratch/ops")


def _hold(path: str, holds: object) -> None:
    assert KernelBaton(path).try_acquire()
    holds.set()  # type: ignore[attr-defined]
    time.sleep(60)


def test_a_lock_ends_with_the_process_that_holds_it(tmp_path):
    path = str(tmp_path / "lock")
    context = multiprocessing.get_context("fork")
    holds = context.Event()
    holder = context.Process(target=_hold, args=(path, holds))
    holder.start()
    assert holds.wait(30)
    baton = KernelBaton(path)
    assert not baton.try_acquire()
    os.kill(holder.pid, signal.SIGKILL)
    start = time.monotonic()
    baton.wait()
    assert time.monotonic() - start < 30
    holder.join()
    assert baton.try_acquire()
    assert not KernelBaton(path).try_acquire()
    baton.release()
    assert KernelBaton(path).try_acquire()


def test_a_lock_that_torch_left_behind_is_no_hindrance(tmp_path):
    (tmp_path / "lock").touch()
    assert KernelBaton(str(tmp_path / "lock")).try_acquire()


def test_a_file_system_without_such_locks_is_served_as_torch_does(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    first, second = KernelBaton(str(tmp_path / "lock")), KernelBaton(str(tmp_path / "lock"))
    assert first.try_acquire()
    assert not second.try_acquire()
    first.release()
    second.wait()
    assert second.try_acquire()
