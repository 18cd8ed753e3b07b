"""What every layer of one model shares."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from lmscale.config.model import ModelConfig
from lmscale.config.objective import ObjectiveConfig, default_objective
from lmscale.models.transformer_config import build_transformer_config
from lmscale.models.wire import Wire, build_wire
from lmscale.parallel.seeds import DropoutClock, WeightInit
from lmscale.parallel.topology import Topology
from lmscale.plan.adaptation import Head


@dataclass
class Rows:
    """What a forward pass tells the modules of an adaptation about its rows; each layer sets it before it computes.

    Attributes:
        ids: int64 [b], the adaptation of each row; None where there is one for all.
        size: rows of the micro batch, b.
        micro_batch: the pass's number within the step, which seeds dropout.
        shift: of the positions, by the keys that stand before the first token: int, or int64 [b, 1].
        is_base: the base alone computes: prefixes stand aside, and positions are not shifted.
        made: tensors that were computed before a stage's layers for all of them, by name.
        given: of these, what the layer that computes reads, as it was given them: a recompute has its own.
    """

    ids: torch.Tensor | None = None
    size: int = 1
    micro_batch: int = 0
    shift: int | torch.Tensor = 0
    is_base: bool = False
    made: dict[str, torch.Tensor] = field(default_factory=dict)
    given: dict[str, torch.Tensor] = field(default_factory=dict)


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
    apex_norms: bool
    starts_gradients: bool = False
    head: Head | None = None
    num_adaptations: int = 1
    label_smoothing: float = 0.0
    rows: Rows = field(default_factory=Rows)

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
    apex_norms: bool = False,
    prompt_length: int = 0,
    prefix_length: int = 0,
    num_adaptations: int = 1,
    head: Head | None = None,
    label_smoothing: float = 0.0,
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
        apex_norms: normalize by apex's kernels.
        prompt_length: trained vectors in the place of tokens; 0: none.
        prefix_length: trained keys before the first token of every attention; positions count from there.
        num_adaptations: adaptations that the rows of a batch choose from.
        head: in the place of the language-model head.
        label_smoothing: of the language-model loss, in training.
    """
    is_pipeline = topology.pp_size > 1 if pipeline is None else pipeline
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
            joins_memory=is_pipeline,
            sequence_parallel=sequence_parallel,
            has_prompt=prompt_length > 0,
            tells_rows_apart=num_adaptations > 1,
            head=head,
        ),
        weights=weights,
        dropout=DropoutClock(seed, topology.dp_rank, topology.tp_rank),
        objective=objective,
        recompute=recompute,
        partitions_parameters=partitions_parameters,
        compile=compile,
        apex_norms=apex_norms,
        # Where the first layers are frozen, a pipeline's stages and a reentrant recompute still need a graph to go back by.
        starts_gradients=is_pipeline or (recompute == "full" and partitions_parameters),
        head=head,
        num_adaptations=num_adaptations,
        label_smoothing=label_smoothing,
        rows=Rows(shift=prefix_length),
    )
