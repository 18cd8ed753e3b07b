"""Several adaptations side by side: batches whose rows train their own, and biases that begin as the base's."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

from lmscale.batch import ADAPTER_IDS, LOSS_MASK
from lmscale.parallel.topology import Topology
from lmscale.plan.adaptation import base_bias_of
from lmscale.train.checkpoint_reader import PARAMETER, CheckpointReader, tp_slice
from lmscale.train.fragments import Fragment

MicroBatch = dict[str, torch.Tensor]


def weigh_entries(
    micro_batches: list[MicroBatch], num_entries: int, topology: Topology
) -> tuple[list[MicroBatch], torch.Tensor]:
    """Weigh labels so that the loss of each adaptation is the mean over its own labels in the global batch.

    A mean over all labels, which the engine takes, becomes the sum of these means: a label of adaptation n counts
    (labels of all) / (labels of n). So an adaptation's gradient is what it would be if it were trained alone, however many
    rows the others have.

    Args:
        micro_batches: this rank's, of a step; empty on stages that read no data.
        num_entries: adaptations, N.
        topology: the ranks.

    Returns:
        The same with other loss masks, and bool [N] on the device, the same on all ranks: the adaptations that have labels.
    Collectives: a sum over the data-parallel group, a maximum over the pipeline's.
    """
    counts = torch.zeros(num_entries, dtype=torch.float32, device=topology.device)
    for batch in micro_batches:
        of_rows = batch[LOSS_MASK.name].flatten(1).sum(dim=1)
        counts.index_add_(0, batch[ADAPTER_IDS.name].to(counts.device), of_rows.to(counts.device))
    if topology.dp_size > 1:
        dist.all_reduce(counts, group=topology.dp_group)
    if topology.pp_size > 1:
        dist.all_reduce(counts, op=dist.ReduceOp.MAX, group=topology.pp_group)
    factors = (counts.sum() / counts.clamp(min=1.0)).cpu()
    weighed = []
    for batch in micro_batches:
        mask = batch[LOSS_MASK.name]
        factor = factors[batch[ADAPTER_IDS.name]].view(-1, *[1] * (mask.dim() - 1))
        weighed.append({**batch, LOSS_MASK.name: mask * factor})
    return weighed, counts > 0


def begin_as_base(fragments: Iterable[Fragment], base: CheckpointReader, topology: Topology) -> None:
    """Give the biases of several adaptations (BitFit's) the values that they have in the base.

    Args:
        fragments: this rank's, under ZeRO 0.
        base: the base's checkpoint.
        topology: the ranks.
    """
    for fragment in fragments:
        tensor, name = fragment.tensor, base_bias_of(fragment.tensor.name)
        if name is None:
            continue
        dim = None if tensor.tp_dim is None else tensor.tp_dim - 1
        whole = base.logical(PARAMETER, name)
        mine = tp_slice(whole, dim, tensor.tp_stride, topology.tp_rank, topology.tp_size)
        fragment.master.copy_(mine.expand(tensor.local_shape).reshape(-1))
