"""Histograms of every weight of the whole model, and of Adam's first moments, over all ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from lmscale.monitor.histogram import Histogram
from lmscale.train.engine import Engine

NUM_BINS = 40
_FIRST_MOMENT = "exp_avg"
_LEAST, _MOST, _TOTAL, _SQUARES = range(4)


def parameter_histograms(engine: Engine) -> dict[str, Histogram]:
    """Count the values of each logical tensor in bins between its least and its largest.

    Values that are not finite are left out. A tensor is counted once, whatever the layout.

    Returns:
        By tag, weights/<name> and first_moment/<name>; the same on every rank.
    Collectives: a gather of the names, and two sums and a maximum of some numbers for each tensor; every rank must call.
    """
    device, ours = engine.topology.device, list(_tensors(engine))
    everyone: list[list[str]] = [[] for _ in range(engine.topology.world_size)]
    dist.all_gather_object(everyone, [tag for tag, _ in ours])
    places = {tag: place for place, tag in enumerate(dict.fromkeys(tag for tags in everyone for tag in tags))}
    stats = torch.zeros(len(places), 4, dtype=torch.float64, device=device)
    stats[:, [_LEAST, _MOST]] = -torch.inf
    for tag, values in ours:
        row = stats[places[tag]]
        row[_LEAST] = torch.maximum(row[_LEAST], -values.min())  # of -least, so that one maximum serves both ends
        row[_MOST] = torch.maximum(row[_MOST], values.max())
        row[_TOTAL] += values.sum()
        row[_SQUARES] += values.square().sum()
    ends, sums = stats[:, : _MOST + 1].contiguous(), stats[:, _TOTAL:].contiguous()
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    dist.all_reduce(sums)
    counts = torch.zeros(len(places), NUM_BINS, dtype=torch.float64, device=device)
    for tag, values in ours:
        place = places[tag]
        low, high = _bounds(-float(ends[place, _LEAST]), float(ends[place, _MOST]))
        bins = ((values - low) * (NUM_BINS / (high - low))).long().clamp_(0, NUM_BINS - 1)
        counts[place] += torch.bincount(bins, minlength=NUM_BINS)
    dist.all_reduce(counts)
    return {
        tag: _histogram(-low, high, *sums[place].tolist(), counts[place].tolist())
        for tag, place in places.items()
        for low, high in [ends[place].tolist()]
    }


def _tensors(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield this rank's part of each tensor that it counts: fp64 [n], finite, n > 0."""
    for fragment in engine.fragments():
        if not engine.counts(fragment):
            continue
        found = {"weights": fragment.master}
        if not fragment.is_frozen and _FIRST_MOMENT in engine.basic_optimizer.state.get(fragment.key, {}):
            found["first_moment"] = fragment.moment(engine.basic_optimizer, _FIRST_MOMENT)
        for kind, values in found.items():
            finite = values.detach().to(engine.topology.device).double().flatten()
            finite = finite[finite.isfinite()]
            if finite.numel():
                yield f"{kind}/{fragment.tensor.name}", finite


def _bounds(least: float, most: float) -> tuple[float, float]:
    """Give a lone value a bin of some width."""
    return (least, most) if most > least else (least - 0.5, most + 0.5)


def _histogram(least: float, most: float, total: float, squares: float, counts: list[float]) -> Histogram:
    low, high = _bounds(least, most)
    edges = [low + (high - low) * number / NUM_BINS for number in range(NUM_BINS)] + [high]
    return Histogram(edges, counts, least, most, total, squares)
