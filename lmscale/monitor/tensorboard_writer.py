"""TensorBoard events: the tags by step, the losses by tokens too, and texts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from lmscale.monitor import metrics
from lmscale.monitor.event_files import cut_events
from lmscale.monitor.metrics import Point, Record


class TensorBoardWriter:
    """Write records as TensorBoard scalars.

    Args:
        directory: where the event files go; made if missing.
        resume_step: the step that the run continues from: what the directory holds past it is cut off first, on the
            token axis too. None is a new run and keeps nothing.
        series: functions from a record to its points; more than one writes the same metrics under other names too.
    """

    def __init__(
        self,
        directory: Path,
        resume_step: int | None = None,
        series: Sequence[Callable[[Record], list[Point]]] = (metrics.points,),
    ):
        from tensorboard.summary.writer.event_file_writer import EventFileWriter  # type: ignore[import-untyped]

        directory.mkdir(parents=True, exist_ok=True)
        cut_events(directory, resume_step)
        self._start_step = resume_step or 0
        self._series = series
        self._events = EventFileWriter(str(directory))

    def write(self, record: Record) -> None:
        """Write a record's points, those by step first, which `cut_events` relies on, and flush."""
        found = [point for series in self._series for point in series(record)]
        order = {"step": 0, "samples": 1, "tokens": 2}
        found.sort(key=lambda point: order[point.axis])
        for _, group in groupby(found, key=lambda point: point.axis):
            on_axis = list(group)
            self._add(on_axis[0].x, [{"tag": point.tag, "simple_value": point.value} for point in on_axis])
        self._events.flush()

    def text(self, tag: str, markdown: str) -> None:
        """Write a text at the step that this start of the run continues from."""
        from tensorboard.compat.proto.summary_pb2 import SummaryMetadata  # type: ignore[import-untyped]
        from tensorboard.compat.proto.tensor_pb2 import TensorProto  # type: ignore[import-untyped]
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto  # type: ignore[import-untyped]

        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype="DT_STRING", string_val=[markdown.encode()], tensor_shape=shape)
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        # The suffix is torch's, under which TensorBoard's text dashboard and its readers expect a text.
        self._add(self._start_step, [{"tag": f"{tag}/text_summary", "metadata": metadata, "tensor": tensor}])
        self._events.flush()

    def close(self) -> None:
        """Write what is pending and close the event file."""
        self._events.close()

    def _add(self, x: int, values: list[dict[str, Any]]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(**value) for value in values])
        self._events.add_event(Event(wall_time=time.time(), step=x, summary=summary))
