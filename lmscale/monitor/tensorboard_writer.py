"""TensorBoard events: the tags by step, the losses by tokens too, a layout for them, texts, histograms, hyperparameters."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from lmscale.monitor import metrics
from lmscale.monitor.event_files import cut_events
from lmscale.monitor.histogram import Histogram
from lmscale.monitor.hparams import HParam
from lmscale.monitor.layout import layout_proto
from lmscale.monitor.metrics import Point, Record


class TensorBoardWriter:
    """Write records as TensorBoard scalars.

    Args:
        directory: where the event files go; made if missing.
        resume_step: the step that the run continues from: what the directory holds past it is cut off first, on the
            token axis too. None is a new run and keeps nothing.
        series: functions from a record to its points; more than one writes the same metrics under other names too.
        hparams: what a sweep may vary; with them the run has a row in TensorBoard's table.
    """

    def __init__(
        self,
        directory: Path,
        resume_step: int | None = None,
        series: Sequence[Callable[[Record], list[Point]]] = (metrics.points,),
        hparams: Mapping[str, HParam] | None = None,
    ):
        from tensorboard.summary.writer.event_file_writer import EventFileWriter  # type: ignore[import-untyped]

        directory.mkdir(parents=True, exist_ok=True)
        cut_events(directory, resume_step)
        self._start_step = resume_step or 0
        self._series = series
        self._events = EventFileWriter(str(directory))
        self._lay_out()
        if hparams:
            self._describe(hparams)
        self._events.flush()

    def write(self, record: Record) -> None:
        """Write a record's points, those by step first, which `cut_events` relies on, and flush."""
        found = [point for series in self._series for point in series(record)]
        order = {"step": 0, "samples": 1, "tokens": 2}
        found.sort(key=lambda point: order[point.axis])
        for _, group in groupby(found, key=lambda point: point.axis):
            on_axis = list(group)
            self._add(on_axis[0].x, [{"tag": point.tag, "simple_value": point.value} for point in on_axis])
        self._events.flush()

    def text(self, tag: str, markdown: str, step: int | None = None) -> None:
        """Write a text, at its step, or at that which this start of the run continues from."""
        # The suffix is torch's, under which TensorBoard's text dashboard and its readers expect a text.
        value = _string_value(f"{tag}/text_summary", "text", markdown.encode())
        self._add(self._start_step if step is None else step, [value])
        self._events.flush()

    def histograms(self, step: int, found: Mapping[str, Histogram]) -> None:
        """Write histograms, in the form that every reader knows."""
        from tensorboard.compat.proto.summary_pb2 import HistogramProto  # type: ignore[import-untyped]

        for tag, histogram in found.items():
            proto = HistogramProto(
                min=histogram.minimum,
                max=histogram.maximum,
                num=sum(histogram.counts),
                sum=histogram.total,
                sum_squares=histogram.sum_of_squares,
                # A bucket reaches from the limit before it to its own; the first one here ends where the values begin.
                bucket_limit=histogram.edges,
                bucket=[0.0, *histogram.counts],
            )
            self._add(step, [{"tag": tag, "histo": proto}])
        self._events.flush()

    def close(self) -> None:
        """Write what is pending and close the event file."""
        self._events.close()

    def _lay_out(self) -> None:
        from tensorboard.plugins.custom_scalar import metadata  # type: ignore[import-untyped]

        layout = layout_proto().SerializeToString()
        self._add(self._start_step, [_string_value(metadata.CONFIG_SUMMARY_TAG, metadata.PLUGIN_NAME, layout)])

    def _describe(self, hparams: Mapping[str, HParam]) -> None:
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb  # type: ignore[import-untyped]

        summary = hparams_pb(dict(hparams))
        self._add(self._start_step, [{"tag": v.tag, "metadata": v.metadata, "tensor": v.tensor} for v in summary.value])

    def _add(self, x: int, values: list[dict[str, Any]]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(**value) for value in values])
        self._events.add_event(Event(wall_time=time.time(), step=x, summary=summary))


def _string_value(tag: str, plugin: str, content: bytes) -> dict[str, Any]:
    """Make a value of one string, for a plugin of TensorBoard's."""
    from tensorboard.compat.proto.summary_pb2 import SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto  # type: ignore[import-untyped]
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto  # type: ignore[import-untyped]

    # Of the layout TensorBoard asks for a scalar; of a text, for a list.
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)] if plugin == "text" else [])
    tensor = TensorProto(dtype="DT_STRING", string_val=[content], tensor_shape=shape)
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=plugin))
    return {"tag": tag, "metadata": metadata, "tensor": tensor}
