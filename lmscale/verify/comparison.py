"""Train the shrunk copy of a run on every layout and compare losses and gradient norms with one rank."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from lmscale.config.adapt import prompt_length
from lmscale.config.check import CROSS_SECTION_RULES
from lmscale.config.deepspeed_json import check_deepspeed, load_deepspeed
from lmscale.config.run import RunConfig
from lmscale.errors import ConfigError, RunError
from lmscale.launcher.environment import visible_devices
from lmscale.tasks.resolve import resolve_task
from lmscale.verify.corpus import shrink_corpora
from lmscale.verify.layouts import Candidate, all_layouts, parse_layouts, reference_layout
from lmscale.verify.shrink import fits, lay_out, shrink

TOLERANCES = {"fp32": 1.0e-5, "bf16": 5.0e-3, "fp16": 2.0e-3}
"""Largest relative difference that passes. In fp32 the order of sums makes 5e-7; in half precision rounding makes up to
4e-4 (bf16) and 1e-4 (fp16), and hides small mistakes. Each is over ten times what right layouts were seen to make."""


@dataclass(frozen=True)
class Result:
    """What became of one layout.

    Differences are the largest over the steps, relative to the reference; NaN where it did not train.
    """

    layout: Candidate
    loss_difference: float
    grad_norm_difference: float
    seconds: float
    verdict: Literal["reference", "same", "differs", "failed"]
    reason: str = ""
    """Of a failure, in one line."""

    @property
    def is_good(self) -> bool:
        """Whether the layout passed."""
        return self.verdict in ("reference", "same")


@dataclass(frozen=True)
class Plan:
    """A checked verification."""

    config: RunConfig
    small: RunConfig
    candidates: tuple[Candidate, ...]
    """Without the reference."""
    left_out: tuple[Candidate, ...]
    """Layouts that could be trained, but not with this run: heads, layers or the sequence do not divide."""
    notes: tuple[str, ...]
    """What the copy does otherwise than the run."""

    @property
    def tolerance(self) -> float:
        """Largest relative difference that passes."""
        return TOLERANCES[self.small.precision]

    @property
    def reference(self) -> Candidate:
        """The layout that the others are compared with."""
        return reference_layout(self.small.precision, self.small.parallel.recompute)


class Observer(Protocol):
    """Who watches; every method is called on the way."""

    def begins(self, layout: Candidate) -> None:
        """Take note that a layout is about to be trained."""

    def tick(self) -> None:
        """Take note that some time has passed."""

    def ends(self, result: Result) -> None:
        """Take note that a layout is done."""


def plan_verification(
    config: RunConfig, layouts: str | None = None, max_ranks: int = 4, steps: int = 5, precision: str = "fp32"
) -> Plan:
    """Check a run, make its shrunk copy and choose the layouts.

    Args:
        config: the user's run.
        layouts: names, separated by commas; None takes every layout that can be trained.
        max_ranks: ranks that a layout may take.
        steps: optimizer steps.
        precision: of the copy.

    Raises:
        ConfigError: if the run is wrong in itself, or a layout that is named cannot be trained.
        DataError: if a file of its task is wrong.
    """
    for option, number in (("--max-ranks", max_ranks), ("--steps", steps)):
        if number < 1:
            raise ConfigError("must be at least 1", field=option, value=number)
    if precision not in TOLERANCES:
        raise ConfigError(f"must be one of {', '.join(TOLERANCES)}", field="--precision", value=precision)
    config = resolve_task(config, prompt_length(config.adapt))
    check_deepspeed(load_deepspeed(config.deepspeed), config)
    for rule in CROSS_SECTION_RULES:
        rule(config)
    if layouts is None:
        candidates = all_layouts(max_ranks, precision, config.parallel.recompute)
    else:
        candidates = parse_layouts(layouts, max_ranks, precision)
    reference = reference_layout(precision, config.parallel.recompute)
    small, notes = shrink(config, [*candidates, reference], steps, precision)
    if layouts is not None:
        for candidate in candidates:
            _check_fits(small, candidate)
    fitting = tuple(candidate for candidate in candidates if fits(small, candidate))
    left_out = tuple(candidate for candidate in candidates if candidate not in fitting)
    return Plan(config, small, fitting, left_out, tuple(notes))


def _check_fits(small: RunConfig, candidate: Candidate) -> None:
    try:
        lay_out(small, candidate)
    except ConfigError as error:
        raise ConfigError(
            f"the run, shrunk so that it divides as it did, does not fit: {error}",
            field="--layouts",
            value=candidate.name,
        ) from None


class Verification:
    """A plan at work, in a directory of its own, which stays where a layout failed."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.data = ""
        """Where the tokens come from."""
        self.directory: Path | None = None
        """Rank logs, where a layout failed."""
        self.has_cuda = visible_devices(os.environ) is not None

    def results(self, observer: Observer) -> Iterator[Result]:
        """Train the reference, then every layout, and compare.

        Raises:
            RunError: if the reference itself does not train.
        """
        _import_quietly()
        with self._workspace() as directory:
            small, self.data = shrink_corpora(self.plan.config, self.plan.small, directory)
            small = self._with_base(small, directory, observer)
            reference, series = self._trial(small, self.plan.reference, [], directory, observer)
            yield reference
            if not reference.is_good:
                rule = f"one rank, with which layouts are compared, does not train: {reference.reason}"
                raise RunError(rule, field="verify", remedy=f"see {directory}")
            for candidate in self.plan.candidates:
                yield self._trial(small, candidate, series, directory, observer)[0]

    def _with_base(self, small: RunConfig, directory: Path, observer: Observer) -> RunConfig:
        """Write the base that an adaptation starts from, if it is one."""
        if small.model.init_from is None:
            return small
        from lmscale.parallel.local_ranks import RankFailure
        from lmscale.verify.trial import write_base

        try:
            base = write_base(small, directory / "base", observer.tick)
        except RankFailure as failure:
            self.directory = directory
            rule = f"the base of the copy cannot be made: {failure.reason}"
            raise RunError(rule, field="verify", remedy=f"see {directory}") from None
        return small.model_copy(update={"model": small.model.model_copy(update={"init_from": base})})

    @contextlib.contextmanager
    def _workspace(self) -> Iterator[Path]:
        directory = Path(tempfile.mkdtemp(prefix="lmscale-verify-"))
        try:
            yield directory
        finally:
            if self.directory is None:
                shutil.rmtree(directory, ignore_errors=True)

    def _trial(
        self,
        small: RunConfig,
        candidate: Candidate,
        reference: list[tuple[float, float]],
        directory: Path,
        observer: Observer,
    ) -> tuple[Result, list[tuple[float, float]]]:
        from lmscale.parallel.local_ranks import RankFailure
        from lmscale.verify.trial import train_on_ranks

        observer.begins(candidate)
        is_reference = not reference
        name = "reference" if is_reference else candidate.name
        placed = lay_out(small, candidate).model_copy(update={"output_dir": str(directory / name)})
        start = time.monotonic()
        try:
            series = train_on_ranks(placed, candidate.num_ranks, candidate.is_pipeline, observer.tick)
        except RankFailure as failure:
            self.directory, series = directory, []
            result = Result(candidate, math.nan, math.nan, time.monotonic() - start, "failed", failure.reason)
        else:
            shutil.rmtree(placed.output_dir, ignore_errors=True)
            result = self._compare(candidate, series, reference or series, time.monotonic() - start, is_reference)
        observer.ends(result)
        return result, series

    def _compare(
        self,
        candidate: Candidate,
        series: list[tuple[float, float]],
        reference: list[tuple[float, float]],
        seconds: float,
        is_reference: bool,
    ) -> Result:
        if len(series) != len(reference):
            reason = f"trained {len(series)} steps in the place of {len(reference)}"
            return Result(candidate, math.nan, math.nan, seconds, "failed", reason)
        loss, norm = (
            largest_difference([step[column] for step in series], [step[column] for step in reference])
            for column in (0, 1)
        )
        if is_reference:
            if not all(math.isfinite(loss) for loss, _ in series):
                return Result(candidate, math.nan, math.nan, seconds, "failed", "its loss is not finite")
            return Result(candidate, loss, norm, seconds, "reference")
        is_same = max(loss, norm) <= self.plan.tolerance
        return Result(candidate, loss, norm, seconds, "same" if is_same else "differs")


def _import_quietly() -> None:
    """Import what ranks are forked with; DeepSpeed prints to stdout meanwhile, which is for the result."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module("lmscale.verify.trial")


def largest_difference(values: Sequence[float], reference: Sequence[float]) -> float:
    """Compute max |v - r| / |r|; two values that are not finite agree, one beside a finite one differs by infinity."""
    return max(itertools.starmap(_difference, zip(values, reference, strict=True)))


def _difference(value: float, reference: float) -> float:
    if not math.isfinite(value) or not math.isfinite(reference):
        return 0.0 if math.isfinite(value) == math.isfinite(reference) else math.inf
    return 0.0 if value == reference else abs(value - reference) / abs(reference or value)
