"""Count what a forward pass through our layers keeps for its backward pass, in torch's own graph."""

from __future__ import annotations

from typing import Any

from lmscale.config.lengths import SampleLengths
from lmscale.plan.activations import StepShape
from tests.models.batches import make_batch

VOCAB = 500
SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "ffn_dropout": 0.0,
}
LENGTH, TARGETS, PLACES = 48, 24, 8


def step_shape(architecture: str, **keys: Any) -> StepShape:
    """Say the sizes of the batch that is measured."""
    labels = {"bert": PLACES, "roberta": PLACES, "bart": TARGETS, "t5": TARGETS}.get(architecture, LENGTH)
    decoder = TARGETS if architecture in ("bart", "t5") else 0
    shape: dict[str, Any] = {"micro_batch_size": 2, "num_micro_batches": 1, "precision": "fp32", "device_type": "cpu"}
    return StepShape(SampleLengths(LENGTH, LENGTH, decoder, labels), **{**shape, **keys})


def count_saved(cases: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[dict[str, int]]:
    """Build each case's model on this rank, run a forward pass, and count the saved bytes by kind.

    A storage counts once, whole; parameters do not count. Runs in a rank.

    Args:
        cases: (keys of the model, keys of a StepShape) each; tp_size is the number of ranks, and pp_size above 1 gives
            the layers a pipeline's wire, all of them on this rank.
    """
    from lmscale.parallel.topology import init_topology

    topology = init_topology(cases[0][1].get("tp_size", 1), 1)
    return [_count_case(topology, *case) for case in cases]


def _count_case(topology: Any, model_keys: dict[str, Any], step_keys: dict[str, Any]) -> dict[str, int]:
    import torch

    from lmscale.adapt.registry import adapted_specs
    from lmscale.config.adapt import PrefixTuningConfig
    from lmscale.config.model import ModelConfig
    from lmscale.config.presets import with_defaults
    from lmscale.models.build import SequentialModel, model_specs
    from lmscale.models.context import build_context
    from lmscale.models.loss import LanguageModelLoss
    from lmscale.plan.stages import planned_layers

    model = ModelConfig.model_validate(with_defaults({**SIZES, **model_keys}))
    step = step_shape(model.architecture, **step_keys)
    adapt = None
    if step.prefix_length:
        dropout = 0.1 if step.prefix_dropout else 0.0
        adapt = PrefixTuningConfig(length=step.prefix_length, projection=None, dropout=dropout)
    context = build_context(
        model,
        topology,
        seed=1,
        sequence_parallel=step.sequence_parallel,
        recompute=step.recompute,
        isolates_documents=step.has_mask,
        pipeline=step.pp_size > 1,
        prefix_length=step.prefix_length,
    )
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[step.precision]
    built = SequentialModel(adapted_specs(model_specs(context), context, adapt)).to(dtype)
    context.dropout.begin_step(1)
    batch = make_batch(
        model.architecture,
        1,
        rows=step.micro_batch_size,
        vocab_size=VOCAB,
        length=LENGTH,
        targets=TARGETS,
        places=PLACES,
    )
    if step.has_mask:
        batch |= {"positions": torch.arange(LENGTH).repeat(step.micro_batch_size, 1)}
        batch |= {"document_ids": (torch.arange(LENGTH) > 20).long().repeat(step.micro_batch_size, 1)}
    packed: Any = tuple(batch[name] for name in context.wire.input_names)
    packed = packed if len(packed) > 1 else packed[0]
    weight = torch.ones(2)
    seen = {tensor.untyped_storage().data_ptr() for tensor in (weight, *built.parameters())}
    kept, kinds = [], {"layers": 0, "embedding": 0, "logits": 0}
    kind = "embedding"

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept.append(tensor)  # so that its address is not given to another
            kinds[kind] += storage.nbytes()
        return tensor

    layers = planned_layers(model)
    assert len(layers) == len(built._functions)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        for layer, function in zip(layers, built._functions, strict=True):
            kind = KINDS.get(layer.kind, "layers")
            packed = function(packed)
        LanguageModelLoss(context)(packed, (*(batch[name] for name in context.wire.label_names), weight))
    return kinds


KINDS = {
    "words": "embedding",
    "embedding": "embedding",
    "masked_head": "logits",
    "tied_head": "logits",
    "head": "logits",
    "output_bias": "logits",
}
