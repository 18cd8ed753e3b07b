"""The keys of the fault policy and of skipped steps: what is refused before a rank starts, and how it is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmscale.config.check import check_run
from lmscale.config.io import parse_run
from lmscale.config.run import ZeroChoice
from lmscale.errors import ConfigError
from tests.distributed.runs import run_keys


def check(tmp_path: Path, **changes: Any) -> None:
    check_run(parse_run(run_keys("corpus", tmp_path, **changes)), ZeroChoice(stage=1), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"faults__overflow_storm": {}}, "faults.overflow_storm: counts the overflows of fp16, and precision is fp32"),
        ({"faults__loss_spike": {"window": 8}}, "faults.loss_spike.min_steps = 32: must be at most .*window = 8"),
        (
            {"faults__overflow_storm": {"overflows": 9, "of_steps": 5}, "precision": "fp16"},
            "faults.overflow_storm.overflows = 9: must be at most .*of_steps = 5",
        ),
        (
            {"faults__non_finite": {"action": "rewind"}},
            "faults.non_finite.action = 'rewind': .*checkpoint.save_interval = 0 saves none",
        ),
        (
            {"faults__non_finite": {"steps_before": 3}},
            "faults.non_finite.steps_before = 3: is read with faults.non_finite.action: rewind only",
        ),
        ({"faults__non_finite": {"action": "none"}}, "faults.non_finite.action = 'none': .*'skip', 'rewind' or 'stop'"),
        ({"faults__overflow_storm": {"action": "skip"}}, "faults.overflow_storm.action = 'skip'"),
        ({"faults__loss_spke": {}}, "faults.loss_spke: unknown key; did you mean 'loss_spike'"),
        ({"train__skip_steps": ["9-3"]}, "train.skip_steps = .*ranges go up: '9-3'"),
        ({"train__skip_steps": [0]}, "train.skip_steps = .*steps count from 1"),
        ({"train__skip_steps": ["a-b"]}, "train.skip_steps = .*must be steps or ranges like 101-200: 'a-b'"),
    ],
)
def test_what_cannot_be_is_refused_with_field_and_value(changes: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        check(tmp_path, **changes)


def test_sound_policy_passes(tmp_path: Path) -> None:
    check(
        tmp_path,
        precision="fp16",
        checkpoint__save_interval=5,
        faults={
            "non_finite": {"action": "rewind", "steps_before": 2},
            "loss_spike": {"action": "skip"},
            "grad_norm_spike": {"action": "stop"},
            "overflow_storm": {"overflows": 5},
        },
    )


def test_steps_and_ranges_are_read(tmp_path: Path) -> None:
    config = parse_run(run_keys("corpus", tmp_path, train__skip_steps=["101-200", "7", 9]))
    assert config.train.skipped_ranges == ((101, 200), (7, 7), (9, 9))
