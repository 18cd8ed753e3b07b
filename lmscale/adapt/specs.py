"""Edits of lists of layer specs that several methods make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepspeed.runtime.pipe.module import LayerSpec, TiedLayerSpec

from lmscale.models.block import Stack, TransformerLayer
from lmscale.models.embedding import InputEmbedding, WordEmbedding
from lmscale.models.specs import NamedSpecs


def edit_layers(specs: NamedSpecs, edit: Callable[[TransformerLayer], None]) -> NamedSpecs:
    """Have every transformer layer edited once it is built."""
    return edit_kinds(specs, (TransformerLayer,), edit)


def edit_kinds(specs: NamedSpecs, kinds: tuple[type, ...], edit: Callable[[Any], None]) -> NamedSpecs:
    """Have every layer of some kinds edited once it is built."""
    return [(name, _edited(spec, edit) if spec.typename in kinds else spec) for name, spec in specs]


def put_before_layers(specs: NamedSpecs, make: Callable[[Stack, int], NamedSpecs]) -> NamedSpecs:
    """Put what `make` lists for a layer's stack and its number there before each transformer layer."""
    changed: NamedSpecs = []
    for name, spec in specs:
        if spec.typename is TransformerLayer:
            changed += make(spec.module_args[1], spec.module_args[2])
        changed.append((name, spec))
    return changed


def edit_input(specs: NamedSpecs, edit: Callable[[InputEmbedding], None]) -> NamedSpecs:
    """Have the first input embedding (of the encoder, where there are two stacks) edited once it is built."""
    first = next(index for index, (_, spec) in enumerate(specs) if spec.typename is InputEmbedding)
    name, spec = specs[first]
    return [*specs[:first], (name, _edited(spec, edit)), *specs[first + 1 :]]


def edit_words(specs: NamedSpecs, edit: Callable[[WordEmbedding], None], parameters: tuple[str, ...]) -> NamedSpecs:
    """Have the word embedding edited wherever it is built.

    Args:
        specs: all layers of the model.
        edit: called with each copy.
        parameters: names within it of what the edit adds, which tied copies share.
    """
    return [(name, _edited(spec, edit, parameters) if spec.typename is WordEmbedding else spec) for name, spec in specs]


def _edited(spec: LayerSpec, edit: Callable[[Any], None], tied: tuple[str, ...] = ()) -> LayerSpec:
    if isinstance(spec, TiedLayerSpec):
        return TiedLayerSpec(
            spec.key,
            spec.typename,
            *spec.module_args,
            forward_fn=spec.forward_fn,
            tied_weight_attr=[*spec.tied_weight_attr, *tied],
            **{**spec.module_kwargs, "edit": edit},
        )
    return LayerSpec(spec.typename, *spec.module_args, **{**spec.module_kwargs, "edit": edit})
