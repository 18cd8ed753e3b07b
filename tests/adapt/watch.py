"""Runs of one rank that are looked into: what is frozen, what gets gradients, what moves, where backward ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from tests.distributed.runs import Keys


@dataclass
class Seen:
    """What a run did, by logical names."""

    frozen: set[str] = field(default_factory=set)
    with_gradients: set[str] = field(default_factory=set)
    moved: set[str] = field(default_factory=set)
    reached: set[str] = field(default_factory=set)
    """Transformer layers whose output needed a gradient."""
    is_base_whole: bool = False
    """The run's base has the hash that its own file has, before and after."""


def adapt_and_look(keys: Keys) -> Seen:
    """Train a run on this rank of a pool, looking at its engine before and after."""
    import lmscale.pretrain
    from lmscale.config.io import parse_run
    from lmscale.models.block import TransformerLayer
    from lmscale.models.build import logical_name
    from lmscale.train.base import hash_weights
    from lmscale.train.checkpoint_reader import CheckpointReader

    seen, config, train = Seen(), parse_run(keys), lmscale.pretrain.train
    base = CheckpointReader(_path(keys["model"]["init_from"]))
    before_hash = hash_weights(base)

    def look_and_train(run: Any) -> Any:
        engine = run.engine
        before = {piece.tensor.name: piece.master.clone() for piece in engine.fragments()}
        seen.frozen = {piece.tensor.name for piece in engine.fragments() if piece.is_frozen}
        for name, parameter in engine.model.named_parameters():
            if parameter.requires_grad:
                logical = logical_name(engine.model, name)
                parameter.register_post_accumulate_grad_hook(lambda _, name=logical: seen.with_gradients.add(name))
        for layer in engine.model.modules():
            if isinstance(layer, TransformerLayer):
                layer.register_forward_hook(lambda layer, _, out: _note(seen, layer.key, out))
        was_stopped = train(run)
        seen.moved = {
            piece.tensor.name
            for piece in engine.fragments()
            if not torch.equal(before[piece.tensor.name], piece.master)
        }
        seen.is_base_whole = hash_weights(CheckpointReader(base.path)) == before_hash
        if engine.base is not None:
            seen.is_base_whole &= engine.base.weights_hash == before_hash
        return was_stopped

    lmscale.pretrain.train = look_and_train
    try:
        assert lmscale.pretrain.pretrain(config) in (0, 75)
    finally:
        lmscale.pretrain.train = train
    return seen


def _path(path: str) -> Any:
    from pathlib import Path

    return Path(path)


def _note(seen: Seen, key: str, out: Any) -> None:
    hidden = out[0] if isinstance(out, tuple) else out
    if torch.is_grad_enabled() and hidden.requires_grad:
        seen.reached.add(key)
