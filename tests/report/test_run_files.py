"""A run's directory read back, also while it is written."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lmscale.errors import ConfigError, DataError
from lmscale.report.run_files import read_run
from tests.report.runs import plain_records, record, write_run


def test_curves_have_steps_tokens_and_gaps_for_null(tmp_path: Path) -> None:
    records = [record(1, train__lm_loss=6.0), record(2, train__lm_loss=None), record(3, train__lr=0.1)]
    curve = read_run(write_run(tmp_path / "run", records)).curve("train/lm_loss")
    assert curve.steps == [1, 2]
    assert curve.tokens == [256, 512]
    assert curve.values[0] == 6.0
    assert math.isnan(curve.values[1])
    assert curve.last == 6.0


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", plain_records(range(1, 4)))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "consumed_samples": 32, "consumed_tokens": 1')
    assert [each["step"] for each in read_run(run).records] == [1, 2, 3]


def test_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    records = [record(1, train__lm_loss="6.0", train__lr=0.1, train__skipped_steps=[1])]
    run = read_run(write_run(tmp_path / "run", records))
    assert run.tags == ["train/lr"]
    assert run.curve("train/lm_loss").values == []


def test_what_is_no_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no directory"):
        read_run(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"metrics\.jsonl is not there"):
        read_run(tmp_path)
    with pytest.raises(DataError, match="has no record"):
        read_run(write_run(tmp_path / "run", []))


def test_a_config_of_another_version_does_not_hide_the_metrics(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", plain_records(range(1, 4)))
    (run / "config.yaml").write_text("model: {layers: 3}\nunheard_of: 1\n")
    found = read_run(run)
    assert isinstance(found.config, ConfigError)
    assert found.keys["unheard_of"] == 1
    assert len(found.records) == 3
