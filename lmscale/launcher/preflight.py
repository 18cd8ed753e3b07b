"""Whether the hosts of a hostfile can train together: `lmscale doctor --hostfile`.

Every host is asked over ssh at once, by lmscale.launcher.host_facts under this Python's path there. Versions and code
must be this host's; corpora must be the same on all; then an all-reduce goes over all hosts.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from lmscale.errors import ConfigError
from lmscale.launcher.doctor import Finding
from lmscale.launcher.environment import is_secret, travelling, user_exports
from lmscale.launcher.host_facts import PACKAGES, gather
from lmscale.launcher.hosts import Host
from lmscale.launcher.shell import (
    NO_SUCH_PROGRAM,
    SSH,
    SSH_FAILED,
    is_loopback,
    python_line,
    remote_python_path,
    rendezvous_address,
    ssh_remedy,
    with_exports,
)

_GIB = 1 << 30
_MIN_DISK_GIB, _MIN_SHM_GIB = 10.0, 1.0
_MAX_CLOCK_S = 1.0
"""Beyond what the round trip leaves open. Training itself does not read other hosts' clocks; shared file systems, logs and
the age of checkpoints do."""
_FACTS_S, _ALL_REDUCE_S, _REACH_S = 30.0, 90.0, 60.0
_SHOWN_DIGITS = 8


@dataclass
class Examined:
    """A host and what was found there."""

    host: str
    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] | None = None
    """None where it could not be asked."""
    clock_offset_s: float = 0.0
    """How far its clock is ahead of this host's."""
    clock_error_s: float = 0.0
    """At most, either way."""

    @property
    def is_ready(self) -> bool:
        """Whether nothing that training needs is missing."""
        return all(finding.state != "missing" for finding in self.findings)


@dataclass(frozen=True)
class Preflight:
    """What is to be said of all hosts."""

    hosts: tuple[Examined, ...]
    all_reduce: Finding

    @property
    def is_ready(self) -> bool:
        """Whether they can train together."""
        return all(each.is_ready for each in self.hosts) and self.all_reduce.state != "missing"


def examine_hosts(hosts: Sequence[Host], prefixes: Sequence[str] = ()) -> Preflight:
    """Look at every host of a hostfile.

    Args:
        hosts: of the file.
        prefixes: of corpora that every host must see with the same content.

    Raises:
        ConfigError: if there is no ssh here.
    """
    if shutil.which("ssh") is None:
        remedy = "install it, on Debian: apt-get install openssh-client"
        raise ConfigError("needs ssh, which is not on the PATH", field="--hostfile", remedy=remedy)
    directory = Path.cwd()  # whose free space counts
    environ = _travelling()
    absolute = [os.path.abspath(prefix) for prefix in prefixes]
    line = with_exports(python_line("lmscale.launcher.host_facts", str(directory), *absolute), environ)
    with ThreadPoolExecutor(len(hosts)) as pool:
        examined = list(pool.map(lambda host: _ask(host.name, line), hosts))
    here = gather(directory, [])
    for each in examined:
        if each.facts is not None:
            each.findings += judge(each.facts, here, several=len(hosts) > 1)
            each.findings.append(_clock(each))
    _compare_data(examined, absolute)
    return Preflight(tuple(examined), _all_reduce(examined, environ))


def judge(facts: Mapping[str, Any], here: Mapping[str, Any], several: bool) -> Iterable[Finding]:
    """Hold a host's facts against this host's."""
    yield _versions(facts["versions"], here["versions"])
    if facts["code"] == here["code"]:
        yield Finding("code", "ok", facts["code"][:_SHOWN_DIGITS])
    else:
        value = f"{facts['code'][:_SHOWN_DIGITS]}, and here {here['code'][:_SHOWN_DIGITS]}"
        yield Finding("code", "missing", value, "bring lmscale's own modules to the same state on every host")
    yield _space(
        "disk", facts["disk_free_bytes"], _MIN_DISK_GIB, "a checkpoint takes about 14 bytes for each parameter"
    )
    shm_remedy = "in a container: --shm-size=8g; ranks and data workers meet there"
    yield _space("/dev/shm", facts["shm_free_bytes"], _MIN_SHM_GIB, shm_remedy)
    yield _interface("gloo", facts["gloo"], several)
    if facts["num_devices"]:
        yield _interface("nccl", facts["nccl"], several)


def _travelling() -> dict[str, str]:
    asked = {name: value for name, value in user_exports(os.environ).items() if not is_secret(name)}
    return {**travelling(os.environ), **asked, "PYTHONPATH": remote_python_path(os.environ)}


