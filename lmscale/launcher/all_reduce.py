"""One process of an all-reduce over hosts, timed: `python -m lmscale.launcher.all_reduce RANK WORLD HOST PORT BACKEND`."""

from __future__ import annotations

import datetime
import json
import sys
import time
from collections.abc import Sequence

_BYTES = 32 << 20
_REPEATS = 3
_TIMEOUT_S = 30


def measure(rank: int, world_size: int, host: str, port: int, backend: str) -> dict[str, float | str]:
    """Sum a tensor over all hosts and return how fast that was.

    bus_bytes_per_second is 2 (n - 1) / n x bytes / time: what each host's link carries, whatever n is.

    Raises:
        RuntimeError: if the sum is wrong.
    Collectives: every host must call.
    """
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    timeout = datetime.timedelta(seconds=_TIMEOUT_S)
    where = f"tcp://{host}:{port}"
    dist.init_process_group(backend, init_method=where, rank=rank, world_size=world_size, timeout=timeout)
    try:
        tensor = torch.full((_BYTES // 4,), float(rank + 1), device=device)
        dist.all_reduce(tensor)
        expected = world_size * (world_size + 1) / 2
        if not bool((tensor == expected).all()):
            raise RuntimeError(f"the sum over the hosts is {tensor[0].item()}, not {expected}")
        tensor.zero_()
        times = []
        for _ in range(_REPEATS):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(tensor)
            tensor[0].item()  # waits for the device
            times.append(time.perf_counter() - started)
    finally:
        dist.destroy_process_group()
    bus_bytes = 2 * (world_size - 1) / world_size * _BYTES
    return {"backend": backend, "bus_bytes_per_second": bus_bytes / min(times)}


def main(arguments: Sequence[str]) -> int:
    """Print the measurement as JSON, or why there is none."""
    rank, world_size, host, port, backend = arguments
    try:
        print(json.dumps(measure(int(rank), int(world_size), host, int(port), backend)))  # noqa: T201
    except RuntimeError as error:
        sys.stderr.write(f"{str(error).splitlines()[0]}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
