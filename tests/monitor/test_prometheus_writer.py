"""Metrics over HTTP, read back as Prometheus reads them."""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lmscale.config.monitor import MonitorConfig
from lmscale.errors import ConfigError
from lmscale.monitor.metrics import Record
from lmscale.monitor.prometheus_writer import PrometheusWriter
from lmscale.monitor.writers import build_writers

LOCAL = "127.0.0.1"


@pytest.fixture
def port() -> int:
    """A free port below those that the kernel gives out, which another test's socket may get before it is opened."""
    for number in random.SystemRandom().sample(range(20_000, 32_000), 20):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((LOCAL, number))
            return number
    raise AssertionError("no free port in 20 tries")


def scrape(port: int) -> dict[tuple[str, str | None], tuple[float, str]]:
    """Return value and help of each metric by (name, corpus); every one has the run's name."""
    with urllib.request.urlopen(f"http://{LOCAL}:{port}/metrics", timeout=20) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [(family.documentation, sample) for family in families for sample in family.samples]
    assert all(sample.labels["run"] == "gpt" for _, sample in samples)
    return {(sample.name, sample.labels.get("corpus")): (sample.value, text) for text, sample in samples}


def test_the_newest_values_are_served_by_run_and_corpus(port: int) -> None:
    writer = PrometheusWriter("gpt", port, LOCAL)
    try:
        writer.write(Record(1, 8, 80, {"train/lm_loss": 3.0, "valid/wiki/lm_loss": 4.0, "valid/books/lm_loss": 5.0}))
        writer.write(Record(2, 16, 160, {"train/lm_loss": 2.5, "train/grad_norm": float("inf")}))
        found = scrape(port)
    finally:
        writer.close()
    assert found["lmscale_train_lm_loss", None][0] == 2.5
    assert "cross entropy" in found["lmscale_train_lm_loss", None][1]
    assert found["lmscale_valid_lm_loss", "wiki"][0] == 4.0
    assert found["lmscale_valid_lm_loss", "books"][0] == 5.0
    assert found["lmscale_train_grad_norm", None][0] == float("inf")
    assert found["lmscale_step", None][0] == 2
    assert found["lmscale_progress_consumed_tokens", None][0] == 160
    with pytest.raises(urllib.error.URLError):
        scrape(port)


def test_every_held_out_metric_has_a_corpus_and_its_meaning(port: int) -> None:
    writer = PrometheusWriter("gpt", port, LOCAL)
    try:
        writer.write(Record(1, 8, 80, {"valid/dev/f1": 0.5, "valid/wiki/lm_loss": 4.0}))
        writer.write(Record(2, 16, 160, {"valid/f1": 0.25, "train/lm_loss": 2.0}))
        found = scrape(port)
    finally:
        writer.close()
    assert [found["lmscale_valid_f1", corpus][0] for corpus in ("dev", "")] == [0.5, 0.25]
    assert found["lmscale_valid_lm_loss", "wiki"][1] == "mean cross entropy on a held-out corpus"
    assert found["lmscale_valid_f1", "dev"][1] == "valid/<corpus>/f1"
    assert found["lmscale_train_lm_loss", None][0] == 2.0


def test_tags_of_one_name_do_not_overwrite_each_other(port: int, caplog: pytest.LogCaptureFixture) -> None:
    writer = PrometheusWriter("gpt", port, LOCAL)
    try:
        with caplog.at_level(logging.WARNING):
            for step in (1, 2):
                writer.write(Record(step, 8, 80, {"train/a_b": 1.0, "train/a.b": 2.0, "train/c": 3.0}))
        found = scrape(port)
    finally:
        writer.close()
    assert found["lmscale_train_a_b", None][0] == 1.0
    assert found["lmscale_train_c", None][0] == 3.0
    told = [record.getMessage() for record in caplog.records]
    assert told == ["Prometheus: train/a.b is not served: its name, lmscale_train_a_b, is that of train/a_b"]


def test_a_port_is_given_back_and_a_taken_one_is_refused(port: int, tmp_path: Path) -> None:
    monitor = MonitorConfig(tensorboard=False, prometheus_port=port)
    for _ in range(2):  # as a rewind does
        writers = build_writers(monitor, tmp_path / "gpt")
        for writer in writers:
            writer.write(Record(1, 8, 80))
        assert scrape(port)["lmscale_step", None][0] == 1
        with pytest.raises(ConfigError, match="cannot be opened on 127"):
            build_writers(monitor, tmp_path / "other")
        assert not (tmp_path / "other").exists()
        for writer in writers:
            writer.close()


def test_others_cannot_reach_it_unless_told_so(port: int) -> None:
    writer = PrometheusWriter("gpt", port, MonitorConfig().prometheus_host)
    try:
        assert writer._server.server_address[0] == LOCAL
    finally:
        writer.close()


def test_a_missing_package_is_named(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match=r"pip install lmscale\[prometheus\]"):
        PrometheusWriter("gpt", port, LOCAL)
