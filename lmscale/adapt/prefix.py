"""Prefixes: trained keys and values that stand in front of every attention's (prefix tuning, P-tuning v2).

They are trained directly, or made by a network: tanh(inputs W1^T + b1) W2^T + b2, of which each kind of attention (of an
encoder or a decoder alone; of a decoder that is fed; cross) has one. What comes before W2 is whole on every rank and shared
by the layers, as T5's relative bias is: it stands before each layer as a tied layer, and the first of a stage computes it.
The rows of W2 that make a layer's keys and values are that layer's, split over its heads.

Prefix keys are not rotated, and a relative bias is 0 on them. Tokens count their positions from p on.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from deepspeed.runtime.pipe.module import TiedLayerSpec
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import nn

from lmscale.adapt.parameters import parameter
from lmscale.adapt.specs import edit_layers, put_before_layers
from lmscale.config.adapt import PrefixTuningConfig, PTuningV2Config
from lmscale.config.model import ModelConfig
from lmscale.models.attention import CoreAttention
from lmscale.models.block import Stack, TransformerLayer
from lmscale.models.context import ModelContext
from lmscale.models.linear import linear
from lmscale.models.specs import NamedSpec, NamedSpecs
from lmscale.models.wire import Packed
from lmscale.parallel.device import multiplies_slowly
from lmscale.plan.adaptation import attentions

PrefixConfig = PrefixTuningConfig | PTuningV2Config
NETWORK_PARAMETERS = ("inputs", "weight", "bias")


def prefix_specs(specs: NamedSpecs, context: ModelContext, adapt: PrefixConfig) -> NamedSpecs:
    """Put keys and values in front of every attention's, and the networks that make them before every layer."""
    if adapt.projection is not None:
        specs = put_before_layers(specs, functools.partial(_networks, context=context, adapt=adapt))
    return edit_layers(specs, functools.partial(_put_in_front, context=context, adapt=adapt))


def network_key(kind: str) -> str:
    """Return the logical name of the network of a kind of attention: self, decoder_self or cross."""
    return f"prefix_{kind}"


def _put_in_front(layer: TransformerLayer, context: ModelContext, adapt: PrefixConfig) -> None:
    cores: dict[str, CoreAttention] = {"self": layer.attention.core_attention}
    if hasattr(layer, "cross_attention"):
        cores = {"decoder_self": layer.attention.core_attention, "cross": layer.cross_attention.core_attention}
    for kind, core in cores.items():
        core.prefix = Prefix(context, adapt, core.key, kind)
    if adapt.projection is not None:
        layer.reads = tuple(network_key(kind) for kind in cores)


def _networks(stack: Stack, index: int, context: ModelContext, adapt: PrefixConfig) -> NamedSpecs:
    if not stack.is_fed:
        return [_network("self", PrefixNetwork, index, context, adapt)]
    own = _network("decoder_self", PrefixNetwork, index, context, adapt)
    return [own, _network("cross", CrossPrefixNetwork, index, context, adapt)]


def _network(kind: str, module: type[nn.Module], index: int, context: ModelContext, adapt: PrefixConfig) -> NamedSpec:
    key = network_key(kind)
    spec = TiedLayerSpec(
        key,
        module,
        context,
        adapt,
        key,
        forward_fn=functools.partial(_make_before, layer_index=index),
        tied_weight_attr=list(NETWORK_PARAMETERS),
    )
    return key, spec


def _make_before(network: PrefixNetwork, packed: Packed, layer_index: int) -> Packed:
    """Compute what the layers' keys and values are made of, before the stage's first layer; the forward of a spec."""
    network.make_before(packed, layer_index)
    return packed


class PrefixNetwork(nn.Module):
    """tanh(inputs W1^T + b1), which every layer makes its keys and values of.

    inputs are drawn from N(0, 1), W1 and b1 from U(-1/sqrt(h), 1/sqrt(h)): an embedding and a linear layer, as torch has
    them.

    Shapes: inputs [p, h], W1 [m, h], b1 [m] -> [p, m]; of several adaptations [N, ..] -> [b, p, m].

    Source: Li and Liang 2021, arXiv:2101.00190, sec. 4.3; Liu et al. 2022, arXiv:2110.07602, its code
        (model/prefix_encoder.py).
    """

    def __init__(self, context: ModelContext, adapt: PrefixConfig, key: str):
        super().__init__()
        assert adapt.projection is not None
        self._context, self._key = context, key
        self._first: int | None = None
        hidden, weights = context.model.hidden_size, context.weights
        with weights.layer(key):
            draw = weights.uniform(hidden**-0.5)
            self.inputs = parameter(context, (adapt.length, hidden), weights.normal(1.0), entries=adapt.entries)
            self.weight = parameter(context, (adapt.projection, hidden), draw, entries=adapt.entries)
            self.bias = parameter(context, (adapt.projection,), draw, entries=adapt.entries)

    def make_before(self, packed: Packed, layer_index: int) -> None:
        """Compute it where this is the stage's first, and leave it for the layers."""
        if self._first is None:
            self._first = layer_index
        if self._first == layer_index:
            context = self._context
            context.rows.made[self._key] = self(context.wire.unpack(packed).adapter_ids)

    def forward(self, ids: torch.Tensor | None) -> torch.Tensor:
        """Compute it for the adaptations that the rows name.

        Collectives: a sum of the gradient over the tensor-parallel group, in backward: each rank's heads give a part of it.
        """
        inputs = self.inputs if ids is None else self.inputs[ids]
        made = torch.tanh(_affine(inputs, self.weight, self.bias, ids))
        group = self._context.groups.tp
        return made if group.size() == 1 else copy_to_tensor_model_parallel_region(made, group=group)


