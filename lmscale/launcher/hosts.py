"""The hostfile: one line for each host, "NAME slots=RANKS"; # begins a comment."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lmscale.errors import ConfigError

_LINE = re.compile(r"^(\S+)\s+slots=(\d+)$")


@dataclass(frozen=True)
class Host:
    """A host and the ranks that it may take."""

    name: str
    slots: int


def read_hostfile(path: str | Path) -> list[Host]:
    """Read a hostfile.

    Raises:
        ConfigError: if it is missing or empty, or a line is malformed, names a host again or gives it no slots.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"cannot be read: {reason}", field="--hostfile", value=str(path)) from None
    hosts: list[Host] = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if text:
            hosts.append(_parse(text, f"{path}:{number}", {host.name for host in hosts}))
    if not hosts:
        raise ConfigError(
            "names no host", field="--hostfile", value=str(path), remedy='write lines as "host-1 slots=8"'
        )
    return hosts


def _parse(text: str, place: str, known: set[str]) -> Host:
    match = _LINE.match(text)
    if match is None:
        raise ConfigError('must be as "host-1 slots=8"', field=place, value=text)
    host = Host(match.group(1), int(match.group(2)))
    if host.name in known:
        raise ConfigError("names a host again", field=place, value=text, remedy="give each host one line")
    if host.slots == 0:
        raise ConfigError("must give the host at least one slot", field=place, value=text, remedy="or drop the line")
    return host
