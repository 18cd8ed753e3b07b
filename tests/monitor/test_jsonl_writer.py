"""metrics.jsonl."""

import json
import logging

import pytest

from lmscale.errors import OutputError
from lmscale.monitor.jsonl_writer import JsonlWriter
from lmscale.monitor.metrics import Record


def record(step, **values):
    return Record(step, step * 8, step * 80, values or {"train/lm_loss": 1.0 / max(1, step)})


def write(path, steps, resume_step=None):
    writer = JsonlWriter(path, resume_step)
    for step in steps:
        writer.write(record(step))
    writer.close()


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_line_holds_progress_and_tags_as_keys(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    write(path, [4])
    assert json.loads(path.read_text()) == {
        "step": 4,
        "consumed_samples": 32,
        "consumed_tokens": 320,
        "train/lm_loss": 0.25,
        "progress/consumed_tokens": 320,
    }


def test_lines_are_on_disk_before_the_writer_is_closed(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(record(1))
    assert steps_in(tmp_path / "metrics.jsonl") == [1]
    writer.close()


def test_a_resumed_run_has_no_step_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [10, 20, 30, 40])
    write(path, [30, 40, 50], resume_step=20)
    assert steps_in(path) == [10, 20, 30, 40, 50]
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_run_keeps_nothing_of_an_earlier_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [0, 10, 20])
    write(path, [0, 10], resume_step=None)
    assert steps_in(path) == [0, 10]


@pytest.mark.parametrize("torn", ['{"step": 30, "train/lm_', '{"step": 2', '{"step": 20}', "\x00\x00"])
def test_a_torn_last_line_is_dropped_with_a_warning(tmp_path, caplog, torn):
    path = tmp_path / "metrics.jsonl"
    write(path, [10, 20])
    path.write_text(path.read_text() + torn)
    with caplog.at_level(logging.WARNING, logger="lmscale"):
        write(path, [30], resume_step=20)
    assert steps_in(path) == [10, 20, 30]
    assert "dropped 1 torn or unreadable" in caplog.text


def test_values_that_are_not_finite_are_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write(Record(1, 8, 80, {"train/lm_loss": float("nan"), "train/grad_norm": float("inf")}))
    writer.close()
    line = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert (line["train/lm_loss"], line["train/grad_norm"]) == (None, None)


def test_a_file_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/metrics\.jsonl: cannot be written: "):
        JsonlWriter(tmp_path / "file" / "metrics.jsonl")


def test_a_full_disk_is_one_clear_error(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    # A symbolic link would be cut back, and so replaced, if it were opened through the constructor.
    writer = JsonlWriter.__new__(JsonlWriter)
    writer._path = tmp_path / "metrics.jsonl"
    writer._file = writer._path.open("a")
    with pytest.raises(OutputError, match=r"metrics\.jsonl: cannot be written: No space left"):
        writer.write(record(1))
    with pytest.raises(OSError, match="No space left"):
        writer.close()
