"""What probing found: a table on the console, and a picture of the metric against the layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmscale.monitor.console import Console
from lmscale.probe.fit import DEV
from lmscale.tasks.base import Task

PLOT = "probing.png"
_WIDTH, _HEIGHT, _INCHES_TO_PIXELS = 7.0, 4.5, 120

Found = Mapping[str, Mapping[str, Any]]
"""By layer, or "mix": steps, best_step, splits (metrics by split), and of a mix its weights and scale."""


def best_of(found: Found, metric: str) -> str:
    """Return the layer whose classifier is the best on dev, of equal ones the first; without dev the last layer."""
    names = list(found)
    if DEV not in found[names[0]]["splits"]:
        return names[-1]

    def value(name: str) -> float:
        on_dev: float = found[name]["splits"][DEV][metric]
        return -math.inf if math.isnan(on_dev) else on_dev

    return max(names, key=value)


def show(found: Found, task: Task, console: Console, best: str) -> None:
    """Show every classifier's metrics; the best layer is marked."""
    rows: list[tuple[str, ...]] = []
    names: list[str] = []
    for each in found.values():
        for values in each["splits"].values():
            names += [name for name in values if name not in names]
    for layer, each in found.items():
        for split, values in each["splits"].items():
            figures = (f"{values[name]:.4f}" if name in values else "" for name in names)
            mark = " *" if layer == best and len(found) > 1 else ""
            rows.append((layer + mark, split, task.splits[split].domain, *figures))
    console.table("Probing, by layer", ["layer", "set", "domain", *names], rows)
    weights = found[best].get("mix_weights")
    if weights is not None:
        shares = ", ".join(f"{layer}: {weight:.3f}" for layer, weight in enumerate(weights))
        console.message(f"weights of the layers: {shares}; scale {found[best]['mix_scale']:.3f}")


def plot(found: Found, metric: str, path: Path, title: str) -> None:
    """Draw the metric of each set against the layer, control accuracies dashed; of a mix, its weights.

    Args:
        found: by layer.
        metric: that decides.
        path: of the picture.
        title: above it.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display is asked for
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    try:
        if "mix" in found:
            weights: Sequence[float] = found["mix"]["mix_weights"]
            panel.bar(range(len(weights)), weights)
            panel.set(xlabel="layer", ylabel="weight in the mix")
        else:
            _draw_layers(panel, found, metric)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_title(title)
        figure.savefig(path, dpi=_INCHES_TO_PIXELS)
    finally:
        pyplot.close(figure)


def _draw_layers(panel: Any, found: Found, metric: str) -> None:
    layers = [int(layer) for layer in found]
    for number, split in enumerate(next(iter(found.values()))["splits"]):
        for name, style in ((metric, "-"), ("control_accuracy", "--")):
            values = [each["splits"][split].get(name) for each in found.values()]
            if None not in values:
                label = split if name == metric else f"{split}, control"
                panel.plot(layers, values, style, marker="o", color=f"C{number}", label=label)
    panel.set(xlabel="layer (0: embeddings)", ylabel=metric)
    if panel.get_legend_handles_labels()[0]:
        panel.legend()
