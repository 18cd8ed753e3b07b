"""Adapters: bottlenecks behind a layer's attention and feed-forward, or beside the feed-forward.

They are thin, and whole on every tensor-parallel rank: nothing travels. Under sequence parallelism each rank sees its part
of the tokens, and gradients are summed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from lmscale.adapt.lora import multiply
from lmscale.adapt.parameters import parameter, zeros
from lmscale.adapt.specs import edit_layers
from lmscale.config.adapt import AdapterConfig, AdapterInit
from lmscale.models.block import TransformerLayer
from lmscale.models.context import ModelContext
from lmscale.models.specs import NamedSpecs

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"gelu": F.gelu, "relu": F.relu, "swish": F.silu}


def bottleneck_specs(specs: NamedSpecs, context: ModelContext, adapt: AdapterConfig) -> NamedSpecs:
    """Put bottlenecks into every transformer layer."""
    return edit_layers(specs, functools.partial(_put_into, context=context, adapt=adapt))


def _put_into(layer: TransformerLayer, context: ModelContext, adapt: AdapterConfig) -> None:
    for slot in adapt.slots:
        kind = BesideSublayer if slot == "parallel_adapter" else BehindSublayer
        setattr(layer, slot, kind(context, adapt, f"{layer.key}.{slot}"))


class Bottleneck(nn.Module):
    """scale up(activation(down(x))).

    Shapes: [.., h] -> [.., h].

    Args:
        context: what the layers share.
        adapt: the method.
        key: the module's logical name.
    """

    def __init__(self, context: ModelContext, adapt: AdapterConfig, key: str):
        super().__init__()
        self._activation, self._scale = _ACTIVATIONS[adapt.chosen_activation], adapt.chosen_scale
        hidden_size = context.model.hidden_size
        with context.weights.layer(key):
            self.down = Affine(context, adapt, adapt.width, hidden_size, _fill(context, adapt, hidden_size))
            fill = zeros if adapt.chosen_init == "zero_up" else _fill(context, adapt, adapt.width)
            self.up = Affine(context, adapt, hidden_size, adapt.width, fill)

    def added(self, x: torch.Tensor) -> torch.Tensor:
        """Compute what is added to the model's own."""
        out: torch.Tensor = self.up(self._activation(self.down(x)))
        return out if self._scale == 1.0 else out * self._scale


class BesideSublayer(Bottleneck):
    """Beside the feed-forward, on its input.

    Source: He et al. 2022, arXiv:2110.04366, sec. 4.
    """

    def forward(self, entering: torch.Tensor) -> torch.Tensor:
        """Compute what is added to the feed-forward's output."""
        return self.added(entering)


class BehindSublayer(Bottleneck):
    """Behind a sub-layer's output and its dropout, before the residual is added.

    pfeiffer reads, in post-norm models, what the norm makes of the output and the residual, as it would without an adapter;
    in pre-norm models, whose norm comes before the sub-layer, the output itself, as houlsby does in all.

    Source: houlsby: Houlsby et al. 2019, arXiv:1902.00751, sec. 2, and its code (google-research/adapter-bert). pfeiffer:
        Pfeiffer et al. 2021, arXiv:2005.00247, and adapter-hub's SeqBnConfig (original_ln_before and after). That one reads
        output + residual in pre-norm models.
    """

    def __init__(self, context: ModelContext, adapt: AdapterConfig, key: str):
        super().__init__(context, adapt, key)
        self._reads_normed = adapt.variant == "pfeiffer" and context.model.norm_position == "post"

    def forward(self, out: torch.Tensor, residual: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        """Return what the residual gets in the place of the sub-layer's output."""
        return out + self.added(norm(out + residual) if self._reads_normed else out)


class Affine(nn.Module):
    """x weight^T + bias; with several adaptations, those that each row names."""

    def __init__(
        self,
        context: ModelContext,
        adapt: AdapterConfig,
        outputs: int,
        inputs: int,
        fill: Callable[[torch.Tensor], torch.Tensor],
    ):
        super().__init__()
        self._context = context
        self.weight = parameter(context, (outputs, inputs), fill, entries=adapt.entries, is_partial=True)
        self.bias = parameter(context, (outputs,), zeros, entries=adapt.entries, is_partial=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply and add."""
        return multiply(x, self.weight, self._context) + self._chosen_bias()

    def _chosen_bias(self) -> torch.Tensor:
        if self.bias.dim() == 1:
            return self.bias
        chosen = self.bias[self._context.rows.ids]
        return chosen[None] if self._context.sequence_parallel else chosen[:, None]


def _fill(context: ModelContext, adapt: AdapterConfig, inputs: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Draw a matrix by the method's init."""
    init: AdapterInit = adapt.chosen_init
    if init == "zero_up":
        return context.weights.uniform(inputs**-0.5)
    return context.weights.normal(adapt.chosen_init_std, truncated=init == "truncated_normal")
