"""Whether every host reads the same corpora, where each has copies of its own.

Samples are cut from the corpora by arithmetic: nothing is built from them on disk, on no host, so there is no cache to
share and none to race for. What can go wrong is that a copy is another, and training would go on without a word.
"""

from __future__ import annotations

import socket

import torch.distributed as dist

from lmscale.config.run import RunConfig
from lmscale.errors import DataError, LmscaleError
from lmscale.feed.loader import corpus_hashes

_SHOWN_DIGITS = 12


def check_same_corpora(config: RunConfig) -> None:
    """Compare the corpora of all hosts by content, with data.shared_filesystem: false; the first rank of each host hashes.

    Raises:
        DataError: on every rank, naming the host whose copy is missing or differs from that of rank 0's host.
    Collectives: every rank must call.
    """
    if config.data.shared_filesystem:
        return
    rank, world_size = dist.get_rank(), dist.get_world_size()
    hosts: list[str] = [""] * world_size
    dist.all_gather_object(hosts, socket.gethostname())
    found: list[dict[str, str] | str | None] = [None] * world_size
    dist.all_gather_object(found, _hashes(config) if hosts.index(hosts[rank]) == rank else None)
    first = found[0]
    for host, hashes in zip(hosts, found, strict=True):
        if isinstance(hashes, str):
            raise DataError(f"on {host}: {hashes}", remedy="copy it to every host")
        if hashes is None or not isinstance(first, dict):
            continue
        for prefix, content in hashes.items():
            if content != first[prefix]:
                raise DataError(
                    f"{host} has content {content[:_SHOWN_DIGITS]}, and {hosts[0]} {first[prefix][:_SHOWN_DIGITS]}",
                    field="data",
                    value=prefix,
                    remedy="copy it anew to every host",
                )


def _hashes(config: RunConfig) -> dict[str, str] | str:
    try:
        return corpus_hashes(config)
    except (LmscaleError, OSError) as error:
        return str(error)  # raised here, it would leave the other hosts in the collective
