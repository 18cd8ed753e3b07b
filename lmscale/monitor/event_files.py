"""Cutting TensorBoard's event files back to a step.

TensorBoard's own way after a restart, a session-log event with purge_step, drops every event of every tag whose x is at
or past that step. A curve over tokens has an x of millions at step 1, so it would lose its whole past at each resume,
and readers that know no session logs (TensorBoard's own data server) would still meet the overwritten steps. Cutting
the files is right for every reader.

An event file is a sequence of TFRecords: length (uint64), its checksum (uint32), an Event message, its checksum
(uint32).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lmscale.monitor.atomic import replaced
from lmscale.monitor.metrics import BY_TOKENS_SUFFIX

_HEADER_BYTES, _FOOTER_BYTES = 12, 4
SAMPLES_PREFIX = "samples/"
"""Of the tags of texts that belong to a step."""
_OTHER_AXIS_SUFFIXES = (BY_TOKENS_SUFFIX, " vs samples", " vs tokens")


def cut_events(directory: Path, resume_step: int | None) -> None:
    """Drop what an event directory holds past `resume_step` (all, where it is None), each file atomically.

    Kept are scalars, histograms and samples up to resume_step, and texts before it: a run writes its texts anew when it
    starts, at that step. Layout and hyperparameters, of which a run may have one each, are dropped: they are written anew
    too. A torn last record is dropped. A file of which nothing remains is removed.

    Args:
        directory: holds events.out.tfevents.* files, all written by `TensorBoardWriter`.
        resume_step: the step that the run continues from.
    """
    for path in sorted(directory.glob("events.out.tfevents.*")):
        if resume_step is None:
            path.unlink()
        else:
            _cut_file(path, resume_step)


def _cut_file(path: Path, resume_step: int) -> None:
    kept_events = 0
    with path.open("rb") as old, replaced(path) as new:
        for raw, event in _kept(old, resume_step):
            new.write(raw)
            kept_events += event.HasField("summary")
    if not kept_events:
        path.unlink()


def _kept(file: BinaryIO, resume_step: int) -> Iterator[tuple[bytes, Any]]:
    # An event on another axis (tokens, samples) does not know its step; the writer puts it behind the event by step of
    # the same record, so it shares that one's fate.
    is_step_kept = True
    for raw, event in _records(file):
        if not _is_on_other_axis(event):
            is_step_kept = event.step < resume_step if _is_text_of_start(event) else event.step <= resume_step
        if is_step_kept and not _is_written_anew(event):
            yield raw, event


def _records(file: BinaryIO) -> Iterator[tuple[bytes, Any]]:
    from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]

    while len(header := file.read(_HEADER_BYTES)) == _HEADER_BYTES:
        (length,) = struct.unpack("<Q", header[:8])
        body = file.read(length + _FOOTER_BYTES)
        if len(body) < length + _FOOTER_BYTES:
            return
        yield header + body, Event.FromString(body[:length])


def _is_on_other_axis(event: Any) -> bool:
    return any(value.tag.endswith(_OTHER_AXIS_SUFFIXES) for value in event.summary.value)


def _is_text_of_start(event: Any) -> bool:
    return any(
        value.metadata.plugin_data.plugin_name == "text" and not value.tag.startswith(SAMPLES_PREFIX)
        for value in event.summary.value
    )


def _is_written_anew(event: Any) -> bool:
    plugins = {value.metadata.plugin_data.plugin_name for value in event.summary.value}
    return bool(plugins & {"custom_scalars", "hparams"})
