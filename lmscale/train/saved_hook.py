"""checkpoint.on_saved: the user's command for each checkpoint that has been committed, such as a copy to an object store."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from lmscale.log import get_logger

_log = get_logger(__name__)
_OUTPUT_FILE = Path("logs", "on_saved.log")


class SavedHook:
    """Runs the command in the background, one checkpoint after another; its failure is logged and changes nothing.

    The command is run by a shell with LMSCALE_CHECKPOINT, LMSCALE_STEP and LMSCALE_OUTPUT_DIR in its environment.

    Args:
        command: checkpoint.on_saved; None does nothing.
        output_dir: of the run; what the command prints goes to logs/on_saved.log there.
    """

    def __init__(self, command: str | None, output_dir: Path):
        self._command, self._output_dir = command, output_dir.absolute()
        self._worker = ThreadPoolExecutor(1, "on_saved")
        self._runs: dict[Path, Future[None]] = {}

    def run(self, checkpoint: Path) -> None:
        """Start the command for a checkpoint, after those of earlier ones."""
        if self._command:
            self._runs = {path: run for path, run in self._runs.items() if not run.done()}
            self._runs[checkpoint] = self._worker.submit(self._call, checkpoint.absolute())

    def in_use(self) -> set[Path]:
        """Return the checkpoints that a command may be reading."""
        return {path for path, run in list(self._runs.items()) if not run.done()}

    def close(self) -> None:
        """Wait for the commands that run or are due."""
        if self.in_use():
            _log.info("waiting for checkpoint.on_saved")
        self._worker.shutdown(wait=True)

    def _call(self, checkpoint: Path) -> None:
        assert self._command is not None
        environment = {
            **os.environ,
            "LMSCALE_CHECKPOINT": str(checkpoint),
            "LMSCALE_STEP": str(int(checkpoint.name.removeprefix("step-"))),
            "LMSCALE_OUTPUT_DIR": str(self._output_dir),
        }
        log = self._output_dir / _OUTPUT_FILE
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as output:
                status = subprocess.run(
                    ["/bin/sh", "-c", self._command],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    check=False,
                ).returncode
        except OSError as error:
            _log.warning("checkpoint.on_saved could not be started: %s", error)
            return
        if status:
            _log.warning("checkpoint.on_saved ended with status %d for %s; see %s", status, checkpoint, log)
