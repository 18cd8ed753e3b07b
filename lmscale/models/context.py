"""What every layer of one model shares."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from lmscale.config.model import ModelConfig
from lmscale.models.transformer_config import build_transformer_config
from lmscale.models.wire import Wire
from lmscale.parallel.seeds import DropoutClock, WeightInit
from lmscale.parallel.topology import Topology


@dataclass(frozen=True)
class ModelContext:
    """Config, groups and random numbers, passed to each layer's constructor."""

    model: ModelConfig
    transformer: TransformerConfig
    topology: Topology
    groups: ProcessGroupCollection
    wire: Wire
    weights: WeightInit
    dropout: DropoutClock
    recompute: str
    partitions_parameters: bool
    compile: bool

    @property
    def sequence_parallel(self) -> bool:
        """Whether hidden states are [s/t, b, h] in place of [b, s, h]."""
        return bool(self.transformer.sequence_parallel)


def build_context(
    model: ModelConfig,
    topology: Topology,
    *,
    seed: int,
    sequence_parallel: bool = False,
    recompute: str = "none",
    partitions_parameters: bool = False,
    isolates_documents: bool = False,
    compile: bool = False,
) -> ModelContext:
    """Gather what the layers of a model share.

    Args:
        model: the architecture.
        topology: this rank's place.
        seed: seed of weights and dropout.
        sequence_parallel: split hidden states along the sequence over the tensor-parallel ranks.
        recompute: none, selective or full.
        partitions_parameters: parameters are gathered around each module (ZeRO 3).
        isolates_documents: packed documents do not see one another.
        compile: compile the transformer layers.
    """
    weights = WeightInit(seed)
    return ModelContext(
        model=model,
        transformer=build_transformer_config(model, weights, topology.tp_size, sequence_parallel),
        topology=topology,
        groups=topology.megatron_groups,
        wire=Wire(isolates_documents),
        weights=weights,
        dropout=DropoutClock(seed, topology.dp_rank, topology.tp_rank),
        recompute=recompute,
        partitions_parameters=partitions_parameters,
        compile=compile,
    )
