"""Curves as an SVG file, drawn without a plotting library."""

from __future__ import annotations

from dataclasses import dataclass, field

WIDTH, HEIGHT, MARGIN = 640, 320, 48
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")
GREY = "#888"
Points = list[tuple[float, float]]


@dataclass
class Plot:
    """Losses against steps.

    Attributes:
        curves: name -> (step, loss) points.
        levels: name -> a loss that is marked by a dashed line.
    """

    curves: dict[str, Points]
    levels: dict[str, float] = field(default_factory=dict)

    def svg(self) -> str:
        """Render the curves under a legend, with the range of losses and the last step on the axes."""
        losses = [loss for points in self.curves.values() for _, loss in points] + list(self.levels.values())
        self._low, self._high = min(losses), max(losses)
        self._last = max(step for points in self.curves.values() for step, _ in points)
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        ]
        at = float(MARGIN)
        for (name, points), color in zip(self.curves.items(), COLORS, strict=False):
            path = " ".join(f"{self._x(step):.1f},{self._y(loss):.1f}" for step, loss in points)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
            parts.append(_label(at, 20, name, color))
            at += 24 + 7 * len(name)
        for name, loss in self.levels.items():
            y = self._y(loss)
            ends = f'x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{y:.1f}" y2="{y:.1f}"'
            parts.append(f'<line {ends} stroke="{GREY}" stroke-dasharray="4 4"/>')
            parts.append(_label(WIDTH - MARGIN - 110, y - 5, f"{name} {loss:.2f}", GREY))
        parts += [
            _label(8, self._y(self._high) + 4, f"{self._high:.1f}"),
            _label(8, self._y(self._low) + 4, f"{self._low:.1f}"),
            _label(MARGIN, HEIGHT - 16, "step 0"),
            _label(WIDTH - MARGIN - 40, HEIGHT - 16, f"step {self._last:.0f}"),
            "</svg>",
        ]
        return "\n".join(parts) + "\n"

    def _x(self, step: float) -> float:
        return MARGIN + (WIDTH - 2 * MARGIN) * step / self._last

    def _y(self, loss: float) -> float:
        return MARGIN + (HEIGHT - 2 * MARGIN) * (self._high - loss) / max(self._high - self._low, 1e-9)


def _label(x: float, y: float, text: str, color: str = "#444") -> str:
    font = 'font-family="sans-serif" font-size="12"'
    return f'<text x="{x:.0f}" y="{y:.0f}" {font} fill="{color}">{text}</text>'
