"""A writer that fails is told once, and the run that it belongs to goes on."""

from __future__ import annotations

import json
import logging
import subprocess

import pytest

from lmscale.config.monitor import MonitorConfig
from lmscale.monitor.metrics import Record
from lmscale.monitor.tolerant import Tolerant
from lmscale.monitor.writers import build_writers


class Failing:
    def __init__(self):
        self.fails, self.written, self.error = True, [], OSError(28, "No space left on device")

    def write(self, record):
        if self.fails:
            raise self.error
        self.written.append(record.step)

    def text(self, tag, markdown, step=None):
        raise OSError(28, "No space left on device")

    def close(self):
        raise OSError(28, "No space left on device")


def test_a_failure_is_told_once_and_its_end_too(caplog):
    failing = Failing()
    writer = Tolerant(failing)
    with caplog.at_level(logging.WARNING):
        writer.text("config", "")
        for step in (1, 2):
            writer.write(Record(step, 0, 0))
        failing.fails = False
        writer.write(Record(3, 0, 0))
        writer.close()
    assert failing.written == [3]
    told = [record.message for record in caplog.records]
    assert [("goes on without" in line, "written again" in line) for line in told] == [
        (True, False),
        (False, True),
        (True, False),
    ]


def test_a_value_that_a_library_does_not_take_ends_nothing(caplog):
    failing = Failing()
    failing.error = ValueError("Incorrect label names")
    Tolerant(failing).write(Record(1, 0, 0))
    assert "Failing: Incorrect label names; the run goes on without these records" in caplog.text


def test_records_of_a_full_disk_come_when_there_is_room(tmp_path, request):
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=False, capture_output=True
    ).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    request.addfinalizer(lambda: subprocess.run(["umount", "-l", tmp_path], check=True))
    writers = build_writers(MonitorConfig(tensorboard=True), tmp_path)
    filling = tmp_path / "filling"
    with pytest.raises(OSError, match="No space left"):
        filling.write_bytes(b"\0" * 70_000)
    for step in (1, 2, 3):
        for writer in writers:
            writer.write(Record(step, step, step, {"train/lm_loss": 1.0}))
    filling.unlink()
    for writer in writers:
        writer.write(Record(4, 4, 4, {"train/lm_loss": 1.0}))
        writer.close()
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
