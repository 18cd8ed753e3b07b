"""Process groups in a forked process: their threads stayed behind, and to drop one waits for them for good.

megatron-core leaves two of its groups in its globals when it ends the others, and the next initialization overwrites them:
a fork of a process that has loaded a model, or has trained, would stop there without a word.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

_HOLDERS = ("megatron.core.parallel_state", "deepspeed.utils.groups", "torch.distributed.distributed_c10d")
_inherited: list[Any] = []
"""What the process that forked this one had."""


def keep_inherited_groups() -> None:
    """Keep every group of the process that forked this one, to the end of this one; call it first of all."""
    for name in _HOLDERS:
        module = sys.modules.get(name)
        if module is not None:
            _inherited.append(dict(vars(module)))
    c10d = sys.modules.get("torch.distributed.distributed_c10d")
    if c10d is not None:
        _inherited.append(list(c10d._world.pg_map))
    gc.freeze()  # and those that only cycles hold
