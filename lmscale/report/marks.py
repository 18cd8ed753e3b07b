"""What happened to a run and when: planned milestones, starts and restarts, skips, rewinds and faults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lmscale.config.run import RunConfig
from lmscale.errors import LmscaleError
from lmscale.monitor import metrics
from lmscale.optim.preview import preview
from lmscale.report.run_files import STEP, RunFiles

Kind = Literal["milestone", "start", "skip", "fault", "first"]
_FAULTS = {
    metrics.FAULTS_NON_FINITE: "not finite",
    metrics.FAULTS_LOSS_SPIKE: "loss spike",
    metrics.FAULTS_GRAD_NORM_SPIKE: "spike of the gradient norm",
    metrics.FAULTS_OVERFLOW_STORM: "storm of overflows",
}
_ACTIONS = {
    metrics.FAULTS_SKIP: "update withheld",
    metrics.FAULTS_REWIND: "rewound to a checkpoint",
    metrics.FAULTS_STOP: "run ended",
    metrics.FAULTS_NOTED: "nothing done",
}


@dataclass(frozen=True)
class Mark:
    """Something that happened, or was to happen, at a step.

    Attributes:
        step: at its end; a start goes on behind it.
        kind: milestone: by the schedules; start: the run was started again; skip: steps without an update; fault: the
            fault policy spoke, or a save failed; first: two runs that are compared part.
        text: what, in words.
    """

    step: int
    kind: Kind
    text: str


def milestones_of(run: RunFiles) -> list[Mark]:
    """List what the run's schedules do and when, as `lmscale preview` does.

    Raises:
        LmscaleError: if the run's config cannot be read, or its course not computed.
    """
    if not isinstance(run.config, RunConfig):
        raise run.config
    return [Mark(point.step, "milestone", what) for what, point in preview(run.config).milestones]


def known_milestones_of(run: RunFiles) -> list[Mark]:
    """Do as `milestones_of`, and list none where they are not known."""
    try:
        return milestones_of(run)
    except LmscaleError:
        return []


def events_of(run: RunFiles) -> list[Mark]:
    """List what happened to a run, by step."""
    return sorted([*_starts(run), *_skips(run), *_faults(run), *_failed_saves(run)], key=lambda mark: mark.step)


def _starts(run: RunFiles) -> list[Mark]:
    """List the starts after the first, with the reason where the supervisor noted one.

    A start that goes on from a step discards what was done beyond it, so the starts beyond it are not of this run's past;
    nor is any before a start that was told to go on from nothing.
    """
    if _begins_anew(run):
        return []
    found: list[Mark] = []
    reasons = list(run.manifest.get("restarts") or [])
    for start in run.starts()[1:]:
        step = start.get("resume_step") or 0
        found = [mark for mark in found if mark.step <= step]
        # A restart that found the run as the start before did is noted at the same step: the first fits.
        noted = next((each for each in reasons if each.get("resumed_step") == step), None)
        when = start.get("started_at", "")
        if noted is None:
            found.append(Mark(step, "start", f"started again at {when}"))
        else:
            reasons.remove(noted)
            found.append(Mark(step, "start", f"restarted at {when}: {noted.get('reason', '')}"))
    return found


def _begins_anew(run: RunFiles) -> bool:
    is_told = isinstance(run.config, RunConfig) and run.config.checkpoint.resume == "never"
    return is_told and not run.manifest.get("resume_step")


def _skips(run: RunFiles) -> Iterator[Mark]:
    """Yield the records in which the count of skipped steps has grown."""
    before, before_step = 0, 0
    for record in run.records:
        count = record.get(metrics.TRAIN_SKIPPED_STEPS)
        if count is not None and count > before:
            first, number = before_step + 1, int(count - before)
            where = f"in steps {first} to {record[STEP]}" if first < record[STEP] else ""
            plural = "steps" if number > 1 else "step"
            yield Mark(record[STEP], "skip", " ".join(filter(None, (f"{number} {plural} without an update", where))))
        if count is not None or metrics.TRAIN_LM_LOSS in record:
            before, before_step = int(count or before), record[STEP]


def _failed_saves(run: RunFiles) -> Iterator[Mark]:
    """Yield the records in which the count of failed saves has grown; each start counts anew."""
    before = 0
    for record in run.records:
        count = record.get(metrics.CHECKPOINT_FAILED_SAVES)
        if count is not None:
            if count > before:
                number = int(count - before)
                yield Mark(record[STEP], "fault", f"{number} {'saves' if number > 1 else 'save'} failed")
            before = int(count)


def _faults(run: RunFiles) -> Iterator[Mark]:
    for record in run.records:
        found = [words for tag, words in _FAULTS.items() if tag in record]
        done = [words for tag, words in _ACTIONS.items() if tag in record]
        if found:
            yield Mark(record[STEP], "fault", f"{', '.join(found)}: {', '.join(done) or 'told'}")
