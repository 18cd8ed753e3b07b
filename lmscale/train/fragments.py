"""This rank's part of the training state, as slices of logical tensors.

DeepSpeed keeps master weights and moments in flat buffers, cut over the data-parallel ranks in a different way for each
ZeRO stage. A Fragment says, for each of these pieces, which range of which logical tensor it is; checkpoints, norms and
memory reports are written against that and know no ZeRO stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lmscale.models.build import IDLE, logical_name
from lmscale.models.fused import row_parts
from lmscale.optim.adafactor import Share
from lmscale.plan.names import is_layer_matrix


@dataclass(frozen=True)
class LogicalTensor:
    """A parameter of the whole model, and how tensor parallelism cuts it.

    With `tp_dim`, the tensor is cut along that dimension into `tp_stride` blocks, each of them over the ranks: stride 2
    is swiglu's [gate; up], of which every rank holds a slice of both.
    """

    name: str
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    tp_dim: int | None
    tp_stride: int


@dataclass(frozen=True)
class Fragment:
    """A range [start, end) of this rank's flattened (tensor-parallel local) slice of a logical tensor.

    master is the fp32 view of it that the optimizer updates; `key`, `offset` locate its moments:
    `optimizer.state[key][name][offset : offset + len]`. Where `is_frozen`, nothing updates it: master is a view of the weights
    in their own precision, there are no moments, and where `is_dp_copy` another data-parallel rank has the same.
    """

    tensor: LogicalTensor
    parameter: nn.Parameter
    start: int
    end: int
    master: torch.Tensor
    key: Any
    offset: int
    is_tied_copy: bool
    is_frozen: bool = False
    is_dp_copy: bool = False

    def moment(self, optimizer: torch.optim.Optimizer, name: str) -> torch.Tensor:
        """Return the view of one of the optimizer's moments of this range, 1-D fp32."""
        return optimizer.state[self.key][name].view(-1).narrow(0, self.offset, self.end - self.start)

    @property
    def share(self) -> Share:
        """The same, as an optimizer of whole matrices asks for it."""
        tensor = self.tensor
        return Share(
            name=tensor.name,
            shape=tensor.shape,
            local_shape=tensor.local_shape,
            tp_dim=tensor.tp_dim,
            start=self.start,
            end=self.end,
            key=self.key,
            offset=self.offset,
            parts=row_parts(self.parameter),
            is_hidden_matrix=is_layer_matrix(tensor.name, len(tensor.shape)),
        )


def logical_tensor(model: nn.Module, name: str, parameter: nn.Parameter, tp_size: int) -> LogicalTensor:
    """Describe a parameter of a built model from megatron-core's marks on it."""
    local_shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    is_split = bool(getattr(parameter, "tensor_model_parallel", False)) and tp_size > 1
    tp_dim = int(parameter.partition_dim) if is_split else None  # type: ignore[attr-defined]
    shape = tuple(size * tp_size if dim == tp_dim else size for dim, size in enumerate(local_shape))
    stride = int(parameter.partition_stride) if is_split else 1  # type: ignore[attr-defined]
    return LogicalTensor(logical_name(model, name), shape, local_shape, tp_dim, stride)


def fragments(
    model: nn.Module,
    optimizer: Any,
    zero_stage: int,
    tp_size: int,
    *,
    dp_rank: int = 0,
    with_empty: bool = False,
) -> list[Fragment]:
    """List this rank's fragments, in the order of the model's parameters.

    Args:
        model: the module under the engine.
        optimizer: DeepSpeed's optimizer (the plain one under ZeRO 0).
        zero_stage: 0 to 3.
        tp_size: tensor-parallel size.
        dp_rank: this rank's place among those that hold the same slices.
        with_empty: list parameters too of which other ranks hold everything.
    """
    found = []
    for name, parameter in model.named_parameters():
        if name.startswith(f"{IDLE}."):
            continue
        tensor = logical_tensor(model, name, parameter, tp_size)
        if not parameter.requires_grad:
            frozen = _frozen(parameter, tensor, zero_stage, dp_rank)
            found += [frozen] if with_empty or frozen.master.numel() else []
            continue
        start, master, key, offset = _locate(parameter, optimizer, zero_stage)
        if with_empty or master.numel():
            tied = bool(getattr(parameter, "ds_pipe_replicated", False))
            found.append(Fragment(tensor, parameter, start, start + master.numel(), master, key, offset, tied))
    return found


def _frozen(parameter: nn.Parameter, tensor: LogicalTensor, zero_stage: int, dp_rank: int) -> Fragment:
    """Describe what this rank holds of a parameter that is not trained: all of it below ZeRO 3, else its partition."""
    tied = bool(getattr(parameter, "ds_pipe_replicated", False))
    if zero_stage < 3:
        master = parameter.data.view(-1)
        is_copy = dp_rank > 0
        return Fragment(tensor, parameter, 0, master.numel(), master, None, 0, tied, True, is_copy)
    partition = parameter.ds_tensor.data.view(-1)
    start = min(partition.numel() * dp_rank, parameter.ds_numel)
    size = min(partition.numel(), parameter.ds_numel - start)
    return Fragment(tensor, parameter, start, start + size, partition.narrow(0, 0, size), None, 0, tied, True)


def _locate(parameter: nn.Parameter, optimizer: Any, zero_stage: int) -> tuple[int, torch.Tensor, Any, int]:
    """Find (start in the local slice, master view, key of optimizer.state, offset in it); the view may be empty."""
    if zero_stage == 0:
        return 0, parameter.data.view(-1), parameter, 0
    if zero_stage == 3:
        return _locate_zero3(parameter, optimizer)
    is_bf16 = hasattr(optimizer, "fp32_groups_flat_partition")
    flats = optimizer.fp32_groups_flat_partition if is_bf16 else optimizer.single_partition_of_fp32_groups
    mapping = parameter._hp_mapping
    if mapping is None:
        groups = optimizer.bf16_groups if is_bf16 else optimizer.bit16_groups
        flat = next(flat for flat, group in zip(flats, groups, strict=True) if any(p is parameter for p in group))
        return 0, flat.data[:0], flat, 0
    flat, address = flats[mapping.param_group_index], mapping.hp_fragment_address
    return mapping.lp_fragment_address.start, flat.data.narrow(0, address.start, address.numel), flat, address.start


def _locate_zero3(parameter: nn.Parameter, optimizer: Any) -> tuple[int, torch.Tensor, Any, int]:
    """ZeRO 3 cuts each parameter into equal ranges, the last ones padded."""
    group, offset, partition_size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = partition_size * optimizer.partition_rank if hasattr(optimizer, "partition_rank") else None
    if start is None:
        start = partition_size * torch.distributed.get_rank(parameter.ds_process_group)
    start = min(start, parameter.ds_numel)
    size = min(partition_size, parameter.ds_numel - start)
    flat = optimizer.fp32_partitioned_groups_flat[group]
    return start, flat.data.narrow(0, offset, size), flat, offset


def write_back(optimizer: Any, zero_stage: int) -> None:
    """Copy the master weights, after they were overwritten, to the weights that forward uses.

    Collectives: an all-gather over the data-parallel group under ZeRO 1 and 2, and of the persistent parameters under 3.
    """
    if zero_stage in (1, 2):
        optimizer.update_lp_params()
    elif zero_stage == 3:
        # Parameters that are whole now would stay as they are: a gather takes what is cut only.
        optimizer._partition_all_parameters()
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
