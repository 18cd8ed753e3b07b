"""What nobody would see, or cannot be made, is refused before a rank starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmscale.config.check import check_run
from lmscale.config.io import parse_run
from lmscale.config.run import ZeroChoice
from lmscale.errors import ConfigError
from tests.distributed.runs import run_keys

SAMPLES = {"prompts": ["def "], "max_new_tokens": 4}


@pytest.mark.parametrize(
    ("changes", "field", "rule"),
    [
        ({"monitor__histogram_interval": 5}, "monitor.histogram_interval", "both are off"),
        ({"monitor__samples": SAMPLES}, "monitor.samples", "both are off"),
        ({"monitor__samples": SAMPLES, "monitor__tensorboard": True}, "monitor.samples", "tokenizer"),
        (
            {
                "monitor__samples": {**SAMPLES, "max_new_tokens": 32},
                "monitor__tensorboard": True,
                "tokenizer__path": "t",
            },
            "monitor.samples.max_new_tokens",
            "room for a prompt",
        ),
        (
            {"monitor__samples": {"prompts": ["a", ""]}, "monitor__tensorboard": True, "tokenizer__path": "t"},
            "monitor.samples.prompts",
            "empty",
        ),
        (
            {
                "monitor__samples": SAMPLES,
                "monitor__tensorboard": True,
                "tokenizer__path": "t",
                "model__architecture": "bert",
                "objective__name": "bert",
            },
            "monitor.samples",
            "bert does not",
        ),
        ({"monitor__prometheus_host": "0.0.0.0"}, "monitor.prometheus_host", "prometheus_port"),
        ({"monitor__trace": {"start_step": 2, "ranks": [0, 2]}}, "monitor.trace.ranks", "not there"),
    ],
)
def test_the_key_and_the_rule_are_named(tmp_path: Path, changes: dict[str, Any], field: str, rule: str) -> None:
    samples = changes.get("monitor__samples", {})
    if samples.get("prompts") == ["a", ""]:
        changes = {**changes, "monitor__samples": {**samples, "max_new_tokens": 4}}
    config = parse_run(run_keys("corpus", tmp_path, **changes))
    with pytest.raises(ConfigError, match=rule) as found:
        check_run(config, ZeroChoice(), world_size=2)
    assert found.value.field == field


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"monitor__trace": {"start_step": 0}}, "monitor.trace.start_step"),
        ({"monitor__trace": {"start_step": 1, "ranks": [-1]}}, "monitor.trace.ranks"),
        ({"monitor__samples": {"prompts": []}}, "monitor.samples.prompts"),
        ({"monitor__prometheus_port": 70_000}, "monitor.prometheus_port"),
    ],
)
def test_values_out_of_range_are_refused_by_key(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as found:
        parse_run(run_keys("corpus", tmp_path, **changes))
    assert str(found.value.field).startswith(field)
