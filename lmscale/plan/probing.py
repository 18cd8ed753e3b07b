"""What a probe reads and holds, without building anything."""

from __future__ import annotations

from typing import Literal

from lmscale.config.adapt import ProbingConfig
from lmscale.config.model import ModelConfig
from lmscale.config.task import TaskKind
from lmscale.plan.names import Shape

PROBE = "probe"
"""Before the names of a classifier's parameters."""
Pooling = Literal["cls", "first", "last", "mean", "words", "sequence"]
"""What becomes of the hidden states of a row: one vector, one for the first piece of each word, or all of them."""


def probed_layers(model: ModelConfig, adapt: ProbingConfig) -> list[int]:
    """List the layers whose hidden states are read, in order: 0 the embeddings, num_layers the last."""
    if adapt.layers is None:
        return [model.num_layers]
    if isinstance(adapt.layers, str):
        return list(range(model.num_layers + 1))
    return sorted(adapt.layers)


def pooling_of(adapt: ProbingConfig, kind: TaskKind) -> Pooling:
    """Say what is kept of a row, for a kind of task."""
    if kind == "token_classification":
        return "words"
    return "sequence" if adapt.head == "attention" or kind == "extractive_qa" else adapt.pooling


def probe_shapes(model: ModelConfig, adapt: ProbingConfig, num_outputs: int) -> dict[str, Shape]:
    """List the parameters of one classifier; with several layers there are as many of them.

    linear: C h + C; mlp: h^2 + h more; attention: h more; layers: mix: num_layers + 2 more.

    Shapes: h hidden, C outputs.
    """
    hidden = model.hidden_size
    shapes: dict[str, Shape] = {}
    if adapt.layers == "mix":
        shapes |= {f"{PROBE}.mix_weights": (model.num_layers + 1,), f"{PROBE}.mix_scale": (1,)}
    if adapt.head == "attention":
        shapes[f"{PROBE}.query"] = (hidden,)
    if adapt.head == "mlp":
        shapes |= {f"{PROBE}.hidden.weight": (hidden, hidden), f"{PROBE}.hidden.bias": (hidden,)}
    return shapes | {f"{PROBE}.classifier.weight": (num_outputs, hidden), f"{PROBE}.classifier.bias": (num_outputs,)}
