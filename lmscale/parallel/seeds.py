"""Random numbers as pure functions of where they are used.

Nothing here keeps a state that a checkpoint would have to save: weights are drawn from (seed, layer, draw), dropout from
(seed, step, micro batch, layer, site, rank where it must differ). A resumed run, a recomputed layer and another pipeline
layout therefore draw the same numbers. The generators of python, numpy and torch, from which nothing of ours draws in
training, are seeded anew with every step, for code that a user brings or a library hides.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

_MASK = (1 << 63) - 1
_NUMPY_MASK = (1 << 32) - 1


def hash_seed(*parts: int | str) -> int:
    """Hash a tuple to a 63-bit seed; different tuples give independent streams."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & _MASK


def seed_global_generators(seed: int) -> None:
    """Seed the global generators of python, numpy and torch, those of CUDA devices included."""
    random.seed(seed)
    np.random.seed(seed & _NUMPY_MASK)  # noqa: NPY002 - the global one is meant
    torch.manual_seed(seed)


class WeightInit:
    """Draws initial weights, identical for every layout.

    megatron-core builds each matrix whole on every rank and keeps the rank's slice; drawn inside `layer(key)`, the n-th
    matrix of a layer is a function of (seed, key, n).
    """

    def __init__(self, seed: int):
        self._seed = seed
        self._key: str | None = None
        self._draw = 0
        self._entry = 0

    @contextlib.contextmanager
    def layer(self, key: str) -> Iterator[None]:
        """Name the layer whose weights are drawn inside the context."""
        outer = self._key, self._draw
        self._key, self._draw = key, 0
        try:
            yield
        finally:
            self._key, self._draw = outer

    def entries(self, count: int) -> Iterator[int]:
        """Yield 0 .. count - 1: what is drawn for entry 0 is what would be drawn without entries, and the others are apart."""
        first = self._draw
        for entry in range(count):
            self._draw, self._entry = first, entry
            yield entry
        self._entry = 0

    def normal(self, std: float, truncated: bool = False) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return a function that fills a whole (unsharded) CPU tensor with N(0, std^2).

        Args:
            std: of the distribution, before it is truncated.
            truncated: draw again what lies beyond two std.
        """

        def fill(tensor: torch.Tensor) -> torch.Tensor:
            generator = self._next_generator()
            with torch.no_grad():
                if truncated:
                    return nn.init.trunc_normal_(tensor, 0.0, std, -2 * std, 2 * std, generator=generator)
                return tensor.normal_(0.0, std, generator=generator)

        return fill

    def uniform(self, bound: float) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return a function that fills a whole (unsharded) CPU tensor with U(-bound, bound)."""

        def fill(tensor: torch.Tensor) -> torch.Tensor:
            generator = self._next_generator()
            with torch.no_grad():
                return tensor.uniform_(-bound, bound, generator=generator)

        return fill

    def _next_generator(self) -> torch.Generator:
        if self._key is None:
            raise AssertionError("weights are drawn outside WeightInit.layer()")
        self._draw += 1
        apart = (self._entry,) if self._entry else ()
        return torch.Generator().manual_seed(hash_seed("weight", self._seed, self._key, self._draw - 1, *apart))


class DropoutClock:
    """Seeds every dropout from its place in the run.

    The engine calls `begin_step`; each layer asks `next_micro_batch` once for each forward pass in training and hands the
    number to whatever may be recomputed.
    """

    def __init__(self, seed: int, dp_rank: int, tp_rank: int):
        self._seed, self._dp_rank, self._tp_rank = seed, dp_rank, tp_rank
        self._step = 0
        self._micro_batches: dict[str, int] = {}

    def begin_step(self, step: int) -> None:
        """Start an optimizer step: micro batches count from 0 again, and the global generators are seeded from the step."""
        self._step = step
        self._micro_batches.clear()
        seed_global_generators(hash_seed("global", self._seed, step, self._dp_rank, self._tp_rank))

    def next_micro_batch(self, layer_key: str) -> int:
        """Count a forward pass of a layer and return its number within the step."""
        number = self._micro_batches.get(layer_key, 0)
        self._micro_batches[layer_key] = number + 1
        return number

    def seed(self, device: torch.device, layer_key: str, micro_batch: int, site: str, *, differs_over_tp: bool) -> None:
        """Seed the device's generator for the dropouts that follow.

        Args:
            device: where the dropout runs.
            layer_key: the layer.
            micro_batch: its number within the step, from `next_micro_batch`.
            site: which dropout of the layer.
            differs_over_tp: True where the tensor is split over tensor-parallel ranks, False where it is replicated.
        """
        tp_part = self._tp_rank if differs_over_tp else -1
        seed = hash_seed("dropout", self._seed, self._step, micro_batch, layer_key, site, self._dp_rank, tp_part)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)
