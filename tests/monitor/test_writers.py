"""The choice of writers."""

import sys

import pytest

from lmscale.config.monitor import MonitorConfig
from lmscale.errors import ConfigError
from lmscale.monitor.metrics import Record
from lmscale.monitor.writers import build_writers


def test_jsonl_is_always_written_and_tensorboard_by_default(tmp_path):
    writers = build_writers(MonitorConfig(), tmp_path)
    for writer in writers:
        writer.write(Record(1, 8, 80, {"train/lm_loss": 1.0}))
        writer.text("config", "a: 1")
        writer.close()
    assert (tmp_path / "metrics.jsonl").exists()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_without_tensorboard_there_is_no_directory_for_it(tmp_path):
    for writer in build_writers(MonitorConfig(tensorboard=False), str(tmp_path)):
        writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_missing_wandb_cuts_nothing_back(tmp_path, monkeypatch):
    [writer] = build_writers(MonitorConfig(tensorboard=False), tmp_path)
    writer.write(Record(10, 8, 80))
    writer.close()
    monkeypatch.setitem(sys.modules, "wandb", None)
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match="wandb"):
        build_writers(MonitorConfig(wandb=True), tmp_path, resume_step=None)
    assert (tmp_path / "metrics.jsonl").read_text() == before
