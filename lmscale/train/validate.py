"""Held-out loss and perplexity, corpus by corpus."""

from __future__ import annotations

import math

from lmscale.feed.loader import HeldOut
from lmscale.monitor import metrics
from lmscale.train.engine import Engine


def validate(engine: Engine, corpora: dict[str, HeldOut]) -> dict[str, float]:
    """Measure each corpus: mean cross entropy over its labels in nats, and its exponential.

    Returns:
        Values under the tags valid/<corpus>/lm_loss and valid/<corpus>/perplexity, the same on every rank.
    Collectives: every rank must call.
    """
    values = {}
    for name, corpus in corpora.items():
        batches = corpus.read() if engine.reads_data else None
        total, count = engine.evaluate(batches, corpus.num_micro_batches)
        loss = total / count
        values[metrics.valid_loss_tag(name)] = loss
        values[metrics.valid_perplexity_tag(name)] = math.exp(min(loss, 700.0))
    return values
