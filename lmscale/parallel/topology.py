"""The layout of the ranks. The only place that talks to megatron-core's parallel_state and to DeepSpeed's process grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from lmscale.log import prints_logged
from lmscale.parallel.device import prepare_device


@dataclass(frozen=True)
class Topology:
    """This rank's place, and the groups that it talks to.

    Ranks are numbered tensor-parallel fastest, then data-parallel, then pipeline: the order of megatron-core and of
    DeepSpeed both, which `init_topology` asserts.
    """

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    device: torch.device
    tp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    model_group: dist.ProcessGroup
    """All ranks of one model replica: tensor- and pipeline-parallel."""

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank reads tokens."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pp_rank == self.pp_size - 1

    @property
    def mpu(self) -> MegatronMpu:
        """The adapter through which DeepSpeed asks for groups."""
        return MegatronMpu()

    @property
    def megatron_groups(self) -> ProcessGroupCollection:
        """The groups as megatron-core's modules take them."""
        return ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])

    def deepspeed_grid(self) -> Any:
        """Build DeepSpeed's description of the same layout, for PipelineModule."""
        from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

        return PipeModelDataParallelTopology(num_pp=self.pp_size, num_mp=self.tp_size, num_dp=self.dp_size)


class MegatronMpu:
    """Answer DeepSpeed's questions about groups from megatron-core's parallel_state.

    DeepSpeed says "model parallel" where megatron-core says "tensor model parallel".
    """

    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_pipeline_model_parallel_rank = staticmethod(parallel_state.get_pipeline_model_parallel_rank)
    get_pipeline_model_parallel_world_size = staticmethod(parallel_state.get_pipeline_model_parallel_world_size)
    get_pipeline_model_parallel_group = staticmethod(parallel_state.get_pipeline_model_parallel_group)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)


def init_topology(tp_size: int, pp_size: int) -> Topology:
    """Start torch.distributed (unless it runs), lay out the groups and find this rank's place.

    Collectives: creates process groups; every rank must call.
    """
    import deepspeed

    device = prepare_device()
    with prints_logged("deepspeed"):
        if not dist.is_initialized():
            deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
        elif not deepspeed.comm.is_initialized():
            deepspeed.init_distributed()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp_size, pipeline_model_parallel_size=pp_size, create_gloo_process_groups=False
    )
    topology = Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=tp_size,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=pp_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        device=device,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        model_group=parallel_state.get_model_parallel_group(),
    )
    _assert_same_order(topology)
    return topology


def _assert_same_order(topology: Topology) -> None:
    place = topology.deepspeed_grid().get_coord(topology.rank)
    ours = (topology.pp_rank, topology.dp_rank, topology.tp_rank)
    theirs = (place.pipe, place.data, place.model)
    if ours != theirs:
        raise AssertionError(f"rank {topology.rank}: megatron-core places it at {ours}, DeepSpeed at {theirs}")


def close_topology() -> None:
    """Leave the process groups, together: without the barrier some finished runs exit non-zero.

    Collectives: barrier over all ranks.
    """
    if dist.is_initialized():
        dist.barrier()
        parallel_state.destroy_model_parallel()
        for name, value in list(vars(parallel_state).items()):
            if isinstance(value, dist.ProcessGroup):  # it leaves some
                setattr(parallel_state, name, None)
        dist.destroy_process_group()