def _ask(host: str, line: str) -> Examined:
    """Ask one host for its time, twice, and for its facts; the second answer is not delayed by Python's start."""
    examined = Examined(host)
    argv = [*SSH, host, line]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as asked:
        assert asked.stdin is not None
        assert asked.stdout is not None
        watch = _Watch(asked, _FACTS_S)
        try:
            for _ in range(2):
                before = time.time()
                asked.stdin.write("\n")
                asked.stdin.flush()
                there = _read_number(asked.stdout)
                after = time.time()
                examined.clock_offset_s, examined.clock_error_s = there - (before + after) / 2, (after - before) / 2
            out, err = asked.communicate(timeout=_FACTS_S)
            examined.facts = json.loads(out)
        except (OSError, ValueError, subprocess.TimeoutExpired):
            asked.kill()
            _, err = asked.communicate()
            examined.facts = None
        has_timed_out = watch.stop()
    if examined.facts is None:
        examined.findings.append(_unreachable(host, asked.returncode, err, has_timed_out))
    else:
        examined.findings.append(Finding("ssh", "ok", "answers"))
    return examined


def _read_number(lines: IO[str]) -> float:
    """Read the number that a host answers; before that there may be what its shell says to everyone."""
    for line in iter(lines.readline, ""):
        with contextlib.suppress(ValueError):
            return float(line)
    raise ValueError("no number in the answer")


class _Watch:
    """Kills a process that takes too long, since a pipe's readline has no time-out."""

    def __init__(self, process: subprocess.Popen[str], limit_s: float):
        self._process, self._has_expired = process, False
        self._timer = threading.Timer(limit_s, self._expire)
        self._timer.daemon = True
        self._timer.start()

    def _expire(self) -> None:
        self._has_expired = True
        self._process.kill()

    def stop(self) -> bool:
        """Return whether it was killed."""
        self._timer.cancel()
        return self._has_expired


def _unreachable(host: str, status: int, err: str, has_timed_out: bool) -> Finding:
    said = next(reversed([line.strip() for line in err.splitlines() if line.strip()]), f"ended with status {status}")
    if has_timed_out:
        return Finding("ssh", "missing", f"has not answered for {_FACTS_S:g} s", f"look at {host}, and its network")
    if status == NO_SUCH_PROGRAM:
        remedy = "install lmscale at the same path on every host"
        return Finding("ssh", "missing", f"no {sys.executable} there", remedy)
    if status != SSH_FAILED:
        return Finding("ssh", "missing", said, "install the same lmscale at the same path on every host")
    return Finding("ssh", "missing", said, ssh_remedy(host, said))


def _versions(there: Mapping[str, str | None], here: Mapping[str, str | None]) -> Finding:
    names = [name for name in ("python", *PACKAGES) if there.get(name) != here.get(name)]
    if not names:
        return Finding("versions", "ok", "as here")
    different = "; ".join(f"{name} {there.get(name) or 'not installed'}, and here {here.get(name)}" for name in names)
    return Finding("versions", "missing", different, "install the same versions on every host")


def _space(name: str, free_bytes: int, least_gib: float, remedy: str) -> Finding:
    is_enough = free_bytes >= least_gib * _GIB
    return Finding(
        name, "ok" if is_enough else "note", f"{free_bytes / _GIB:.1f} GiB free", "" if is_enough else remedy
    )


def _interface(name: str, found: Mapping[str, str | None], several: bool) -> Finding:
    interface, address = found["interface"], found["address"]
    variable = f"{name.upper()}_SOCKET_IFNAME"
    if interface is None or address is None:
        return Finding(
            name, "missing", f"no interface {interface or ''}".strip(), f"name one that is there: {variable}"
        )
    if several and is_loopback(address):
        value = f"{interface} ({address}), which other hosts do not reach"
        return Finding(name, "missing", value, f"name the interface: {variable}=eth0, in .deepspeed_env")
    return Finding(name, "ok", f"{interface} ({address})")


def _clock(examined: Examined) -> Finding:
    value = f"{examined.clock_offset_s:+.3f} s, give or take {examined.clock_error_s:.3f} s"
    if abs(examined.clock_offset_s) - examined.clock_error_s <= _MAX_CLOCK_S:
        return Finding("clock", "ok", value)
    return Finding("clock", "missing", value, "set it by NTP: timedatectl set-ntp true")


