"""How DeepSpeed's ops are built at their first use: once, by one ninja, under a lock that dies with its holder.

torch compiles an extension under a lock that is a file. A process that is killed meanwhile leaves the file, and every later
start waits for it for good, without a word. And the ninja that it calls is whichever PATH names: one of another version
builds again what the first has built, for a minute in which all other starts wait. So does another environment of the same
user: the place is one for all of them, and what is built names the environment that it was built from.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
from importlib.metadata import version
from pathlib import Path

from lmscale.log import get_logger

_log = get_logger(__name__)
_PLACE = "TORCH_EXTENSIONS_DIR"


def mend_builds() -> None:
    """Make this process build extensions as described above; calling it again changes nothing."""
    from torch.utils import cpp_extension

    own = str(Path(sys.executable).parent)
    others = [name for name in os.environ.get("PATH", os.defpath).split(os.pathsep) if name != own]
    os.environ["PATH"] = os.pathsep.join([own, *others])
    os.environ[_PLACE] = str(builds_directory())
    cpp_extension.FileBaton = KernelBaton


def builds_directory() -> Path:
    """Name the directory that holds what this environment builds: TORCH_EXTENSIONS_DIR, or one of its own."""
    if given := os.environ.get(_PLACE):
        return Path(given)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    environment = "\n".join((sys.prefix, sys.version, version("torch"), version("deepspeed")))
    return cache / "torch_extensions" / f"lmscale-{hashlib.sha256(environment.encode()).hexdigest()[:12]}"


class KernelBaton:
    """Does what torch's FileBaton does, by a lock of the kernel on a file beside torch's.

    Args:
        lock_file_path: torch's lock file.
        wait_seconds: of torch's, which serves on a file system without such locks.
        warn_after_seconds: as well.
    """

    def __init__(self, lock_file_path: str, wait_seconds: float = 0.1, warn_after_seconds: float | None = None):
        from torch.utils.file_baton import FileBaton

        self._path = f"{lock_file_path}.kernel"
        self._descriptor: int | None = None
        self._torchs = FileBaton(lock_file_path, wait_seconds, warn_after_seconds)
        self._uses_torchs = False

    def try_acquire(self) -> bool:
        """Take the lock, if nobody has it."""
        descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            # Some network file systems have no such locks.
            self._uses_torchs = not isinstance(error, BlockingIOError)
            return bool(self._torchs.try_acquire()) if self._uses_torchs else False
        self._descriptor = descriptor
        return True

    def wait(self) -> None:
        """Wait until who has the lock has built, or is gone."""
        op = Path(self._path).parent
        _log.info("another process builds, or looks after, %s in %s; waiting for it", op.name, op.parent)
        if self._uses_torchs:
            self._torchs.wait()
            return
        with open(self._path) as file:
            fcntl.flock(file, fcntl.LOCK_SH)

    def release(self) -> None:
        """Give the lock back."""
        if self._uses_torchs:
            self._torchs.release()
        elif self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
