"""Losses against steps, as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

Points = list[tuple[float, float]]


def plot_curves(path: Path, curves: Mapping[str, Points], levels: Mapping[str, float] | None = None) -> None:
    """Write curves, and losses that are marked by dashed lines.

    Args:
        path: an .svg or .png file.
        curves: name -> (step, loss) points.
        levels: name -> loss.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "lmscale"})  # the same bytes each time
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=name)
    for name, loss in (levels or {}).items():
        axes.axhline(loss, color="0.5", linestyle="--", linewidth=1, label=f"{name} {loss:.2f}")
    axes.set(xlabel="step", ylabel="loss, nats", xlim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