def _compare_data(examined: Sequence[Examined], prefixes: Sequence[str]) -> None:
    """Compare the corpora of all hosts with those of the first that has them; this host need not see them."""
    for prefix in prefixes:
        asked = [each for each in examined if each.facts is not None]
        found = {each.host: (each.facts or {})["data"][prefix] for each in asked}
        first = next((host for host, each in found.items() if each["hash"]), None)
        for each in asked:
            content = found[each.host]
            name = f"data {prefix}"
            if content["hash"] is None:
                remedy = "copy it there, or mount what holds it"
                each.findings.append(Finding(name, "missing", content["problem"], remedy))
            elif first is not None and content["hash"] != found[first]["hash"]:
                value = f"{content['hash'][:_SHOWN_DIGITS]}, and {first} has {found[first]['hash'][:_SHOWN_DIGITS]}"
                each.findings.append(Finding(name, "missing", value, "copy it anew to every host"))
            else:
                each.findings.append(Finding(name, "ok", content["hash"][:_SHOWN_DIGITS]))


def _all_reduce(examined: Sequence[Examined], environ: Mapping[str, str]) -> Finding:
    """Sum a tensor over all hosts, one process on each."""
    first = examined[0]
    if not all(each.is_ready for each in examined) or first.facts is None:
        return Finding("all-reduce", "note", "not tried: not every host is ready")
    backend = "nccl" if all((each.facts or {})["num_devices"] for each in examined) else "gloo"
    address = rendezvous_address(first.host, is_alone=len(examined) == 1)
    meets = [str(len(examined)), address, str(first.facts["free_port"]), backend]

    def take_part(numbered: tuple[int, Examined]) -> subprocess.CompletedProcess[str] | None:
        number, each = numbered
        line = with_exports(python_line("lmscale.launcher.all_reduce", str(number), *meets), environ)
        try:
            return _run(each.host, line, _ALL_REDUCE_S)
        except subprocess.TimeoutExpired:
            return None

    with ThreadPoolExecutor(len(examined)) as pool:
        done = list(pool.map(take_part, enumerate(examined)))
    failed = {
        each.host: _reason(one) for each, one in zip(examined, done, strict=True) if one is None or one.returncode
    }
    if failed:
        # A host that is cut off makes the others fail too, each with what it happened to wait for.
        apart = _unreached(examined, address, environ)
        what = {host: f"does not reach {first.host} ({address}): {reason}" for host, reason in apart.items()} or failed
        remedy = (
            "look at firewalls, and name the interface that all hosts share: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
        )
        return Finding("all-reduce", "missing", _by_reason(what), remedy)
    assert done[0] is not None
    measured = json.loads(done[0].stdout)
    rate = measured["bus_bytes_per_second"]
    value = f"{rate / 1e9:.2f} GB/s ({rate * 8 / 1e9:.1f} Gbit/s) on each host's link, {measured['backend']}"
    return Finding("all-reduce", "ok", value)


def _unreached(examined: Sequence[Examined], address: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Connect to the first host from each other one; return those that cannot, with the reason."""
    line = with_exports(python_line("lmscale.launcher.reach", "listen"), environ)
    argv, nothing = [*SSH, examined[0].host, line], subprocess.DEVNULL
    listening = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=nothing, text=True)
    watch = _Watch(listening, _REACH_S)
    try:
        with listening:
            assert listening.stdout is not None
            port = int(_read_number(listening.stdout))
            line = with_exports(python_line("lmscale.launcher.reach", "connect", address, str(port)), environ)
            others = [each.host for each in examined[1:]]
            with ThreadPoolExecutor(len(examined)) as pool:
                done = zip(others, pool.map(lambda host: _run(host, line, _FACTS_S), others), strict=True)
            return {host: _reason(one) for host, one in done if one.returncode}
    except (ValueError, subprocess.TimeoutExpired):
        return {}
    finally:
        watch.stop()


def _run(host: str, line: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
    argv, nothing = [*SSH, host, line], subprocess.DEVNULL  # ssh would take what a caller's script has yet to read
    return subprocess.run(argv, stdin=nothing, capture_output=True, text=True, timeout=timeout_s, check=False)


def _reason(done: subprocess.CompletedProcess[str] | None) -> str:
    if done is None:
        return "no answer"
    return done.stderr.strip().rpartition("\n")[2] or f"status {done.returncode}"


def _by_reason(failed: Mapping[str, str]) -> str:
    hosts = {reason: [host for host, each in failed.items() if each == reason] for reason in failed.values()}
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in hosts.items())
