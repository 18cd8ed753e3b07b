"""Small bases of every architecture, trained for one step on text, and adaptations of them on any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Keys, fresh, pretrain_on_ranks
from tests.distributed.test_objectives import keys_of

LENGTH, STEPS = 24, 3
"""Of the 32 positions that the bases have; a prefix takes some of the others."""
_OBJECTIVES = {"gpt": "prefix-lm", "bert": "bert", "roberta": "roberta", "bart": "bart", "t5": "t5"}
LAYOUTS: dict[str, tuple[int, Keys]] = {
    "tp2": (2, {"parallel__tp_size": 2}),
    "sp": (2, {"parallel__tp_size": 2, "parallel__sequence_parallel": True}),
    "pp2": (2, {"parallel__pp_size": 2}),
    "tp2-pp2": (4, {"parallel__tp_size": 2, "parallel__pp_size": 2, "deepspeed__zero_optimization__stage": 1}),
    "dp2-zero2": (2, {"deepspeed__zero_optimization__stage": 2}),
    "dp2-zero3": (2, {"deepspeed__zero_optimization__stage": 3}),
    "dp2-zero3-full": (2, {"deepspeed__zero_optimization__stage": 3, "parallel__recompute": "full"}),
    "pp2-full": (2, {"parallel__pp_size": 2, "parallel__recompute": "full"}),
    "selective": (1, {"parallel__recompute": "selective"}),
}


class TextBases:
    """One base of each architecture, and one rank's run of each adaptation, trained where they are asked for."""

    def __init__(self, prepared: tuple[str, str], home: Path):
        self._prepared, self._home = prepared, home
        self._bases: dict[str, str] = {}
        self._runs: dict[str, list[Keys]] = {}

    def base(self, architecture: str) -> str:
        """Return the checkpoint of a base."""
        if architecture not in self._bases:
            home = self._home / f"base-{architecture}"
            keys = keys_of(_OBJECTIVES[architecture], self._prepared, home, train__stop_at_step=1)
            if architecture == "gpt":
                del keys["objective"]
            pretrain_on_ranks(1, keys)
            self._bases[architecture] = str(next((home / "checkpoints").glob("step-*")))
        return self._bases[architecture]

    def keys(self, architecture: str, adapt: Keys, output_dir: Path, **changes: Any) -> Keys:
        """Make the config of a run that adapts a base."""
        keys = keys_of(
            _OBJECTIVES[architecture],
            self._prepared,
            output_dir,
            **{"train__stop_at_step": STEPS, "data__seq_length": LENGTH, "optim__lr": 1.0e-2, **changes},
        )
        if architecture == "gpt":
            del keys["objective"]
        model = {key: value for key, value in changes.items() if key.startswith("model__")}
        keys["model"] = {"init_from": self.base(architecture)} | {
            key.removeprefix("model__"): value for key, value in model.items()
        }
        return {**keys, "adapt": adapt}

    def reference(self, name: str, architecture: str, adapt: Keys) -> list[Keys]:
        """Return the records of an adaptation on one rank."""
        if name not in self._runs:
            self._runs[name] = pretrain_on_ranks(1, self.keys(architecture, adapt, self._home / name))
        return self._runs[name]


def trained_names(world_size: int, keys: Keys) -> set[str]:
    """Adapt a base, check in every rank that nothing else was touched, and return the names of what was trained."""
    return set().union(*run_ranks(world_size, _train_and_look, fresh(keys)))


def _train_and_look(keys: Keys) -> set[str]:
    import lmscale.pretrain
    from lmscale.config.io import parse_run
    from lmscale.train.checkpoint_reader import PARAMETER, CheckpointReader

    kept: list[Any] = []
    original = lmscale.pretrain.train

    def train(run: Any) -> bool:
        kept.append(run.engine)
        return original(run)

    lmscale.pretrain.train = train
    try:
        lmscale.pretrain.pretrain(parse_run(keys))
    finally:
        lmscale.pretrain.train = original
    engine, reader = kept[0], CheckpointReader(Path(keys["model"]["init_from"]))
    topology, trained = engine.topology, set()
    for part in engine.fragments():
        if not part.is_frozen:
            trained.add(part.tensor.name)
            continue
        assert part.parameter.grad is None
        stored = reader.fragment(PARAMETER, part.tensor, topology.tp_rank, topology.tp_size, part.start, part.end)
        assert torch.equal(part.master, stored), part.tensor.name
    return trained


def compute(
    checkpoint: str,
    adapt: Keys | None,
    tensors: dict[str, torch.Tensor],
    inputs: dict[str, torch.Tensor],
    cotangent: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Run a base with an adaptation of given tensors, in eval mode on one rank.

    Returns: logits [b, s, v] of a decoder, hidden states [b, s, h] of an encoder; the gradients of the tensors where a
        cotangent is given.
    """
    return run_ranks(1, _compute, checkpoint, adapt, tensors, inputs, cotangent)[0]


def _compute(
    checkpoint: str,
    adapt_keys: Keys | None,
    tensors: dict[str, torch.Tensor],
    inputs: dict[str, torch.Tensor],
    cotangent: torch.Tensor | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    from pydantic import TypeAdapter

    from lmscale.adapt.registry import adapted_specs
    from lmscale.config.adapt import AdaptConfig, num_adaptations, prefix_length, prompt_length
    from lmscale.evaluate.loading import read_config
    from lmscale.models.build import build_model, logical_name, model_specs
    from lmscale.models.context import build_context
    from lmscale.models.loss import LanguageModelLoss
    from lmscale.parallel.topology import init_topology
    from lmscale.train.checkpoint_reader import PARAMETER, CheckpointReader

    config, reader = read_config(Path(checkpoint)), CheckpointReader(Path(checkpoint))
    adapt = None if adapt_keys is None else TypeAdapter(AdaptConfig).validate_python(adapt_keys)
    context = build_context(
        config.model,
        init_topology(1, 1),
        seed=0,
        objective=config.objective,
        prompt_length=prompt_length(adapt),
        prefix_length=prefix_length(adapt),
        num_adaptations=num_adaptations(adapt),
    )
    specs = adapted_specs(model_specs(context), context, adapt)
    model = build_model(specs, context, LanguageModelLoss(context), pipeline=False).eval()
    named = {logical_name(model, name): parameter for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[name] if name in tensors else reader.logical(PARAMETER, name))
    packed = tuple(inputs[name] for name in context.wire.input_names)
    packed = packed if len(packed) > 1 else packed[0]
    if config.model.is_encoder_only:
        behind = [name for name, _ in specs].index("masked_head")
        for function in model._functions[:behind]:
            packed = function(packed)
        out = context.wire.unpack(packed).hidden
    else:
        out = model(packed)[..., : config.model.vocab_size]
    if cotangent is None:
        return out.detach(), {}
    (out * cotangent).sum().backward()
    return out.detach(), {name: named[name].grad for name in tensors if name in named}
