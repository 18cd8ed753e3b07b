"""What the user watches: a progress bar on a terminal, a line per record anywhere else. Rank 0 alone has one."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any, Protocol, TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from lmscale.monitor import metrics
from lmscale.monitor.metrics import Record

_PLAIN_WIDTH = 160


class ConsoleLike(Protocol):
    """What the training loop needs of a console; `Console` on rank 0, `NullConsole` elsewhere."""

    def start(self, total_tokens: int, consumed_tokens: int = 0) -> None:
        """Begin the run's progress."""

    def update(self, record: Record) -> None:
        """Show the metrics of a step."""

    def message(self, text: str) -> None:
        """Show a line."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Show a table."""

    def close(self) -> None:
        """End the progress."""


class NullConsole:
    """Show nothing: the console of every rank but 0."""

    def start(self, total_tokens: int, consumed_tokens: int = 0) -> None:
        """Do nothing."""

    def update(self, record: Record) -> None:
        """Do nothing."""

    def message(self, text: str) -> None:
        """Do nothing."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Console:
    """Show a run on stderr: steps, loss, rate, tokens/s, time left, skipped steps.

    Args:
        file: where to write; stderr if None. The bar is drawn where it is a terminal.
    """

    def __init__(self, file: TextIO | None = None):
        stream = file or sys.stderr
        width = None if stream.isatty() else _PLAIN_WIDTH
        self._rich = RichConsole(file=stream, width=width, highlight=False, markup=False, emoji=False)
        self._progress: Progress | None = None
        self._task: Any = None
        self._total_tokens = 0
        self._handlers: list[tuple[logging.StreamHandler[Any], Any]] = []

    def start(self, total_tokens: int, consumed_tokens: int = 0) -> None:
        """Begin the run's progress, measured in tokens, at what is consumed already."""
        self._total_tokens = total_tokens
        if not self._rich.is_terminal:
            return
        self._progress = Progress(
            BarColumn(bar_width=24), TextColumn("{task.percentage:>3.0f}% {task.description}"), console=self._rich
        )
        self._task = self._progress.add_task("starting", total=total_tokens, completed=consumed_tokens)
        before = sys.stderr
        self._progress.start()
        self._lead_log_past_bar(before)

    def update(self, record: Record) -> None:
        """Move the bar, or print a line; held-out losses always get a line of their own."""
        for line in valid_lines(record):
            self.message(line)
        if metrics.TRAIN_LM_LOSS not in record.values and valid_lines(record):
            return
        line = progress_line(record, self._total_tokens)
        if self._progress is None:
            self.message(f"{self._percentage(record):3.0f}% {line}")
        else:
            self._progress.update(self._task, completed=record.consumed_tokens, description=line)

    def message(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        self._rich.print(text, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table."""
        table = Table(*columns, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        self._rich.print(table)

    def close(self) -> None:
        """End the bar, which stays on the screen as it is."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        while self._handlers:
            handler, stream = self._handlers.pop()
            handler.setStream(stream)

    def _percentage(self, record: Record) -> float:
        return 100 * record.consumed_tokens / self._total_tokens if self._total_tokens else 0.0

    def _lead_log_past_bar(self, before: TextIO) -> None:
        # While it is drawn, rich replaces sys.stderr to print above the bar; log handlers hold the stream from before.
        if sys.stderr is before:
            return
        for handler in logging.getLogger("lmscale").handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                self._handlers.append((handler, before))
                handler.setStream(sys.stderr)


def progress_line(record: Record, total_tokens: int) -> str:
    """Put a record into one line: step, loss, rate, tokens/s, time left by tokens, skipped steps if any."""
    values = record.values
    parts = [f"step {record.step}"]
    if metrics.TRAIN_LM_LOSS in values:
        parts.append(f"loss {values[metrics.TRAIN_LM_LOSS]:.4f}")
    if metrics.TRAIN_LR in values:
        parts.append(f"lr {values[metrics.TRAIN_LR]:.3e}")
    tokens_per_second = values.get(metrics.PERF_TOKENS_PER_SECOND, 0.0)
    if tokens_per_second > 0:
        remaining_s = max(0, total_tokens - record.consumed_tokens) / tokens_per_second
        parts += [f"{tokens_per_second:,.0f} tokens/s", f"{format_duration(remaining_s)} left"]
    if metrics.PERF_MFU_FRACTION in values:
        parts.append(f"MFU {values[metrics.PERF_MFU_FRACTION]:.1%}")
    if values.get(metrics.TRAIN_SKIPPED_STEPS):
        parts.append(f"skipped {values[metrics.TRAIN_SKIPPED_STEPS]:.0f}")
    return "  ".join(parts)


def valid_lines(record: Record) -> list[str]:
    """Put each held-out loss of a record into a line."""
    lines = []
    for tag, value in record.values.items():
        corpus = metrics.valid_corpus(tag)
        if corpus is None:
            continue
        perplexity = record.values.get(metrics.valid_perplexity_tag(corpus))
        suffix = "" if perplexity is None else f"  perplexity {perplexity:.2f}"
        lines.append(f"held out, {corpus}, step {record.step}: loss {value:.4f}{suffix}")
    return lines


def format_duration(duration_s: float) -> str:
    """Write a duration in its two largest units: "3d 04h", "2h 05m", "1m 09s", "8s"."""
    seconds = round(duration_s)
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days}d {hours % 24:02d}h"
    if hours:
        return f"{hours}h {minutes % 60:02d}m"
    if minutes:
        return f"{minutes}m {seconds % 60:02d}s"
    return f"{seconds}s"
