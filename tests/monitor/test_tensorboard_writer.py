"""TensorBoard events, read back with TensorBoard's own reader and counted in the raw files."""

import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from lmscale.monitor import megatron_names, metrics
from lmscale.monitor.histogram import Histogram
from lmscale.monitor.metrics import Record
from lmscale.monitor.tensorboard_writer import TensorBoardWriter

TOKENS_PER_STEP = 1_000_000
ALL_SERIES = (metrics.points, megatron_names.points)


def write(directory, steps, resume_step=None, series=ALL_SERIES, loss=1.0):
    writer = TensorBoardWriter(directory, resume_step, series)
    writer.text("config", f"started at {resume_step}")
    for step in steps:
        values = {"train/lm_loss": loss / step, "train/lr": 0.5, "valid/wiki/lm_loss": 2.0}
        writer.write(Record(step, step * 100, step * TOKENS_PER_STEP, values))
    writer.close()


def read(directory):
    accumulator = EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def raw_x(directory, tag):
    """List the x of a tag in all files, with nothing purged by a reader."""
    events = [e for path in sorted(directory.iterdir()) for e in LegacyEventFileLoader(str(path)).Load()]
    return [event.step for event in events for value in event.summary.value if value.tag == tag]


def test_tags_are_by_step_and_losses_by_tokens_too(tmp_path):
    write(tmp_path, [10, 20], series=(metrics.points,))
    accumulator = read(tmp_path)
    assert set(accumulator.Tags()["scalars"]) == {
        "train/lm_loss",
        "train/lm_loss_by_tokens",
        "train/lr",
        "valid/wiki/lm_loss",
        "valid/wiki/lm_loss_by_tokens",
        "progress/consumed_tokens",
    }
    assert [(e.step, e.value) for e in accumulator.Scalars("train/lr")] == [(10, 0.5), (20, 0.5)]
    by_tokens = [(e.step, e.value) for e in accumulator.Scalars("train/lm_loss_by_tokens")]
    assert by_tokens == [(10_000_000, pytest.approx(0.1)), (20_000_000, pytest.approx(0.05))]


def test_megatron_names_stand_beside_ours(tmp_path):
    write(tmp_path, [10])
    accumulator = read(tmp_path)
    for tag, x in [("", 10), (" vs samples", 1000), (" vs tokens", 10_000_000)]:
        assert [e.step for e in accumulator.Scalars(f"lm-loss-training/lm loss{tag}")] == [x]
    assert "train/lm_loss" in accumulator.Tags()["scalars"]


def test_a_resumed_run_has_no_step_twice_on_any_axis(tmp_path):
    write(tmp_path, [10, 20, 30, 40])
    write(tmp_path, [30, 40, 50], resume_step=20, loss=2.0)
    steps = [10, 20, 30, 40, 50]
    accumulator = read(tmp_path)
    for suffix, factor in [("", 1), ("_by_tokens", TOKENS_PER_STEP)]:
        tag = f"train/lm_loss{suffix}"
        assert [e.step for e in accumulator.Scalars(tag)] == [step * factor for step in steps]
        assert raw_x(tmp_path, tag) == [step * factor for step in steps]
    assert raw_x(tmp_path, "lm-loss-training/lm loss vs tokens") == [step * TOKENS_PER_STEP for step in steps]
    assert raw_x(tmp_path, "lm-loss-training/lm loss vs samples") == [step * 100 for step in steps]
    assert accumulator.Scalars("train/lm_loss")[2].value == pytest.approx(2.0 / 30)


def test_a_run_resumed_twice_from_the_same_step_has_no_step_twice(tmp_path):
    write(tmp_path, [10, 20])
    write(tmp_path, [20, 30], resume_step=10)
    write(tmp_path, [20, 30], resume_step=10)
    assert raw_x(tmp_path, "train/lm_loss") == [10, 20, 30]
    assert raw_x(tmp_path, "config/text_summary") == [0, 10]


def test_a_new_run_keeps_nothing_of_an_earlier_one(tmp_path):
    write(tmp_path, [10, 20])
    write(tmp_path, [10], resume_step=None)
    assert raw_x(tmp_path, "train/lm_loss") == [10]


