"""The newest metrics over HTTP, for Prometheus to collect: monitor.prometheus_port.

    lmscale_train_lm_loss{run="gpt3-125m"} 2.97
    lmscale_valid_lm_loss{run="gpt3-125m",corpus="wiki"} 3.01

A tag is the name of a metric with lmscale_ before it and _ where Prometheus takes no other character. Held-out metrics are
labelled with the corpus, "" where they are of none: Prometheus wants the same labels wherever it finds a name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lmscale.errors import ConfigError
from lmscale.log import get_logger
from lmscale.monitor.histogram import Histogram
from lmscale.monitor.metrics import METRICS, Record

_log = get_logger(__name__)

_KEY = "monitor.prometheus_port"
_CORPUS = "<corpus>"
"""In the place of a corpus's name, as in the list of metrics."""


class PrometheusWriter:
    """Serve the last value of each metric, from a thread of this process.

    Args:
        run: the run's name, a label of every metric.
        port, host: where; the host decides who can read.

    Raises:
        ConfigError: if prometheus-client is not installed, or the port cannot be had.
    """

    def __init__(self, run: str, port: int, host: str):
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ImportError:
            raise ConfigError(
                "needs the prometheus-client package",
                field=_KEY,
                value=port,
                remedy="pip install lmscale[prometheus]",
            ) from None
        self._run = run
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Any] = {}
        self._tags: dict[str, str] = {}
        self._left_out: set[str] = set()
        try:
            self._server, self._thread = start_http_server(port, host, self._registry)
        except OSError as error:
            reason = f"cannot be opened on {host}: {error.strerror or error}"
            raise ConfigError(reason, field=_KEY, value=port, remedy="choose another one") from None

    def write(self, record: Record) -> None:
        """Serve the values of a record from now on."""
        progress = {"step": record.step, "consumed_samples": record.consumed_samples}
        for tag, value in {**progress, **record.scalars()}.items():
            labels = {"run": self._run}
            kind, _, rest = tag.partition("/")
            if kind == "valid":
                corpus, _, name = rest.partition("/") if "/" in rest else ("", "", rest)
                labels["corpus"], tag = corpus, f"valid/{_CORPUS}/{name}"
            gauge = self._gauge(tag, labels)
            if gauge is not None:
                gauge.labels(**labels).set(value)

    def _gauge(self, tag: str, labels: Mapping[str, str]) -> Any:
        """Return the gauge of a tag; None where another tag has its name."""
        name = "lmscale_" + re.sub(r"[^a-zA-Z0-9_]", "_", tag.replace(f"{_CORPUS}/", ""))
        if name not in self._gauges:
            from prometheus_client import Gauge

            text = next((metric.meaning for metric in METRICS if metric.tag == tag), tag)
            self._gauges[name], self._tags[name] = Gauge(name, text, list(labels), registry=self._registry), tag
        if self._tags[name] == tag:
            return self._gauges[name]
        if tag not in self._left_out:
            _log.warning("Prometheus: %s is not served: its name, %s, is that of %s", tag, name, self._tags[name])
            self._left_out.add(tag)
        return None

    def text(self, tag: str, markdown: str, step: int | None = None) -> None:
        """Do nothing: Prometheus knows numbers."""

    def histograms(self, step: int, found: Mapping[str, Histogram]) -> None:
        """Do nothing: Prometheus would add these up."""

    def close(self) -> None:
        """Stop serving, and give the port back."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
