"""One list of layers, two engines: a plain module for one stage, DeepSpeed's PipelineModule for several."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.module import PipelineModule, TiedLayerSpec
from torch import nn

from lmscale.log import get_logger
from lmscale.models.block import TransformerLayer
from lmscale.models.context import ModelContext
from lmscale.models.decoder import decoder_specs
from lmscale.models.encoder import encoder_specs
from lmscale.models.encoder_decoder import DECODER_WORDS, encoder_decoder_specs
from lmscale.models.specs import NamedSpecs

_log = get_logger(__name__)

TIED_MODULES = "tied_modules"
IDLE = "idle"
"""Where a pipeline stage keeps the parameters that it is given because it has none of a group."""


def model_specs(context: ModelContext) -> NamedSpecs:
    """List the layers of a model by its architecture."""
    model = context.model
    if model.has_decoder_stack:
        return encoder_decoder_specs(context)
    return encoder_specs(context) if model.is_encoder_only else decoder_specs(context)


class SequentialModel(nn.Module):
    """Run the layers one after another on one rank, under the parameter names that PipelineModule gives them."""

    def __init__(self, specs: NamedSpecs):
        super().__init__()
        self.tied_modules = nn.ModuleDict()
        self._functions: list[Callable[[Any], Any]] = []
        self._decoder_start = next((index for index, (name, _) in enumerate(specs) if name == DECODER_WORDS), 0)
        for index, (_, spec) in enumerate(specs):
            if not isinstance(spec, TiedLayerSpec):
                module = spec.build()
                self.add_module(str(index), module)
                self._functions.append(module)
                continue
            if spec.key not in self.tied_modules:
                self.tied_modules[spec.key] = spec.build()
            module = self.tied_modules[spec.key]
            self._functions.append(functools.partial(spec.forward_fn, module) if spec.forward_fn else module)

    def forward(self, packed: Any) -> Any:
        """Pass a packed record through every layer."""
        return self.head(self.trunk(packed))

    def trunk(self, packed: Any) -> Any:
        """Pass a packed record through every layer but the head; generation needs logits of its last token alone."""
        return self.decode(self.encode(packed))

    def encode(self, packed: Any) -> Any:
        """Pass a packed record through the encoder that feeds a decoder; without one, return it as it is."""
        for function in self._functions[: self._decoder_start]:
            packed = function(packed)
        return packed

    def decode(self, packed: Any) -> Any:
        """Pass what the encoder gave through every layer behind it but the head."""
        for function in self._functions[self._decoder_start : -1]:
            packed = function(packed)
        return packed

    def head(self, packed: Any) -> Any:
        """Make logits of a packed record that comes out of the trunk."""
        return self._functions[-1](packed)


def build_model(
    specs: NamedSpecs, context: ModelContext, loss: Callable[..., torch.Tensor], *, pipeline: bool | None = None
) -> nn.Module:
    """Build this rank's layers on its device.

    Args:
        specs: all layers of the model.
        context: what they share.
        loss: loss(outputs, labels), for the pipeline's last stage.
        pipeline: build a PipelineModule; left out, where there are several stages.

    Returns:
        A SequentialModel or PipelineModule; both carry `logical_prefixes`, from a parameter's prefix to its logical one.
    Collectives: tied weights are broadcast between their stages; every rank must call.
    """
    topology = context.topology
    if topology.pp_size > 1 if pipeline is None else pipeline:
        with _quiet():
            model: nn.Module = PipelineModule(
                layers=[spec for _, spec in specs],
                topology=topology.deepspeed_grid(),
                loss_fn=loss,
                partition_method=_stage_begins(specs),
            )
    else:
        model = SequentialModel(specs).to(topology.device)
    model.logical_prefixes = logical_prefixes(specs)
    if context.sequence_parallel:
        _sum_over_tensor_parallel(model, context)
    return model


def _stage_begins(specs: NamedSpecs) -> str:
    """Name, for PipelineModule, the classes that a stage begins with: one for each transformer layer.

    It is the layer or, where tied layers stand right before it to compute what it reads, the first of these: a stage has
    to compute them itself.
    """
    begins = set()
    for index, (_, spec) in enumerate(specs):
        if spec.typename is TransformerLayer:
            while isinstance(specs[index - 1][1], TiedLayerSpec):
                index -= 1
            begins.add(specs[index][1].typename.__name__)
    return "type:" + "|".join(f"^{name}$" for name in sorted(begins))


def add_idle_parameter(model: nn.Module) -> nn.Parameter:
    """Give a pipeline stage a parameter that its output does not depend on.

    Every stage's optimizer must hold as many groups as the others', and none without a parameter. The gradient is 0, and the
    parameter is no part of the model: norms, tables and checkpoints leave it out.
    """
    parameter = nn.Parameter(torch.zeros(1, device=next(model.parameters()).device))
    if not hasattr(model, IDLE):
        setattr(model, IDLE, nn.ParameterList())
    getattr(model, IDLE).append(parameter)
    functions: list[Callable[[Any], Any]] = model.forward_funcs  # type: ignore[assignment]
    last = functions[-1]

    def idling(packed: Any) -> Any:
        out = last(packed)
        first, *rest = out if isinstance(out, tuple) else (out,)
        first = first + (parameter * 0.0).to(first.dtype)
        return (first, *rest) if isinstance(out, tuple) else first

    functions[-1] = idling
    return parameter


def untie_frozen(model: nn.Module) -> None:
    """Take tied parameters that are not trained out of what a pipeline reduces; with bf16 it asks each for its gradient."""
    for comm in getattr(model, "tied_comms", {}).values():
        names = [name for name in comm["weight_attr"] if comm["module"].get_parameter(name).requires_grad]
        comm["weight_attr"] = names


def logical_prefixes(specs: NamedSpecs) -> dict[str, str]:
    """Map the engines' module prefixes ("3", "tied_modules.word_embedding") to logical names ("layers.1", ...)."""
    prefixes: dict[str, str] = {IDLE: IDLE}
    for index, (name, spec) in enumerate(specs):
        if isinstance(spec, TiedLayerSpec):
            prefixes.setdefault(f"{TIED_MODULES}.{spec.key}", spec.key)
        else:
            prefixes[str(index)] = name
    return prefixes


def logical_name(model: nn.Module, parameter_name: str) -> str:
    """Return the layout-independent name of a parameter of a built model."""
    depth = 2 if parameter_name.startswith(TIED_MODULES) else 1
    parts = parameter_name.split(".")
    prefixes: dict[str, str] = model.logical_prefixes  # type: ignore[assignment]
    return ".".join([prefixes[".".join(parts[:depth])], *parts[depth:]])


def _sum_over_tensor_parallel(model: nn.Module, context: ModelContext) -> None:
    """Sum the gradients of parameters that saw a part of the sequence only; DeepSpeed does not know of them."""

    def reduce(grad: torch.Tensor) -> torch.Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=context.groups.tp)
        return grad

    for parameter in model.parameters():
        if getattr(parameter, "sequence_parallel", False) and parameter.requires_grad:
            parameter.register_hook(reduce)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """PipelineModule prints its partition; it goes to the log instead."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        yield
    if printed.getvalue():
        _log.debug("%s", printed.getvalue())
