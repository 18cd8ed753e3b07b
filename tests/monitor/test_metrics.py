"""Tags, records and points."""

import re

from lmscale.monitor import megatron_names, metrics
from lmscale.monitor.metrics import METRICS, Record


def test_every_tag_is_described():
    constants = {
        value
        for name, value in vars(metrics).items()
        if re.match("(TRAIN|PERF|MEMORY|PROGRESS|CHECKPOINT|FAULTS)_", name)
    }
    described = {metric.tag for metric in METRICS}
    assert constants == {tag for tag in described if "<corpus>" not in tag}
    assert {metrics.valid_loss_tag("<corpus>"), metrics.valid_perplexity_tag("<corpus>")} <= described


def test_losses_and_nothing_else_have_a_twin_by_tokens():
    values = {"train/lm_loss": 2.0, "train/loss_scale": 8.0, "valid/wiki/lm_loss": 3.0, "valid/wiki/perplexity": 20.1}
    by_tokens = [p for p in metrics.points(Record(7, 70, 700, values)) if p.axis == "tokens"]
    assert {(p.tag, p.value, p.x) for p in by_tokens} == {
        ("train/lm_loss_by_tokens", 2.0, 700),
        ("valid/wiki/lm_loss_by_tokens", 3.0, 700),
    }


def test_consumed_tokens_are_a_tag_of_every_record():
    [point] = metrics.points(Record(7, 70, 700))
    assert (point.tag, point.value, point.x) == ("progress/consumed_tokens", 700, 7)


def test_corpus_is_read_from_a_loss_tag_only():
    assert metrics.valid_corpus("valid/wiki/lm_loss") == "wiki"
    assert metrics.valid_corpus("valid/wiki/perplexity") is None
    assert metrics.valid_corpus("train/lm_loss") is None


def test_megatron_names_are_those_of_its_dashboards():
    values = {
        "train/lm_loss": 1.0,
        "train/lr": 2.0,
        "train/global_batch_size": 3.0,
        "train/loss_scale": 4.0,
        "train/grad_norm": 5.0,
        "perf/step_time_s": 6.0,
        "valid/wiki/lm_loss": 7.0,
        "memory/peak_bytes": 8.0,
    }
    found = {(p.tag, p.value, p.x) for p in megatron_names.points(Record(7, 70, 700, values))}
    names = [
        "lm-loss-training/lm loss",
        "learning-rate/learning-rate",
        "batch-size/batch-size",
        "loss-scale/loss-scale",
        "grad-norm/grad-norm",
        "iteration-time/iteration-time",
        "lm-loss-validation/lm loss validation",
    ]
    expected = set()
    for value, name in enumerate(names, start=1):
        expected |= {(name, value, 7), (f"{name} vs samples", value, 70), (f"{name} vs tokens", value, 700)}
    assert found == expected


def test_megatron_names_of_several_corpora_differ():
    values = {"valid/a/lm_loss": 1.0, "valid/b/lm_loss": 2.0}
    by_step = {p.tag: p.value for p in megatron_names.points(Record(1, 1, 1, values)) if p.axis == "step"}
    assert by_step == {
        "lm-loss-validation/a/lm loss validation": 1.0,
        "lm-loss-validation/b/lm loss validation": 2.0,
    }