def test_a_file_of_which_nothing_remains_is_removed(tmp_path):
    write(tmp_path, [10])
    write(tmp_path, [20], resume_step=10)
    write(tmp_path, [20], resume_step=10)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("torn_bytes", [1, 5, 40])
def test_a_torn_last_event_is_dropped(tmp_path, torn_bytes):
    write(tmp_path, [10, 20], series=(metrics.points,))
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-torn_bytes])
    write(tmp_path, [20, 30], resume_step=10)
    assert raw_x(tmp_path, "train/lm_loss") == [10, 20, 30]


def test_texts_are_readable(tmp_path):
    write(tmp_path, [10])
    [event] = read(tmp_path).Tensors("config/text_summary")
    assert event.tensor_proto.string_val == [b"started at None"]


def layout_of(accumulator):
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata

    [event] = accumulator.Tensors(metadata.CONFIG_SUMMARY_TAG)
    return layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])


def test_the_layout_shows_every_metric_under_its_heading(tmp_path):
    write(tmp_path, [10])
    layout = layout_of(read(tmp_path))
    assert [category.title for category in layout.category] == ["Loss", "Rate and batch", "Throughput", "Health"]
    tags = {metric.tag.replace("<corpus>", "wiki") for metric in metrics.METRICS}
    patterns = [tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag]
    shown = {tag for tag in tags if any(re.match(pattern, tag) for pattern in patterns)}
    # Perplexity says what the loss says; the other three are the same curves in another unit, or one point, or seldom.
    assert {tag for tag in tags - shown if not tag.startswith(("memory/", "perf/"))} == {
        "valid/wiki/perplexity",
        "checkpoint/failed_saves",
    }
    assert not any(re.match(pattern, "train/lm_loss_by_tokens") for pattern in patterns if pattern == "^train/lm_loss$")
    for pattern in patterns:
        known = {*tags, "train/lm_loss_by_tokens", "valid/wiki/lm_loss_by_tokens"}
        assert any(re.match(pattern, tag) for tag in known), pattern


def test_histograms_are_read_back(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    edges, counts = [-1.0, 0.0, 1.0, 2.0], [1, 2, 3]
    writer.histograms(5, {"weights/a": Histogram(edges, counts, -0.5, 1.5, 4.0, 6.0)})
    writer.close()
    [event] = read(tmp_path).Histograms("weights/a")
    value = event.histogram_value
    assert (event.step, value.min, value.max, value.num, value.sum, value.sum_squares) == (5, -0.5, 1.5, 6, 4.0, 6.0)
    assert list(value.bucket_limit) == edges
    assert list(value.bucket) == [0, *counts]


def hparams_of_run(directory):
    from tensorboard.plugins.hparams import metadata

    tensors = read(directory).Tags()["tensors"]
    assert metadata.SESSION_START_INFO_TAG in tensors
    content = read(directory).SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    found = metadata.parse_session_start_info_plugin_data(content).hparams
    return {key: getattr(value, value.WhichOneof("kind")) for key, value in found.items()}


def test_hyperparameters_are_one_row_also_after_a_resume(tmp_path):
    for resume_step, lr in ((None, 0.5), (10, 0.25)):
        writer = TensorBoardWriter(tmp_path, resume_step, hparams={"optim.lr": lr, "optim.name": "adamw", "flag": True})
        writer.write(Record(10, 0, 0, {"train/lr": lr}))
        writer.close()
    assert hparams_of_run(tmp_path) == {"optim.lr": 0.25, "optim.name": "adamw", "flag": True}
    assert len(raw_x(tmp_path, "_hparams_/session_start_info")) == 1
    assert len(raw_x(tmp_path, "custom_scalars__config__")) == 1


def test_samples_belong_to_their_step(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    for step in (10, 20, 30):
        writer.text("samples/0", f"written at {step}", step)
        writer.histograms(step, {"weights/a": Histogram([0.0, 1.0], [1], 0.0, 1.0, 0.0, 0.0)})
    writer.close()
    TensorBoardWriter(tmp_path, resume_step=20).close()
    assert raw_x(tmp_path, "samples/0/text_summary") == [10, 20]
    assert raw_x(tmp_path, "weights/a") == [10, 20]
    texts = [event.tensor_proto.string_val[0] for event in read(tmp_path).Tensors("samples/0/text_summary")]
    assert texts == [b"written at 10", b"written at 20"]
