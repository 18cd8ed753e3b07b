"""What every layer of one model shares."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from lmscale.config.model import ModelConfig
from lmscale.config.objective import ObjectiveConfig, default_objective
from lmscale.models.transformer_config import build_transformer_config
from lmscale.models.wire import Wire, build_wire
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
    objective: ObjectiveConfig
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
    objective: ObjectiveConfig | None = None,
    recompute: str = "none",
    partitions_parameters: bool = False,
    isolates_documents: bool = False,
    packs_examples: bool = False,
    pipeline: bool | None = None,
    compile: bool = False,
) -> ModelContext:
    """Gather what the layers of a model share.

    Args:
        model: the architecture.
        topology: this rank's place.
        seed: seed of weights and dropout.
        sequence_parallel: split hidden states along the sequence over the tensor-parallel ranks.
        objective: what the model is trained on; left out, its architecture's own.
        recompute: none, selective or full.
        partitions_parameters: parameters are gathered around each module (ZeRO 3).
        isolates_documents: packed documents do not see one another.
        packs_examples: rows of bart and t5 hold several examples, told apart by document ids and positions.
        pipeline: layers are run by DeepSpeed's pipeline; left out, where there are several stages.
        compile: compile the transformer layers.
    """
    weights = WeightInit(seed)
    objective = objective or default_objective(model.architecture)
    return ModelContext(
        model=model,
        transformer=build_transformer_config(model, weights, topology.tp_size, sequence_parallel),
        topology=topology,
        groups=topology.megatron_groups,
        wire=build_wire(
            model,
            objective,
            isolates_documents=isolates_documents,
            packs_examples=packs_examples,
            joins_memory=topology.pp_size > 1 if pipeline is None else pipeline,
            sequence_parallel=sequence_parallel,
        ),
        weights=weights,
        dropout=DropoutClock(seed, topology.dp_rank, topology.tp_rank),
        objective=objective,
        recompute=recompute,
        partitions_parameters=partitions_parameters,
        compile=compile,
    )
