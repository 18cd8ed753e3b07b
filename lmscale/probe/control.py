"""Control tasks: labels that a classifier can only learn by heart."""

from __future__ import annotations

import numpy as np

from lmscale.parallel.seeds import hash_seed
from lmscale.probe.units import Units
from lmscale.tasks.texts import Ints

_RESOLUTION = float(1 << 63)


class ControlTask:
    """Gives each word type a class, drawn once, whatever stands around it and whatever set it is in.

    Classes are drawn as often as they are in the training set. Of a task that labels rows, the type is that of a row's
    first word.

    Args:
        train: the units of the training set.
        num_classes: of the task.
        seed: of the run.
    Source: Hewitt and Liang 2019, arXiv:1909.03368, sec. 2.
    """

    def __init__(self, train: Units, num_classes: int, seed: int):
        counts = np.bincount(train.targets.astype(np.int64), minlength=num_classes)
        self._borders, self._seed = np.cumsum(counts / counts.sum()), seed

    def labels(self, units: Units) -> Ints:
        """Return the class of each unit, int64 [u]."""
        types = {word: hash_seed("control", self._seed, word) / _RESOLUTION for word in set(units.words)}
        draws = np.array([types[word] for word in units.words])
        return np.minimum(np.searchsorted(self._borders, draws, side="right"), len(self._borders) - 1)