class CrossPrefixNetwork(PrefixNetwork):
    """The second before a layer; a pipeline's stages begin with the first, and tell them apart by their class."""


class Prefix(nn.Module):
    """The keys and values in front of one attention's.

    A table is drawn from N(0, 1); the rows of the second matrix and their bias from U(-1/sqrt(m), 1/sqrt(m)).

    Shapes: table [p, 2, g/t, d]; or weight [2 g/t d, m], bias [2 g/t d]; of several adaptations [N, ..].

    Args:
        context: what the layers share.
        adapt: the method.
        key: the logical name of the core attention.
        kind: the attention's: self, decoder_self or cross.
    """

    def __init__(self, context: ModelContext, adapt: PrefixConfig, key: str, kind: str):
        super().__init__()
        self._context, self._key, self._network = context, f"{key}.prefix", network_key(kind)
        self._dropout, self._is_made = adapt.dropout, adapt.projection is not None
        groups, size = context.model.query_groups, context.model.head_size
        weights, entries = context.weights, adapt.entries
        with weights.layer(self._key):
            if adapt.projection is None:
                shape = (adapt.length, 2, groups, size)
                self.table = parameter(context, shape, weights.normal(1.0), entries=entries, tp_dim=2)
                return
            width, draw = 2 * groups * size, weights.uniform(adapt.projection**-0.5)
            matrix = (width, adapt.projection)
            self.weight = parameter(context, matrix, draw, entries=entries, tp_dim=0, tp_stride=2)
            self.bias = parameter(context, (width,), draw, entries=entries, tp_dim=0, tp_stride=2)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return keys and values [b or 1, g/t, p, d] of the rows of the pass, and None: each row has all."""
        context, rows = self._context, self._context.rows
        table = self._table(rows.ids)
        if table.dim() == 4:
            table = table[None]
        if self.training and self._dropout:
            context.dropout.seed(table.device, self._key, rows.micro_batch, "prefix", differs_over_tp=True)
            table = F.dropout(table.expand(rows.size, -1, -1, -1, -1), self._dropout)
        keys, values = table.permute(2, 0, 3, 1, 4)
        return keys, values, None

    def _table(self, ids: torch.Tensor | None) -> torch.Tensor:
        if not self._is_made:
            return self.table if ids is None else self.table[ids]
        made = self._context.rows.given[self._network]
        size = self._context.model.head_size
        return _affine(made, self.weight, self.bias, ids).unflatten(-1, (2, -1, size))


def _affine(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Compute x weight^T + bias, [p, i] -> [p, o]; with ids, each row by the weights that it names, [b, p, i] -> [b, p, o]."""
    if ids is None:
        return linear(x, weight, bias)
    chosen, added, dtype = weight[ids], bias[ids][:, None], x.dtype
    if multiplies_slowly(x):
        x, chosen, added = x.float(), chosen.float(), added.float()
    return torch.baddbmm(added, x, chosen.transpose(1, 2)).to(dtype)


def materialize(
    tensors: Mapping[str, torch.Tensor], model: ModelConfig, adapt: PrefixConfig
) -> dict[str, torch.Tensor]:
    """Replace the networks among an adaptation's tensors by the keys and values that they make.

    Args:
        tensors: logical tensors of a trained adaptation, by name.
        model: the base's architecture.
        adapt: the method.

    Returns:
        `<core attention>.prefix.table` [p, 2, g, d] ([N, p, 2, g, d] of several adaptations) of each attention, and what
        else there was, such as a task's head. Tables that are trained directly come back as they are.

    Source: Li and Liang 2021, arXiv:2101.00190, sec. 4.3: once trained, only the prefix is kept.
    """
    if adapt.projection is None:
        return dict(tensors)
    made = dict(tensors)
    for name, kind, _ in attentions(model):
        network = [tensors[f"{network_key(kind)}.{part}"] for part in NETWORK_PARAMETERS]
        weight, bias = (made.pop(f"{name}.prefix.{part}") for part in ("weight", "bias"))
        made[f"{name}.prefix.table"] = make_table(*network, weight, bias, model)
    return {name: tensor for name, tensor in made.items() if not name.startswith("prefix_")}


def make_table(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    layer_weight: torch.Tensor,
    layer_bias: torch.Tensor,
    model: ModelConfig,
) -> torch.Tensor:
    """Compute the keys and values of one attention from whole tensors: [p, 2, g, d], or [N, p, 2, g, d]."""
    middle = torch.tanh(inputs @ weight.mT + bias.unsqueeze(-2))
    made = middle @ layer_weight.mT + layer_bias.unsqueeze(-2)
    return made.unflatten(-1, (2, model.query_groups, model.head_size))


def fixed(adapt: PrefixConfig) -> PrefixConfig:
    """Describe the method once its tensors are materialized: tables without a network, and no dropout."""
    changes: dict[str, object] = {"projection": None, "dropout": 0.0}
    return adapt.model_copy(update=changes)
