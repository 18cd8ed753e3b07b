"""W&B, with a stand-in for its package: the network is not ours to test."""

import sys
from types import SimpleNamespace

import pytest

from lmscale.errors import ConfigError
from lmscale.monitor.metrics import Record
from lmscale.monitor.wandb_writer import WandbWriter


class StandInRun:
    def __init__(self):
        self.logged, self.axes, self.texts, self.finished = [], {}, {}, False
        self.config = SimpleNamespace(update=lambda values, allow_val_change: self.texts.update(values))

    def log(self, values, step):
        self.logged.append((step, values))

    def define_metric(self, tag, step_metric):
        assert tag not in self.axes
        self.axes[tag] = step_metric

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    module = SimpleNamespace(runs=[], options=[])

    def init(**options):
        module.options.append(options)
        module.runs.append(StandInRun())
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def test_records_carry_the_same_tags_and_losses_have_a_token_axis(tmp_path, wandb):
    writer = WandbWriter(tmp_path / "gpt")
    for step in (1, 2):
        writer.write(Record(step, step * 10, step * 100, {"train/lm_loss": 3.0}))
    writer.text("config", "a: 1")
    writer.close()
    [run] = wandb.runs
    assert run.logged[1] == (
        2,
        {"train/lm_loss": 3.0, "train/lm_loss_by_tokens": 3.0, "progress/consumed_tokens": 200},
    )
    assert run.axes == {"train/lm_loss_by_tokens": "progress/consumed_tokens"}
    assert run.texts == {"config": "a: 1"}
    assert run.finished
    assert (wandb.options[0]["project"], wandb.options[0]["name"]) == ("lmscale", "gpt")


def test_a_resumed_run_continues_its_wandb_run_and_a_new_one_does_not(tmp_path, wandb):
    for resume_step in (None, 10, None):
        WandbWriter(tmp_path, resume_step).close()
    first, resumed, new = (options["id"] for options in wandb.options)
    assert first == resumed != new


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"monitor\.wandb = True: .*pip install lmscale\[wandb\]"):
        WandbWriter(tmp_path)
