"""A checkpoint's model without an engine: for reading it, not for training it."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from lmscale.adapt.registry import adapted_specs
from lmscale.config.adapt import num_adaptations, prefix_length, prompt_length
from lmscale.config.check import CROSS_SECTION_RULES
from lmscale.config.checkpoint_paths import tokenizer_copy
from lmscale.config.data import TokenizerConfig
from lmscale.config.io import load_run
from lmscale.config.parallel import ParallelConfig
from lmscale.config.run import RunConfig
from lmscale.errors import CheckpointError, ConfigError
from lmscale.models.build import SequentialModel, build_model, model_specs
from lmscale.models.context import ModelContext, build_context
from lmscale.models.loss import LanguageModelLoss
from lmscale.models.transformer_config import build_transformer_config
from lmscale.parallel.seeds import WeightInit
from lmscale.parallel.topology import Topology, init_topology
from lmscale.plan.adaptation import Adaptation, head_of
from lmscale.plan.names import Shape
from lmscale.train.adapted import StoredAdaptation, check_same_tensors, name_in_base
from lmscale.train.checkpoint_reader import PARAMETER, CheckpointReader
from lmscale.train.fragments import logical_tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def read_config(checkpoint: Path) -> RunConfig:
    """Read the config of the run that wrote a checkpoint, its tokenizer replaced by the checkpoint's copy."""
    config = load_run(checkpoint / "config.yaml")
    copy = checkpoint / "tokenizer"
    if config.tokenizer is None or not copy.is_dir():
        return config
    path = str(tokenizer_copy(checkpoint, config.tokenizer.path))
    tokenizer = TokenizerConfig(type=config.tokenizer.type, path=path)
    return config.model_copy(update={"tokenizer": tokenizer})


def start_topology(config: RunConfig, device: str | torch.device | None) -> Topology:
    """Lay out all ranks that there are as tensor-parallel ones, and find this rank's place.

    A single process makes its group in memory, without a port. Ranks that a launcher started find one another as it
    says.

    Args:
        config: of the model that is to be split.
        device: where to compute; None takes the rank's GPU where there is one.

    Raises:
        ConfigError: if the model does not divide over the ranks, or the device is not there.
    Collectives: creates process groups; every rank must call.
    """
    chosen = None if device is None else _device(device)
    num_ranks = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    split = config.model_copy(update={"parallel": ParallelConfig(tp_size=num_ranks)})
    for rule in CROSS_SECTION_RULES:
        rule(split)
    if not dist.is_initialized() and num_ranks == 1:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints what it builds; stdout is the caller's
        topology = init_topology(tp_size=num_ranks, pp_size=1)
    if chosen is None or chosen == topology.device:
        return topology
    if num_ranks > 1 and chosen.type != topology.device.type:
        rule = f"the group of these {num_ranks} ranks is over {topology.device.type}"
        raise ConfigError(rule, field="device", value=str(chosen), remedy="leave it out, or set DS_ACCELERATOR=cpu")
    return replace(topology, device=chosen)


def _device(name: str | torch.device) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ConfigError("is not a device of this machine", field="device", value=str(name)) from None
    return device


def build_module(
    reader: CheckpointReader,
    config: RunConfig,
    topology: Topology,
    precision: str,
    stored: StoredAdaptation | None = None,
    has_prompts: bool = False,
) -> tuple[SequentialModel, ModelContext]:
    """Build this rank's slice of a checkpoint's model, in eval mode.

    Positions and document ids are on its wire always, so that sequences of different lengths share a batch and, in a
    decoder, tokens can be read one at a time.

    Args:
        reader: the checkpoint.
        config: its config.
        topology: all ranks tensor-parallel.
        precision: fp32, bf16 or fp16.
        stored: an adaptation, of which `reader` is the base.
        has_prompts: put prompt_places on the wire of a base too, for adaptations that come later.

    Raises:
        CheckpointError: if the checkpoint's tensors are not those of its config.
    """
    if precision not in DTYPES:
        raise ConfigError(f"must be one of {', '.join(DTYPES)}", field="precision", value=precision)
    blank = _Blank(config.train.seed)
    adaptation = stored.adaptation if stored is not None else Adaptation(config.model, head=head_of(config))
    context = replace(
        build_context(
            config.model,
            topology,
            seed=config.train.seed,
            objective=config.objective,
            isolates_documents=True,
            packs_examples=True,
            prompt_length=max(prompt_length(adaptation.adapt), int(has_prompts)),
            prefix_length=prefix_length(adaptation.adapt),
            num_adaptations=num_adaptations(adaptation.adapt),
            head=adaptation.head,
        ),
        weights=blank,
        transformer=build_transformer_config(config.model, blank, topology.tp_size, sequence_parallel=False),
    )
    specs = adapted_specs(model_specs(context), context, adaptation.adapt)
    module = build_model(specs, context, LanguageModelLoss(context), pipeline=False)
    assert isinstance(module, SequentialModel)
    module.to(DTYPES[precision]).eval()
    _fill(module, reader, topology, stored)
    return module, context


class _Blank(WeightInit):
    """Draws nothing: every weight is about to be read."""

    def normal(self, std: float, truncated: bool = False) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda tensor: tensor

    def uniform(self, bound: float) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda tensor: tensor


@torch.no_grad()
def _fill(
    module: SequentialModel, reader: CheckpointReader, topology: Topology, stored: StoredAdaptation | None
) -> None:
    tp_rank, tp_size, in_base = topology.tp_rank, topology.tp_size, reader.shapes()
    described = {
        name: logical_tensor(module, name, parameter, tp_size) for name, parameter in module.named_parameters()
    }
    _check_shapes(reader, stored, {tensor.name: tensor.shape for tensor in described.values()})
    for name, parameter in module.named_parameters():
        tensor = described[name]
        if stored is not None and tensor.name in stored.shapes:
            values = stored.slice_of(tensor, tp_rank, tp_size)
        else:
            tensor = replace(tensor, name=name_in_base(tensor.name, in_base))
            values = reader.fragment(PARAMETER, tensor, tp_rank, tp_size, 0, parameter.numel())
        parameter.copy_(values.view(parameter.shape))


def _check_shapes(reader: CheckpointReader, stored: StoredAdaptation | None, mine: dict[str, Shape]) -> None:
    """Check that the files hold what the built model has: nothing more, but for a head that a task's replaces."""
    if stored is None:
        check_same_tensors(reader, mine)
        return
    in_base = reader.shapes()
    for name, shape in sorted(mine.items()):
        there = stored.shapes.get(name, in_base.get(name_in_base(name, in_base), "absent"))
        if there != shape:
            path = stored.reader.path if name in stored.shapes else reader.path
            raise CheckpointError(
                f"{name} is {there} in its files and {shape} by the config.yaml of {stored.reader.path}",
                field="checkpoint",
                value=str(path),
            )
