"""Draw docs/schedules.svg: the rate of each style over the same run, by the function that training asks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lmscale.config.optim import OptimConfig
from lmscale.optim.lr import lr_at

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "schedules.svg"
TRAIN_TOKENS = 1000
COMMON: dict[str, Any] = {"lr": 1.0, "min_lr": 0.1, "lr_warmup_tokens": 100}
COOLDOWN_STYLES = ("linear", "cosine", "one_minus_sqrt", "exponential")
PANELS: dict[str, dict[str, dict[str, Any]]] = {
    "lr_decay_style": {
        "constant": {"lr_decay_style": "constant"},
        "cosine": {"lr_decay_style": "cosine"},
        "linear": {"lr_decay_style": "linear"},
        "polynomial, power 2": {"lr_decay_style": "polynomial", "lr_decay_power": 2},
        "inverse_sqrt": {"lr_decay_style": "inverse_sqrt"},
        "wsd": {"lr_decay_style": "wsd", "lr_cooldown_tokens": 200},
    },
    "lr_decay_style: wsd, by lr_cooldown_style": {
        style: {"lr_decay_style": "wsd", "lr_cooldown_tokens": 400, "lr_cooldown_style": style}
        for style in COOLDOWN_STYLES
    },
    "lr_cooldown and lr_rewarmup over cosine": {
        "cosine": {},
        "cooldown from 500": {"lr_cooldown": {"start_tokens": 500, "tokens": 250, "style": "one_minus_sqrt"}},
        "re-warm-up from 500": {"lr_rewarmup": {"start_tokens": 500, "tokens": 80, "fraction": 0.1}},
    },
}


def main() -> int:
    """Draw the picture."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "lmscale"})
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained", sharey=True)
    tokens = range(0, TRAIN_TOKENS + 1, 5)
    for panel, (title, lines) in zip(panels, PANELS.items(), strict=True):
        for name, keys in lines.items():
            optim = OptimConfig(**COMMON, **keys)
            panel.plot(tokens, [lr_at(t, optim, TRAIN_TOKENS) for t in tokens], label=name)
        panel.set(title=title, xlabel="tokens")
        panel.legend(frameon=False, fontsize="small")
    panels[0].set_ylabel("rate")
    figure.savefig(PICTURE, metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
