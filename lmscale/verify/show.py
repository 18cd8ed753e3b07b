"""What the user sees of a verification: a bar on the way, then a table, or JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from lmscale.verify.comparison import Result, Verification
from lmscale.verify.layouts import Candidate

_STYLES = {"reference": "dim", "same": "green", "differs": "bold red", "failed": "bold red"}


class ProgressBar:
    """Shows on stderr how many layouts are done; where that is no terminal, a line for each.

    Args:
        total: layouts, the reference included.
    """

    def __init__(self, total: int):
        self._console = Console(stderr=True, highlight=False)
        self._total, self._done = total, 0
        # No thread of rich's: ranks are forked on the way, and a lock that it holds would stay locked in them.
        self._progress = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            TextColumn("{task.completed} of {task.total}"),
            TimeElapsedColumn(),
            console=self._console,
            auto_refresh=False,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=total)

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begins(self, layout: Candidate) -> None:
        """Name the layout that is trained."""
        self._progress.update(self._task, description=layout.name, refresh=True)

    def tick(self) -> None:
        """Move the clock."""
        self._progress.refresh()

    def ends(self, result: Result) -> None:
        """Count the layout."""
        self._done += 1
        self._progress.update(self._task, completed=self._done, refresh=True)
        if not self._console.is_terminal:
            self._console.print(f"{self._done} of {self._total}: {result.layout.name} {result.verdict}", markup=False)


def summary(verification: Verification) -> list[str]:
    """Say in lines what is compared."""
    plan, model = verification.plan, verification.plan.small.model
    batch, steps = plan.small.batch, plan.small.train.stop_at_step
    lines = [
        f"shrunk to {model.num_layers} layers, {model.hidden_size} wide, {model.num_attention_heads} heads "
        f"({model.query_groups} of keys and values), feed-forward {model.ffn_size}, vocabulary {model.vocab_size}; "
        f"{steps} steps of {batch.global_batch_size} sequences of {plan.small.data.seq_length}",
        f"data: {verification.data}",
        *plan.notes,
    ]
    if verification.has_cuda:
        lines.append("on the CPU over gloo: the CUDA devices of this machine are left alone")
    if plan.left_out:
        names = ", ".join(candidate.name for candidate in plan.left_out)
        lines.append(f"left out, since the run's layers, heads, widths or sequence do not divide: {names}")
    return lines


def show_table(verification: Verification, results: Sequence[Result]) -> None:
    """Print the summary and the table on stdout."""
    console = Console(highlight=False, soft_wrap=True)
    for line in summary(verification):
        console.print(line, markup=False)
    table = Table(
        Column("layout", no_wrap=True),
        Column("ranks", justify="right"),
        Column("loss differs by", justify="right"),
        Column("gradient norm by", justify="right"),
        Column("time", justify="right"),
        Column("verdict"),
    )
    for result in results:
        style = _STYLES[result.verdict]
        words = f"{result.verdict}: {result.reason}" if result.reason else result.verdict
        table.add_row(
            result.layout.name,
            str(result.layout.num_ranks),
            _number(result.loss_difference),
            _number(result.grad_norm_difference),
            f"{result.seconds:.1f} s",
            f"[{style}]{escape(words)}[/]",
        )
    console.print(table, soft_wrap=False)
    bad = sum(not result.is_good for result in results)
    verdict = f"{bad} of {len(results) - 1} layouts fail" if bad else f"all {len(results) - 1} layouts are the same"
    console.print(f"{verdict}, to {verification.plan.tolerance:g} relative", markup=False)
    if verification.directory is not None:
        console.print(f"rank logs: {verification.directory}", markup=False)


def to_json(verification: Verification, results: Sequence[Result]) -> str:
    """Render what the table shows as JSON; a difference that is no number is null."""
    plan = verification.plan
    return json.dumps(
        {
            "tolerance": plan.tolerance,
            "precision": plan.small.precision,
            "steps": plan.small.train.stop_at_step,
            "data": verification.data,
            "notes": summary(verification),
            "model": plan.small.model.model_dump(mode="json"),
            "left_out": [candidate.name for candidate in plan.left_out],
            "logs": None if verification.directory is None else str(verification.directory),
            "layouts": [_row(result) for result in results],
        },
        indent=2,
        allow_nan=False,
    )


def _row(result: Result) -> dict[str, Any]:
    layout = result.layout
    return {
        "layout": layout.name,
        "ranks": layout.num_ranks,
        "tp_size": layout.tp_size,
        "pp_size": layout.pp_size,
        "dp_size": layout.dp_size,
        "sequence_parallel": layout.sequence_parallel,
        "zero_stage": layout.zero_stage,
        "loss_difference": _finite(result.loss_difference),
        "grad_norm_difference": _finite(result.grad_norm_difference),
        "time_s": round(result.seconds, 3),
        "verdict": result.verdict,
        "reason": result.reason,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1e}"
