"""The page of tools/adaptation_quality.py: tables, a picture, and whether what was asked for has come."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaptation_runs import (
    BASE_BATCH,
    BASE_LENGTH,
    BASES,
    CASES,
    HOME,
    LOGGED,
    MARGIN,
    METHODS,
    NOISE,
    NUM_TRAIN,
    PROMPT_LENGTH,
    SCRATCH,
    SEEDS,
    SIZES,
    TEXTS,
    VOCAB_SIZE,
    Case,
)

from lmscale.report.adaptations import FULL, Comparison, MethodRow, Spread, compare
from lmscale.tasks import metrics

REFUSED = "refused: "
"""Begins the reason where the product takes a method for none of the model's: what is asked does not hold there."""
PAGE, PICTURE = Path("docs/adaptation_results.md"), Path("docs/adaptation_results.svg")


@dataclass(frozen=True)
class Trained:
    """A run's results and its last training loss."""

    results: dict[str, Any]
    loss: float


@dataclass
class Found:
    """What came of a case.

    Attributes:
        name, case: which.
        untrained: results of the base with a new head, by seed.
        scratch: what all of a model came to that was never pretrained, by seed.
        search: dev's metric with the first seed, by method and rate.
        methods: the best rate and the runs at it, by method.
        failures: what did not come, by method: a refusal, or how many seeds there are.
    """

    name: str
    case: Case
    untrained: list[dict[str, Any]] = field(default_factory=list)
    scratch: list[Trained] = field(default_factory=list)
    search: dict[str, dict[float, float]] = field(default_factory=dict)
    methods: dict[str, tuple[float, list[Trained]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def comparison(self) -> Comparison:
        """The methods side by side."""
        return compare((name, each.results) for name, (_, runs) in self.methods.items() for each in runs)

    def loss(self, method: str) -> Spread:
        """Return the training loss over the last steps."""
        return Spread.of([each.loss for each in self.methods[method][1]])


@dataclass(frozen=True)
class Verdict:
    """What was asked of a case, and whether it has come.

    Attributes:
        floor: the better of the untrained model and the constant answer, on the in-domain test set.
        missed: methods that are not MARGIN above it, with what they are above it.
        lower: methods with a lower last training loss than full fine-tuning.
    """

    floor: float
    missed: dict[str, float]
    lower: list[str]


def judge(found: Found) -> Verdict:
    """Hold a case against what is asked of it."""
    floor = max(_untrained(found, "test").mean, constant(found, "test"))
    gains = {row.name: row.sets["test"].mean - floor for row in found.comparison.rows}
    losses = {name: found.loss(name).mean for name in found.methods}
    lower = [name for name, loss in losses.items() if loss < losses.get(FULL, -math.inf)]
    return Verdict(floor, {name: gain for name, gain in gains.items() if gain < MARGIN}, lower)


def constant(found: Found, split: str) -> float:
    """Return the metric of the answer that is the most frequent in the training set, given always."""
    train, lines = _lines(found, "train"), _lines(found, split)
    if found.case.task["kind"] == "classification":
        common = Counter(line["label"] for line in train).most_common(1)[0][0]
        return statistics.fmean(line["label"] == common for line in lines)
    references = [_references(line) for line in lines]
    common = Counter(_references(line)[0] for line in train).most_common(1)[0][0]
    measure = metrics.generation if found.case.task["kind"] == "generation" else metrics.question_answering
    return measure([common] * len(lines), references)[found.comparison.metric]


def _references(line: dict[str, Any]) -> list[str]:
    answers: list[str] = line["answers"]["text"] if "answers" in line else line["target"]
    return answers


def _lines(found: Found, split: str) -> list[dict[str, Any]]:
    text = (HOME / "tasks" / found.case.folder / f"{split}.jsonl").read_text().splitlines()
    limit = found.case.limits.get({"train": "", "dev": "dev_limit"}.get(split, "test_limit"))
    return [json.loads(line) for line in text[:limit]]


def _untrained(found: Found, split: str) -> Spread:
    return Spread.of([results["splits"][split][results["metric"]] for results in found.untrained])


def write_page(found: list[Found]) -> bool:
    """Write the page and its picture, and return whether all that is asked for has come.

    What the page has of cases that were not measured here stays on it.
    """
    ready = {each.name: each for each in found if each.methods and each.untrained and all(each.untrained)}
    kept = read_parts(PAGE.read_text(encoding="utf-8")) if PAGE.is_file() else {}
    verdicts = {name: judge(each) for name, each in ready.items()}
    parts = {
        name: (_asked(ready[name], verdicts[name]), _section(ready[name], verdicts[name]))
        if name in ready
        else kept.get(name, (f"- {name} ({case.shown}): not measured. {case.unmeasured}".rstrip(), []))
        for name, case in CASES.items()
    }
    lines = [*_head(), "", *_summary(), "", *(asked for asked, _ in parts.values())]
    lines += ["", f"![The metric by the share that is trained]({PICTURE.name})"]
    for _, section in parts.values():
        lines += ["", *section] if section else []
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw([section for _, section in parts.values() if section])
    has_all = len(ready) == len(found) and all(
        len(each.methods.get(name, ("", []))[1]) == len(SEEDS) or each.failures.get(name, "").startswith(REFUSED)
        for each in ready.values()
        for name in each.search.keys() | each.failures.keys()
    )
    return has_all and not any(verdict.missed or verdict.lower for verdict in verdicts.values())


def read_parts(page: str) -> dict[str, tuple[str, list[str]]]:
    """Read each measured case's line of what was asked, and its section, from a page."""
    sections = (section.strip().splitlines() for section in page.split("\n## "))
    by_name = {lines[0].partition(": ")[0]: [f"## {lines[0]}", *lines[1:]] for lines in sections if ": " in lines[0]}
    asked = {line[2:].partition(": ")[0]: line for line in page.splitlines() if line.startswith("- ")}
    return {name: (asked[name], lines) for name, lines in by_name.items() if name in asked}


def _head() -> list[str]:
    sizes = f"{SIZES['num_layers']} layers of {SIZES['hidden_size']}, {VOCAB_SIZE} tokens"
    return [
        "# Every method on small tasks",
        "",
        "Written by `nice -n 10 .venv/bin/python tools/adaptation_quality.py`, which makes everything that is needed, and goes",
        "on where it was stopped. Figures are means over seeds "
        + f"{', '.join(map(str, SEEDS))} with the standard deviation, whatever they turned out to be.",
        "",
        f"- Models: {sizes}, pretrained on the unlabelled text of `examples/make_tasks.py`, in rows of {BASE_LENGTH} tokens,",
        f"  {BASE_BATCH} to a step: {_bases()}.",
        "  The text has the words of both domains, and no label. In `text.jsonl` what was said is said again in other words; in",
        "  `text-topic.jsonl`, which `roberta_topic` reads, a passage keeps to a topic. But for size, dropout (0) and RoBERTa's",
        "  initialization (`fan_in`, for so narrow a model), the architectures are the published ones.",
        f"- Tasks: docs/tasks.md; {NUM_TRAIN:,} training lines, of which {NOISE:.0%} are wrong. `ood` has other names, things "
        "and turns of phrase.",
        "- Rates: each method's better of two on dev, with the first seed. Weights: those of the best evaluation of dev.",
        f"- Sizes: LoRA of rank 8 on query and value, Houlsby adapters of width 16, {PROMPT_LENGTH} vectors for prefixes and "
        "prompts. A head is",
        "  trained with each method. The share of a small model is large: the same methods have far less than 1 % of a large",
        "  one.",
        f"- `train loss` is the mean over the last {LOGGED} steps, wrong lines included. `peak MB` is all that the process "
        "held, some 450 MB",
        f"  of interpreter and libraries included. Machine: {_machine()};",
        "  other work ran beside it, so that `seconds` say little.",
    ]


def _bases() -> str:
    return ", ".join(
        f"{name} {base.steps:,} steps" + (f" (`--told {TEXTS[base.text].told}`)" if TEXTS[base.text].told > 1 else "")
        for name, base in BASES.items()
    )


def _machine() -> str:
    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    return f"{os.cpu_count()} cores of {model or platform.machine()}, one thread to a run"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def _summary() -> list[str]:
    return [
        "## What was asked",
        "",
        "Before anything was measured, `tools/adaptation_runs.py` asked that each method's mean on `test` be",
        f"{MARGIN} above both the untrained model (the base with a new head, or as it writes without training) and the most",
        "frequent answer given always, and that full fine-tuning reach the lowest training loss. The margin stayed as it was;",
        "rates, texts and lengths were chosen on the way. `table_t5` and `topic` were added when `nli` had stayed at chance.",
    ]


def _asked(found: Found, verdict: Verdict) -> str:
    """Say whether what was asked of a case has come."""
    missed = ", ".join(f"{name} ({gain:+.3f})" for name, gain in verdict.missed.items())
    lower = f"lower training loss than full: {', '.join(verdict.lower)}." if verdict.lower else "full is the lowest."
    failures = "".join(f" {', '.join(names)}: {reason}." for reason, names in _by_reason(found).items())
    margin = f"missed by {missed}" if missed else "every method that was trained has the margin"
    return f"- {found.name}: {margin}; {lower}{failures}"


def _by_reason(found: Found) -> dict[str, list[str]]:
    by_reason: dict[str, list[str]] = {}
    for name, reason in found.failures.items():
        by_reason.setdefault(reason, []).append(name)
    return by_reason


def _section(found: Found, verdict: Verdict) -> list[str]:
    comparison = found.comparison
    columns = ["method", "rate", "train loss", "dev", "test", "above floor", "ood", "ood less full"]
    columns += ["trained", "share", "peak MB", "seconds"]
    lines = [
        f"## {found.name}: {found.case.shown}",
        "",
        f"{comparison.metric}; {found.case.epochs} epochs of batches of {found.case.batch}. The floor on `test` is "
        f"{verdict.floor:.3f}.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]
    lines += ["| " + " | ".join(cells) + " |" for cells in _rows(found, comparison, verdict)]
    searched = "; ".join(
        f"{name} " + ", ".join(f"{rate:g}: {value:.3f}" for rate, value in rates.items() if math.isfinite(value))
        for name, rates in found.search.items()
        if any(map(math.isfinite, rates.values()))
    )
    note = ["", found.case.note] if found.case.note else []
    return [*lines, "", f"The search, {comparison.metric} on dev by rate: {searched}.", *note]


def _rows(found: Found, comparison: Comparison, verdict: Verdict) -> Iterator[list[str]]:
    for row in comparison.rows:
        yield [row.name, f"{found.methods[row.name][0]:g}", str(found.loss(row.name)), *_sets(row, comparison, verdict)]
    blank = [""] * 4
    if found.scratch:
        row = compare((SCRATCH, each.results) for each in found.scratch).rows[0]
        loss = Spread.of([each.loss for each in found.scratch])
        yield ["from scratch", f"{found.case.scratch_rate:g}", str(loss), *_sets(row, comparison, verdict)]
    sets = {split: _untrained(found, split) for split in ("dev", "test", "ood")}
    yield ["untrained", "", "", str(sets["dev"]), str(sets["test"]), "", str(sets["ood"]), "", *blank]
    same = {split: f"{constant(found, split):.3f}" for split in ("dev", "test", "ood")}
    yield ["most frequent", "", "", same["dev"], same["test"], "", same["ood"], "", *blank]


def _sets(row: MethodRow, comparison: Comparison, verdict: Verdict) -> list[str]:
    full = comparison.full
    less = "" if full is None else f"{row.sets['ood'].mean - full.sets['ood'].mean:+.3f}"
    gain = f"{row.sets['test'].mean - verdict.floor:+.3f}" + (" missed" if row.name in verdict.missed else "")
    seeds = "" if row.seeds == len(SEEDS) else f" ({row.seeds} seeds)"
    cells = [str(row.sets["dev"]), f"{row.sets['test']}{seeds}", gain, str(row.sets["ood"]), less]
    cells += [f"{row.trainable:,}", f"{row.trainable / row.total:.2%}"]
    return [*cells, f"{row.peak_bytes / 2**20:,.0f}", f"{row.seconds:.0f}"]


@dataclass(frozen=True)
class Point:
    """A method in the picture: (mean, deviation) of its metric on test and ood, by the share that it trains."""

    method: str
    share: float
    sets: dict[str, tuple[float, float]]


def read_points(section: list[str]) -> list[Point]:
    """Read the methods of a section's table."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in section if line.startswith("| ")]
    columns, rows = cells[0], [dict(zip(cells[0], row, strict=True)) for row in cells[1:] if row[0] in METHODS]
    assert {"method", "share", *_SETS} <= set(columns)
    return [
        Point(
            row["method"],
            float(row["share"].rstrip("%")) / 100,
            {name: (float(row[name].split()[0]), float(row[name].split()[2])) for name in _SETS},
        )
        for row in rows
    ]


_SETS = {"test": True, "ood": False}
"""The sets in the picture, and whether their points are filled."""


def draw(sections: list[list[str]]) -> None:
    """Draw each section's metric, in and out of domain, by the share that is trained."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "lmscale"})  # the same bytes each time
    from matplotlib import pyplot

    width = max(1, len(sections))
    figure, panels = pyplot.subplots(1, width, figsize=(4.4 * width, 4.0), squeeze=False)
    figure.set_layout_engine("constrained")
    colours = {method: f"C{number}" for number, method in enumerate(METHODS)}
    for panel, section in zip(panels[0], sections, strict=False):
        for point in read_points(section):
            colour = colours[point.method]
            for name, filled in _SETS.items():
                mean, deviation = point.sets[name]
                style = {"fmt": "o", "capsize": 3, "color": colour, "markerfacecolor": colour if filled else "white"}
                panel.errorbar(point.share, mean, yerr=deviation, **style)
            panel.plot([], [], "o", color=colour, label=point.method)
        title, metric = section[0].removeprefix("## ").partition(":")[0], section[2].partition(";")[0]
        floor = float(section[2].rpartition(" is ")[2].rstrip("."))
        panel.axhline(floor, color="0.5", linestyle="--", linewidth=1)
        panel.set(xscale="log", xlabel="share of parameters trained", ylabel=metric, title=title)
        panel.legend(fontsize=7, frameon=False)
    figure.supxlabel("filled: test; hollow: out of domain; dashed: floor of test", fontsize=8)
    figure.savefig(PICTURE, metadata={"Date": None})
    pyplot.close(figure)
