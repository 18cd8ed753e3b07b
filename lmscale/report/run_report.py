"""`lmscale report`: all that a run's directory says of the run, as one page."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from html import escape
from typing import Any

from lmscale.errors import LmscaleError
from lmscale.monitor import metrics
from lmscale.monitor.console import format_duration
from lmscale.optim.preview import short
from lmscale.report.charts import figure
from lmscale.report.marks import Mark, events_of, known_milestones_of, milestones_of
from lmscale.report.page import page, paragraph, table
from lmscale.report.planned import planned_rows
from lmscale.report.run_charts import held_out_charts, run_charts
from lmscale.report.run_files import STEP, STEP_TIMES, TOKENS, RunFiles

_MOST_EVENTS = 200
"""In the table; a run that skips more than that has other troubles."""
_KINDS = {"milestone": "milestone", "start": "start", "skip": "skipped", "fault": "fault"}


def run_report(run: RunFiles) -> str:
    """Render the report of a run as HTML."""
    events = events_of(run)
    marks = [*known_milestones_of(run)[1:-1], *events]  # without the first and the last step
    one = [("run", run)]
    sections = [
        ("Curves", _charts(figure(chart) for chart in run_charts(one, marks)) + _key(marks)),
        ("Held out", _held_out(run, marks)),
        ("Milestones", _milestones(run)),
        ("Restarts, skips and faults", _events(events)),
        ("The plan against the measured", _plan(run)),
        ("Step time by rank", _step_times(run)),
        ("Environment", _environment(run)),
        ("Config", _config(run)),
    ]
    return page(f"Run {run.name}", _lead(run), [(heading, html) for heading, html in sections if html])


def _lead(run: RunFiles) -> str:
    last, starts = run.records[-1], run.starts()
    parts = [f"step {last[STEP]:,}", f"{short(last[TOKENS])} tokens consumed"]
    loss = run.curve(metrics.TRAIN_LM_LOSS)
    if loss.values:
        parts.append(f"training loss {loss.last:.4f}")
    for tag in run.tags:
        corpus = metrics.valid_corpus(tag)
        if corpus is not None:
            parts.append(f"held-out loss on {corpus} {run.curve(tag).last:.4f}")
    if starts:
        parts.append(f"first started at {starts[0].get('started_at', 'an unknown time')}")
    return paragraph(" · ".join(parts)) + paragraph(str(run.directory.resolve()), "soft")


def _charts(figures: Iterator[str]) -> str:
    return f'<div class="charts">{"".join(figures)}</div>'


def _key(marks: list[Mark]) -> str:
    """Explain the lines across the charts."""
    words = {
        "milestone": "dotted: a milestone of the schedules",
        "start": "dashed: the run was started again",
        "skip": "at the bottom: steps without an update",
        "fault": "dashed and dotted: a fault, or a save that failed",
    }
    kinds = dict.fromkeys(mark.kind for mark in marks)
    items = (
        f'<span class="key"><i class="dot" style="background:var(--{kind})"></i>{escape(words[kind])}</span> '
        for kind in kinds
    )
    return f'<p class="soft">{"".join(items)}</p>'


def _held_out(run: RunFiles, marks: list[Mark]) -> str:
    charts = list(held_out_charts([("run", run)], marks))
    if not charts:
        return ""
    rows = []
    for record in run.records:
        for tag, value in record.items():
            corpus = metrics.valid_corpus(tag)
            if corpus is not None and value is not None:
                perplexity = record.get(metrics.valid_perplexity_tag(corpus))
                shown = "" if perplexity is None else f"{perplexity:.2f}"
                rows.append([corpus, f"{record[STEP]:,}", short(record[TOKENS]), f"{value:.4f}", shown])
    columns = ["corpus", "step", "tokens", "loss, nats/token", "perplexity"]
    html = _charts(figure(chart) for chart in charts)
    return html + (_folded("All values", table(columns, rows, (1, 2, 3, 4))) if rows else "")


def _milestones(run: RunFiles) -> str:
    try:
        found = milestones_of(run)
    except LmscaleError as error:
        return paragraph(f"Not known: {error}", "soft")
    done = run.records[-1][STEP]
    rows = [[f"{mark.step:,}", mark.text, "passed" if mark.step <= done else "to come"] for mark in found]
    return table(["step", "milestone", ""], rows, (0,))


def _events(events: list[Mark]) -> str:
    if not events:
        return paragraph("None.", "soft")
    rows = [[f"{mark.step:,}", _KINDS[mark.kind], mark.text] for mark in events[:_MOST_EVENTS]]
    left = len(events) - len(rows)
    more = paragraph(f"{left:,} more are not listed.", "soft") if left else ""
    return table(["step", "what", ""], rows, (0,)) + more


def _plan(run: RunFiles) -> str:
    try:
        rows, where = planned_rows(run)
    except LmscaleError as error:
        return paragraph(f"Not known: {error}", "soft")
    cells = [
        [row.what, row.planned, row.measured, f"{row.ratio:.2f}" if row.ratio == row.ratio else ""] for row in rows
    ]
    note = "Measured since the last start; times are medians over its records of full batch size and length, without the first."
    head = paragraph(f"Planned for {where}. {note}", "soft")
    return head + table(["", "planned", "measured", "measured / planned"], cells, (1, 2, 3))


def _step_times(run: RunFiles) -> str:
    found = run.extra(STEP_TIMES)
    if not {"ranks", "steps", "step"} <= found.keys():
        return ""
    rows = [
        [
            str(rank["rank"]),
            rank["host"],
            f"{rank['step_s']:.4g}",
            f"{rank['own_s']:.4g}",
            f"{rank['waiting_s']:.4g}",
            "" if rank.get("bubble_fraction") is None else f"{rank['bubble_fraction']:.3f}",
        ]
        for rank in found["ranks"]
    ]
    columns = ["rank", "host", "step, s", "own, s", "waiting for others, s", "bubble"]
    note = f"Means over {found['steps']:,} steps up to step {found['step']:,}, the slowest rank first."
    return paragraph(note, "soft") + table(columns, rows, (0, 2, 3, 4, 5))


def _environment(run: RunFiles) -> str:
    manifest = run.manifest
    if not manifest:
        return paragraph("manifest.json is not there.", "soft")
    rows = [[name, str(value)] for name, value in run.section("versions").items()]
    rows += [[f"commit of {name}", str(value)] for name, value in run.section("git").items() if value]
    rows += [["hosts", ", ".join(map(str, manifest.get("hosts") or []))]]
    rows += [["device", _inline(run.section("device"))]] if run.section("device") else []
    rows += [["layout", _inline(run.section("layout"))]]
    rows += [["command", shlex.join(map(str, manifest.get("command") or []))]]
    rows += [[f"corpus {prefix}", str(digest)] for prefix, digest in run.section("data").items()]
    rows += [
        ["last start", str(manifest.get("started_at") or "")],
        ["sha256 of config.yaml", str(manifest.get("config_sha256") or "")],
    ]
    trained_s = _trained_s(run)
    rows += [["time in training steps", format_duration(trained_s)]] if trained_s else []
    return table(["", ""], rows)


def _trained_s(run: RunFiles) -> float:
    """Sum the time of the steps that count, from record to record."""
    total, before = 0.0, 0
    for record in run.records:
        seconds = record.get(metrics.PERF_STEP_TIME_S)
        if seconds is not None:
            total += seconds * (record[STEP] - before)
            before = record[STEP]
    return total


def _inline(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _config(run: RunFiles) -> str:
    try:
        text = (run.directory / "config.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    manifest = json.dumps(run.manifest, indent=1, ensure_ascii=False)
    return _folded("config.yaml", f"<pre>{escape(text)}</pre>") + _folded(
        "manifest.json", f"<pre>{escape(manifest)}</pre>"
    )


def _folded(title: str, html: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{html}</details>"
