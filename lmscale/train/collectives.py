"""The last collective operations of this rank, from the record that torch keeps of them anyway (its flight recorder)."""

from __future__ import annotations

import json
from typing import Any

import torch

from lmscale.train.pulse import Collective

_DUMPS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
"""Of NCCL and of gloo; either may be missing in a build of torch."""


def last_collectives() -> dict[str, Collective]:
    """Return the last collective of each process group, by the group's name; empty where torch keeps no record.

    Point-to-point transfers are not among them. An operation that is not finished is pending; under NCCL, which runs behind
    the host, several may be, and the oldest is the one that the device waits in.
    """
    module = getattr(torch._C, "_distributed_c10d", None)
    found: dict[str, Collective] = {}
    for name in _DUMPS:
        dump = getattr(module, name, None)
        if dump is not None:
            found |= _last(json.loads(dump(True, False)).get("entries", []))
    return found


def _last(entries: list[dict[str, Any]]) -> dict[str, Collective]:
    last: dict[str, Collective] = {}
    for entry in entries:
        if entry["is_p2p"]:
            continue
        number, description = entry["process_group"]
        group = f"{description} (group {number})"
        known = last.get(group)
        if known is None or not known.is_pending:
            is_pending = not entry["retired"] and entry["state"] != "completed"
            operation = entry["profiling_name"].partition(":")[2] or entry["profiling_name"]
            shapes = "".join(str(shape) for shape in entry["input_sizes"][:1])
            last[group] = Collective(entry["collective_seq_id"], operation + shapes, is_pending)
    return last
