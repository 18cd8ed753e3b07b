"""What a run has left in its directory, read back: config.yaml, manifest.json, metrics.jsonl, step_times.json."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lmscale.config.io import load_run
from lmscale.config.run import RunConfig
from lmscale.errors import DataError, LmscaleError

STEP, SAMPLES, TOKENS = "step", "consumed_samples", "consumed_tokens"
PROGRESS = (STEP, SAMPLES, TOKENS)
"""Keys that every record has."""

STEP_TIMES = "step_times.json"
"""As lmscale.train.watching writes it; that module would bring torch in."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """A metric over a run, in the order of its records.

    Attributes:
        tag: of the metric.
        steps: of each value.
        tokens: consumed by then.
        values: NaN where the run wrote null: a value that was not finite.
    """

    tag: str
    steps: list[int]
    tokens: list[int]
    values: list[float]

    @property
    def last(self) -> float:
        """The last finite value, NaN without any."""
        return next((value for value in reversed(self.values) if math.isfinite(value)), math.nan)


@dataclass(frozen=True)
class RunFiles:
    """A run's directory as it is now; the run may still be writing to it.

    Attributes:
        directory: of the run.
        manifest: manifest.json, empty where there is none.
        records: of metrics.jsonl, in order.
        keys: config.yaml as it stands, empty where there is none.
    """

    directory: Path
    manifest: Json
    records: list[Json]
    keys: Json

    @property
    def name(self) -> str:
        """What to call the run: its directory's name."""
        return self.directory.resolve().name

    @cached_property
    def config(self) -> RunConfig | LmscaleError:
        """The run's config; or why it cannot be read: another version may have written it."""
        try:
            return load_run(self.directory / "config.yaml")
        except LmscaleError as error:
            return error

    @cached_property
    def tags(self) -> list[str]:
        """The metrics' tags, in the order in which they first appear."""
        return list(dict.fromkeys(tag for record in self.records for tag in record if tag not in PROGRESS))

    def curve(self, tag: str) -> Curve:
        """Return a metric over the run; without a value where it was never written."""
        found = [record for record in self.records if tag in record]
        values = [math.nan if record[tag] is None else float(record[tag]) for record in found]
        return Curve(tag, [record[STEP] for record in found], [record[TOKENS] for record in found], values)

    def section(self, name: str) -> Json:
        """Return an object of manifest.json, empty where there is none."""
        found = self.manifest.get(name)
        return found if isinstance(found, dict) else {}

    def starts(self) -> list[Json]:
        """List the manifests of all starts of the run, the first first."""
        if not self.manifest:
            return []
        return [*(self.manifest.get("earlier_starts") or []), self.manifest]

    def extra(self, name: str) -> Json:
        """Read another JSON file of the directory, empty where there is none."""
        return _read_json(self.directory / name)


def read_run(directory: Path) -> RunFiles:
    """Read a run's directory.

    Raises:
        DataError: if there is no such directory, or it has no metrics.jsonl with a record in it.
    """
    path = directory / "metrics.jsonl"
    if not directory.is_dir():
        raise DataError("is no directory", field="run", value=str(directory), remedy="give a run's output_dir")
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        reason = error.strerror if path.exists() else "is not there"
        remedy = "give the output_dir of a run that has trained"
        raise DataError(f"metrics.jsonl {reason}", field="run", value=str(directory), remedy=remedy) from None
    records = [record for record in map(_record, lines) if record is not None]
    if not records:
        remedy = "wait for train.log_interval steps"
        raise DataError("metrics.jsonl has no record", field="run", value=str(directory), remedy=remedy)
    return RunFiles(directory, _read_json(directory / "manifest.json"), records, _read_yaml(directory / "config.yaml"))


def _record(line: bytes) -> Json | None:
    """Read a line, and of it what are numbers; None where it is torn, as the last one of a run that is writing may be."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    if not isinstance(record, dict) or not all(isinstance(record.get(key), int) for key in PROGRESS):
        return None
    return {tag: value for tag, value in record.items() if value is None or isinstance(value, int | float)}


def _read_json(path: Path) -> Json:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_yaml(path: Path) -> Json:
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
