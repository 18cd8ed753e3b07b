"""Start a run, and start it again from its newest checkpoint when it crashes, hangs or loses a rank."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from lmscale.config.check import dp_size_of
from lmscale.config.checkpoint_paths import list_checkpoints
from lmscale.config.run import RunConfig
from lmscale.errors import EXIT_BUDGET, EXIT_FAILURE, EXIT_HANG, EXIT_INTERRUPTED_AND_SAVED, ConfigError
from lmscale.launcher.compose import Placement, compose
from lmscale.launcher.elastic import shrink
from lmscale.launcher.shell import HostError, PortError
from lmscale.launcher.start import resolved_config_path, start
from lmscale.launcher.status import STARTED_AT
from lmscale.launcher.supervise import Outcome
from lmscale.launcher.validate import LaunchPlan, validate_run
from lmscale.monitor.alert import Event, alert
from lmscale.monitor.manifest import add_restart

_RESTARTED = frozenset({EXIT_FAILURE, EXIT_HANG})
_FIRST_DELAY_S, _MAX_DELAY_S = 1.0, 60.0
_POLL_S = 0.1
_PORT_TRIES = 5


@dataclass(frozen=True)
class RestartPolicy:
    """When a run is started again, and on what."""

    max_restarts: int = 0
    """In a row, without a new checkpoint in between."""
    elastic: bool = False
    """On fewer ranks, where some were lost."""
    min_devices: int = 1
    """Ranks that an elastic restart must have, on all hosts together."""
    first_delay_s: float = _FIRST_DELAY_S
    """Before the first restart; each further one in a row waits twice as long, up to a minute."""


def check_policy(max_restarts: int, elastic: bool, min_devices: int | None, placement: Placement) -> RestartPolicy:
    """Make a policy of the command line's options.

    Raises:
        ConfigError: if they contradict each other or the launcher.
    """
    if max_restarts < 0:
        raise ConfigError("must not be negative", field="--max-restarts", value=max_restarts)
    if elastic and not max_restarts:
        raise ConfigError("is for restarts", field="--elastic", remedy="add --max-restarts")
    if max_restarts and placement.nodes is not None and not placement.nodes.is_elastic:
        remedy = "drop it, and let what starts the hosts start all of them again; or give a range, --nnodes MIN:MAX"
        raise ConfigError("is not for a fixed --nnodes", field="--max-restarts", value=max_restarts, remedy=remedy)
    if elastic and placement.nodes is not None:
        remedy = "drop --elastic; --nnodes MIN:MAX lets hosts come and go"
        raise ConfigError("is for ranks that lmscale train starts again", field="--elastic", remedy=remedy)
    if elastic and placement.launcher == "slurm":
        remedy = "drop --elastic; Slurm requeues a job whose node is gone"
        raise ConfigError("cannot leave out a node of Slurm's", field="--elastic", remedy=remedy)
    if min_devices is not None and not elastic:
        raise ConfigError("is read with --elastic only", field="--min-devices", value=min_devices)
    if min_devices is not None and not 1 <= min_devices <= placement.num_ranks:
        raise ConfigError(
            f"must be between 1 and the {placement.num_ranks} ranks", field="--min-devices", value=min_devices
        )
    return RestartPolicy(max_restarts, elastic, min_devices or 1)


def check_sizes(config: RunConfig, placement: Placement) -> None:
    """Check that a run can go on with every number of hosts that an elastic torchrun may be left with.

    Raises:
        ConfigError: naming the first that does not give the layout or divide the batch.
    """
    nodes = placement.nodes
    if nodes is None or not nodes.is_elastic:
        return
    each = placement.num_ranks // nodes.most
    for count in range(nodes.least, nodes.most + 1):
        try:
            dp_size_of(config, count * each)
        except ConfigError as error:
            value = f"{nodes.least}:{nodes.most}"
            raise ConfigError(f"with {count} hosts of {each} ranks, {error}", field="--nnodes", value=value) from None


def keep_running(
    plan: LaunchPlan,
    placement: Placement,
    policy: RestartPolicy,
    launch: Callable[[LaunchPlan, Placement], Outcome] | None = None,
) -> Outcome:
    """Start a run and, as far as the policy allows, start it again after a failure.

    Status 1 and 76 are failures to be mended by another start; 0, 2, 75 and 77 are not, nor is what happens when the user
    has asked for the end. The count of restarts begins anew when the run has saved a checkpoint since the last one.

    Args:
        plan: the checked run.
        placement: where its ranks go.
        policy: when to start again.
        launch: starts it once; a test puts its own here.

    Returns:
        How the last start ended.
    """
    config, first = plan.config, _newest(plan.config)
    launch = launch or functools.partial(_launch, began_at=time.time())
    used = 0
    while True:
        before = _newest(config)
        try:
            outcome = launch(plan, placement)
        except HostError as error:
            if not used:
                raise
            outcome = Outcome(EXIT_FAILURE, str(error))  # a host that comes back may take the next start
        if outcome.status == EXIT_HANG:
            _alert(config, "hang", outcome)
        if _newest(config) != before:
            used = 0
        if outcome.status not in _RESTARTED or outcome.is_final or used >= policy.max_restarts:
            return _end(config, outcome, used)
        if policy.elastic:
            smaller = shrink(config, placement, outcome.lost, policy.min_devices)
            if smaller is None:
                return _end(config, outcome, used, has_too_few=True)
            placement = smaller
        used += 1
        delay_s = min(_MAX_DELAY_S, policy.first_delay_s * 2 ** (used - 1))
        newest = _newest(config)
        _say(config, outcome, placement, f"{used} of {policy.max_restarts} in {delay_s:g} s", newest)
        with _noting_the_end() as has_ended:
            if _waited(delay_s, has_ended):
                return Outcome(EXIT_INTERRUPTED_AND_SAVED, "stopped before it was started again", is_final=True)
            # A checkpoint of this run is newer than what it was told to begin with.
            resumable = config if newest == first else _resuming(config)
            plan = validate_run(resumable, placement.num_ranks)
            if has_ended():
                return Outcome(EXIT_INTERRUPTED_AND_SAVED, "stopped before it was started again", is_final=True)


def _launch(plan: LaunchPlan, placement: Placement, began_at: float) -> Outcome:
    environ = {**os.environ, STARTED_AT: str(began_at)}
    # A port that is free here may be taken on the host where the ranks meet; one that the user named is not changed.
    for _ in range(_PORT_TRIES - 1 if placement.master_port is None else 0):
        with contextlib.suppress(PortError):
            return start(plan, compose(plan, placement, resolved_config_path(plan), environ))
    return start(plan, compose(plan, placement, resolved_config_path(plan), environ))


def _newest(config: RunConfig) -> tuple[Path, int] | None:
    """Return the newest checkpoint and when it was written, in nanoseconds."""
    found = list_checkpoints(Path(config.output_dir) / "checkpoints")
    return (found[0], found[0].stat().st_mtime_ns) if found else None


def _resuming(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"resume": "auto"})})


def _say(config: RunConfig, outcome: Outcome, placement: Placement, when: str, newest: tuple[Path, int] | None) -> None:
    """Tell of a restart: on stderr, in the manifest, by the alert."""
    source = f"from {newest[0].name}" if newest else "from the beginning"
    line = f"restart {when}, on {placement.num_ranks} ranks, {source}, after status {outcome.status}: {outcome.error}"
    sys.stderr.write(f"{line}\n")
    with contextlib.suppress(OSError):  # a full disk is what the next start says
        add_restart(Path(config.output_dir) / "manifest.json", outcome.status, str(outcome.error))
    _alert(config, "restart", replace(outcome, error=line))


def _end(config: RunConfig, outcome: Outcome, used: int, has_too_few: bool = False) -> Outcome:
    if outcome.status not in {*_RESTARTED, EXIT_BUDGET} or outcome.is_final:
        return outcome
    if has_too_few:
        outcome = replace(
            outcome, error=f"{outcome.error}; what is left is too little for the layout and --min-devices"
        )
    elif used:
        outcome = replace(outcome, error=f"{outcome.error}; after {used} restarts without a new checkpoint")
    _alert(config, "failure", outcome)
    return outcome


def _alert(config: RunConfig, event: Event, outcome: Outcome) -> None:
    alert(config.monitor.alert_command, event, outcome.error or "", outcome.step, Path(config.output_dir).absolute())


@contextlib.contextmanager
def _noting_the_end() -> Iterator[Callable[[], bool]]:
    """Note a signal that asks for the end, while no rank is there to get it."""
    noted: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        noted.append(number)

    former = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield lambda: bool(noted)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _waited(delay_s: float, has_ended: Callable[[], bool]) -> bool:
    """Wait, and return whether the end was asked for meanwhile."""
    until = time.monotonic() + delay_s
    while time.monotonic() < until and not has_ended():
        time.sleep(_POLL_S)
    return has_ended()
