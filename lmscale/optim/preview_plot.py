"""A preview as a picture: rate, batch size, sequence length and tokens against steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmscale.errors import ConfigError
from lmscale.optim.preview import Preview, short

_WIDTH, _HEIGHT = 11.0, 7.0
_INCHES_TO_PIXELS = 120


def plot_preview(preview: Preview, path: Path, title: str) -> None:
    """Write four panels against steps, with the tokens on the upper axis; milestones are dotted lines.

    Args:
        preview: what to draw.
        path: a file that matplotlib can write by its ending: .png, .svg, .pdf.
        title: above all.

    Raises:
        ConfigError: if the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display is asked for
    from matplotlib import pyplot

    counts = _count_formatter()
    figure, panels = pyplot.subplots(2, 2, figsize=(_WIDTH, _HEIGHT), layout="constrained")
    steps = [point.step for point in preview.points]
    for panel, (key, name) in zip(
        panels.flat,
        (
            ("lr", "learning rate"),
            ("batch_size", "batch size, sequences"),
            ("seq_length", "sequence length, tokens"),
            ("consumed_tokens", "tokens consumed"),
        ),
        strict=True,
    ):
        values = [getattr(point, key) for point in preview.points]
        panel.plot(steps, values, drawstyle="steps-pre" if key in ("batch_size", "seq_length") else "default")
        panel.set(xlabel="step", ylabel=name, ylim=(0, None))
        panel.xaxis.set_major_formatter(counts)
        if key != "lr":
            panel.yaxis.set_major_formatter(counts)
        for _, point in preview.milestones[1:-1]:
            panel.axvline(point.step, color="0.6", linestyle=":", linewidth=0.8)
        _add_token_axis(panel, preview, counts)
    if len({point.weight_decay for point in preview.points}) > 1:
        other = panels[0, 0].twinx()
        other.plot(steps, [point.weight_decay for point in preview.points], color="tab:orange", linestyle="--")
        other.set(ylim=(0, None))
        other.set_ylabel("weight decay", color="tab:orange")
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=_INCHES_TO_PIXELS)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be written: {error}", field="--plot", value=str(path)) from None
    finally:
        pyplot.close(figure)


def _count_formatter() -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda count, _: f"{count:g}" if count < 1000 else _short_tick(count))


def _short_tick(count: float) -> str:
    text = short(count)
    return text[:-1].rstrip("0").rstrip(".") + text[-1]


def _add_token_axis(panel: Any, preview: Preview, counts: Any) -> None:
    import numpy as np

    steps = np.array([0, *(point.step for point in preview.points)], dtype=float)
    tokens = np.array([0, *(point.consumed_tokens for point in preview.points)], dtype=float)

    def between(known: Any, wanted: Any) -> Any:
        """Interpolate, and go on in a straight line beyond the ends, as the axis' margins ask."""

        def at(x: Any) -> Any:
            slope = (wanted[-1] - wanted[0]) / (known[-1] - known[0])
            inside = np.interp(x, known, wanted)
            return inside + slope * (np.minimum(x - known[0], 0) + np.maximum(x - known[-1], 0))

        return at

    axis = panel.secondary_xaxis("top", functions=(between(steps, tokens), between(tokens, steps)))
    axis.set_xlabel("tokens")
    axis.xaxis.set_major_formatter(counts)
