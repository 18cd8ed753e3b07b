"""Start a composed command: the run's directory, the one config file, the environment, the supervisor."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from lmscale.config.io import show
from lmscale.errors import ConfigError
from lmscale.launcher.compose import Command
from lmscale.launcher.relay import Relay
from lmscale.launcher.remote import Addresses, prepare
from lmscale.launcher.status import RUN_ID, STATUS_ADDRESS, STATUS_BY_FILE
from lmscale.launcher.supervise import Outcome, supervise
from lmscale.launcher.validate import LaunchPlan
from lmscale.monitor.atomic import replaced

RESOLVED_CONFIG = "config.resolved.yaml"
STOP_FILE = "STOP"
_DEEPSPEED_ENV = ".deepspeed_env"


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
            addresses = prepare(command.hosts, resolved_config_path(plan))
            environ["DS_ENV_FILE"] = str(_write_travelling(command, status_dir, addresses, relay.port))
        return supervise(
            command.argv,
            environ,
            status_dir,
            plan.num_ranks,
            is_local=command.is_local,
            stop_file=output_dir / STOP_FILE,
            launcher_passes_signals=command.passes_signals,
            logs=output_dir / "logs",
            relay=relay,
            hosts=command.hosts,
        )


def _write_config(plan: LaunchPlan) -> None:
    path = resolved_config_path(plan)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as file:
            file.write(show(plan.config).encode())
    except OSError as error:
        rule = f"cannot be written: {error.strerror}"
        raise ConfigError(rule, field="output_dir", value=plan.config.output_dir) from None


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


def _write_travelling(command: Command, status_dir: Path, addresses: Addresses, port: int) -> Path:
    """Write the file of variables that DeepSpeed exports on the other hosts, with what the user's own files name.

    DeepSpeed's launcher passes on a few prefixes of its own choosing (NCCL, PYTHON, UCX, ...) and what this file holds.
    """
    variables: dict[str, str] = {}
    for directory in (Path.home(), Path.cwd()):
        variables |= _read_env_file(directory / os.environ.get("DS_ENV_FILE", _DEEPSPEED_ENV))
    ours = {STATUS_ADDRESS: f"{addresses.here}:{port}", STATUS_BY_FILE: "1", "MASTER_ADDR": addresses.first}
    path = status_dir / "deepspeed_env"
    path.touch(mode=0o600)
    lines = (
        f"{name}={value}\n" for name, value in {**command.travels, **variables, **ours}.items() if "\n" not in value
    )
    path.write_text("".join(lines))
    return path


def _read_env_file(path: Path) -> Mapping[str, str]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, equals, value in (line.partition("=") for line in lines) if equals}
