"""Start a composed command: the run's directory, the one config file, the environment, the supervisor."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from lmscale.config.io import show
from lmscale.errors import EXIT_INTERRUPTED_AND_SAVED, ConfigError
from lmscale.launcher.compose import Command
from lmscale.launcher.relay import Relay
from lmscale.launcher.remote import prepare
from lmscale.launcher.shell import check_port
from lmscale.launcher.status import RUN_ID, STATUS_ADDRESS
from lmscale.launcher.supervise import Outcome, supervise
from lmscale.launcher.validate import LaunchPlan
from lmscale.monitor.atomic import replaced

RESOLVED_CONFIG = "config.resolved.yaml"
STOP_FILE = "STOP"


def resolved_config_path(plan: LaunchPlan) -> Path:
    """Name the config file that the ranks read, absolute: ranks on other hosts may start in another directory."""
    return Path(plan.config.output_dir).absolute() / RESOLVED_CONFIG


def start(plan: LaunchPlan, command: Command) -> Outcome:
    """Start the ranks and stay with them until the last one is gone.

    Raises:
        ConfigError: if the run's directory cannot be made or written.
        HostError: if a host of the hostfile cannot take its ranks.
    """
    output_dir = Path(plan.config.output_dir).absolute()
    _write_config(plan)
    environ = {name: value for name, value in os.environ.items() if name not in command.unset} | dict(command.env)
    with _status_dir(output_dir, command) as status_dir, _relay(plan, command, status_dir) as relay:
        if relay is not None:
            try:
                with _ending_by_signals():
                    here = prepare(command.hosts, resolved_config_path(plan))
                    if command.meets_at is not None:
                        check_port(*command.meets_at)
            except _Ended:
                return Outcome(EXIT_INTERRUPTED_AND_SAVED, "stopped before the ranks were started", is_final=True)
            # The launchers that take values from their own environment find it there, and DeepSpeed's in the file.
            environ[STATUS_ADDRESS] = f"{here}:{relay.port}"
            if command.reads_env_file:
                environ["DS_ENV_FILE"] = str(_write_travelling(command, status_dir, environ[STATUS_ADDRESS]))
        return supervise(
            command.argv,
            environ,
            status_dir,
            plan.num_ranks,
            is_local=command.is_local,
            stop_file=output_dir / STOP_FILE,
            launcher_passes_usr1=command.passes_usr1,
            logs=output_dir / "logs",
            relay=relay,
            rank_hosts=command.rank_hosts,
            start_s=plan.config.train.first_step_timeout_s,
        )


def join(plan: LaunchPlan, command: Command) -> NoReturn:
    """Become the launcher of this host's part of a run that other hosts join by themselves.

    Nobody supervises all of its ranks, so this process does not stay: signals, restarts and the status are torchrun's.

    Raises:
        ConfigError: if the run's directory cannot be made or written, or the launcher is not there.
    """
    _write_config(plan)
    environ = {name: value for name, value in os.environ.items() if name not in command.unset} | dict(command.env)
    sys.stdout.flush()
    try:
        os.execvpe(command.argv[0], list(command.argv), environ)
    except OSError as error:
        raise ConfigError(f"cannot be started: {error.strerror}", field=command.argv[0]) from None


def _write_config(plan: LaunchPlan) -> None:
    path = resolved_config_path(plan)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as file:
            file.write(show(plan.config).encode())
    except OSError as error:
        rule = f"cannot be written: {error.strerror}"
        raise ConfigError(rule, field="output_dir", value=plan.config.output_dir) from None


class _Ended(Exception):
    """The end was asked for while nothing was there yet to pass that on to."""


@contextlib.contextmanager
def _ending_by_signals() -> Iterator[None]:
    """Raise _Ended at a signal that asks for the end, so that what was made for the ranks is removed."""

    def end(number: int, _: FrameType | None) -> NoReturn:
        raise _Ended

    former = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _status_dir(output_dir: Path, command: Command) -> Iterator[Path]:
    """Make the directory of the ranks' reports: in the run's directory where other hosts have to reach it themselves."""
    if command.is_local or command.hosts:
        path = Path(tempfile.mkdtemp(prefix="lmscale-"))
    else:
        path = output_dir / f".status-{command.env[RUN_ID]}"
        path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _relay(plan: LaunchPlan, command: Command, status_dir: Path) -> contextlib.AbstractContextManager[Relay | None]:
    if not command.hosts:
        return contextlib.nullcontext()
    return Relay(status_dir, command.env[RUN_ID], plan.num_ranks)


def _write_travelling(command: Command, status_dir: Path, address: str) -> Path:
    """Write the file of variables that DeepSpeed exports on the other hosts."""
    variables = {**command.travels, STATUS_ADDRESS: address}
    path = status_dir / "deepspeed_env"
    path.touch(mode=0o600)
    path.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    return path
