"""Tell somebody: run the user's command in the background when something happens to a run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Literal

from lmscale.log import get_logger

_log = get_logger(__name__)

Event = Literal["fault", "hang", "restart", "failure"]
"""fault: the policy of the section `faults` has acted; hang: a rank does not answer; restart: it is started again;
failure: the run ends with one."""

TIMEOUT_S = 60.0
"""A command that takes longer is ended, where the run still lives then."""
OUTPUT_FILE = Path("logs", "alert.log")
"""Under the run's directory: what the commands print."""


def alert(
    command: str | None, event: Event, message: str, step: int, output_dir: Path | str, *, timeout_s: float = TIMEOUT_S
) -> None:
    """Start the user's command and return at once; its failure or slowness is logged and changes nothing.

    The command is run by a shell, in a session of its own: it outlives a run that ends. Call on one rank.

    Args:
        command: monitor.alert_command; None or an empty one does nothing.
        event: what happened, the command's LMSCALE_EVENT.
        message: one line, its LMSCALE_MESSAGE.
        step: the run's step, its LMSCALE_STEP.
        output_dir: the run's directory, its LMSCALE_OUTPUT_DIR.
        timeout_s: seconds that the command may take.
    """
    if not command:
        return
    # A supervisor ends every process that carries the launch's id: the command is none of the run's.
    environment = {name: value for name, value in os.environ.items() if name != "LMSCALE_RUN_ID"}
    environment |= {
        "LMSCALE_EVENT": event,
        "LMSCALE_MESSAGE": message.replace("\0", " "),
        "LMSCALE_STEP": str(step),
        "LMSCALE_OUTPUT_DIR": str(output_dir),
    }
    try:
        with contextlib.ExitStack() as stack:
            try:
                output = stack.enter_context((Path(output_dir) / OUTPUT_FILE).open("ab")).fileno()
            except OSError:
                output = subprocess.DEVNULL  # the disk may be what the alert is about
            process = subprocess.Popen(
                ["/bin/sh", "-c", command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
    except (OSError, ValueError) as error:
        _log.warning("monitor.alert_command could not be started: %s", error)
        return
    threading.Thread(target=_watch, args=(process, timeout_s), name="alert", daemon=True).start()


def _watch(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Wait for a command, end it where it takes too long, and log that it failed."""
    try:
        status = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        _log.warning("monitor.alert_command took more than %g s and was ended", timeout_s)
        return
    if status:
        _log.warning("monitor.alert_command ended with status %d", status)
