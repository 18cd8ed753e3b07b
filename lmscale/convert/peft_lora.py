"""LoRA in PEFT's names: pairs of thin matrices beside their modules.

Our pairs stand beside tensors that may hold several matrices. The rows of B take the way that the family's table says for
the rows of the tensor, and A is the same for all of them. Where theirs is one module for several of our pairs (GPT-2's
c_attn for query, key and value), A is our A's one below the other and B has each of ours in its own rows and columns: of
rank E r, exact, with alpha chosen so that the scale stays.

Shapes: o outputs, i inputs, r rank, v vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from lmscale.adapt.merge import EMBEDDING, fused_rows, spread_rows
from lmscale.config.adapt import LoraConfig
from lmscale.config.model import ModelConfig
from lmscale.convert.mapping import Entry, Step, Transpose
from lmscale.convert.peft_files import CONFIG, Tensors, check_keys
from lmscale.errors import ConversionError
from lmscale.plan.adaptation import Adaptation, is_bias
from lmscale.plan.lora import PARTS, layer_targets, lora_pairs, lora_scale, lora_shapes

PREFIX = "base_model.model."
Read = Callable[[str], torch.Tensor]
Pair = tuple[torch.Tensor, torch.Tensor]
"""(A [r, i], B [o, r])."""
_NAME = re.compile(r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<half>[AB])(\.weight)?$")
_HONOURED = {"r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "rank_pattern", "alpha_pattern"}


def check_has_embedding(model: ModelConfig) -> None:
    """Check that LoRA beside the embedding means the same in both: PEFT's changes what is looked up, and no other use.

    Raises:
        ConversionError: if the table makes logits too, or two stacks share it.
    """
    if model.tied_head or model.has_decoder_stack:
        raise ConversionError(
            "beside a table that has other uses, PEFT's LoRA changes one of them only",
            field="adapt.targets",
            value="embedding",
        )


# -- ours to theirs --------------------------------------------------------------------------------------------------


def to_peft(
    model: ModelConfig, adapt: LoraConfig, table: list[Entry], read: Read, trained: set[str]
) -> tuple[dict[str, Any], Tensors]:
    """Make the keys of adapter_config.json and the tensors.

    Args:
        model: the base.
        adapt: the method.
        table: of the base's family.
        read: reads a trained tensor by its logical name.
        trained: names of the base's tensors that were trained: biases.
    """
    by_name = {one.ours: one for one in table}
    pairs = _their_pairs(model, adapt, by_name, read)
    tensors: Tensors = {}
    for module, (a, b) in pairs.items():
        kind, end = ("embedding_", "") if _is_embedding(module, by_name) else ("", ".weight")
        tensors |= {f"{PREFIX}{module}.lora_{kind}A{end}": a, f"{PREFIX}{module}.lora_{kind}B{end}": b}
    for name in sorted(trained):
        for theirs, tensor in zip(by_name[name].theirs, by_name[name].to_theirs([read(name)][0]), strict=True):
            module = theirs.removesuffix(".bias")
            tensors[f"{PREFIX}{module}{'.base_layer' if module in pairs else ''}.bias"] = tensor
    return _keys(adapt, pairs, table), tensors


def _their_pairs(model: ModelConfig, adapt: LoraConfig, by_name: Mapping[str, Entry], read: Read) -> dict[str, Pair]:
    found: dict[str, list[Pair]] = {}
    for place, name, _, _ in lora_pairs(model, adapt):
        a, b = (read(f"{place}.lora.{name}.{half}") for half in "ab")
        if place == EMBEDDING:
            (theirs,) = by_name[f"{EMBEDDING}.table.weight"].theirs
            found[theirs.removesuffix(".weight")] = [(a[:, : model.vocab_size], b)]
            continue
        entry = by_name[f"{place}.weight"]
        parts = _rows_to_theirs(entry, spread_rows(model, place, name, b))
        for index, (theirs, rows) in enumerate(zip(entry.theirs, parts, strict=True)):
            is_of_another = name in PARTS and len(entry.theirs) > 1 and PARTS[name] != index
            if not is_of_another:
                found.setdefault(theirs.removesuffix(".weight"), []).append((a, rows))
    return {
        module: (torch.cat([a for a, _ in own]), torch.cat([b for _, b in own], dim=1)) for module, own in found.items()
    }


def _row_steps(entry: Entry) -> list[Step]:
    return [step for step in entry.steps if not isinstance(step, Transpose)]


def _rows_to_theirs(entry: Entry, rows: torch.Tensor) -> list[torch.Tensor]:
    tensors = [rows]
    for step in reversed(_row_steps(entry)):
        tensors = step.to_theirs(tensors)
    return tensors


def _keys(adapt: LoraConfig, pairs: Mapping[str, Pair], table: list[Entry]) -> dict[str, Any]:
    ranks = {module: a.size(0) for module, (a, _) in pairs.items()}
    rank = max(ranks.values())
    others = {module: own for module, own in ranks.items() if own != rank}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _alpha(adapt, rank),
        "use_rslora": adapt.rslora,
        "rank_pattern": others,
        "alpha_pattern": {module: _alpha(adapt, own) for module, own in others.items()},
        "lora_dropout": adapt.dropout,
        "bias": adapt.bias,
        "target_modules": _target_modules(set(pairs), table),
        "fan_in_fan_out": any(isinstance(step, Transpose) for one in table for step in _steps_of(one, pairs)),
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def _steps_of(entry: Entry, pairs: Mapping[str, Pair]) -> tuple[Step, ...]:
    is_target = any(name.removesuffix(".weight") in pairs for name in entry.theirs)
    return entry.steps if is_target else ()


def _alpha(adapt: LoraConfig, rank: int) -> float:
    """Choose alpha for a rank so that the scale is the adaptation's."""
    alpha = lora_scale(adapt) * (math.sqrt(rank) if adapt.rslora else rank)
    nearest = round(alpha)
    return nearest if math.isclose(alpha, nearest, rel_tol=1e-12) else alpha


def _target_modules(chosen: set[str], table: list[Entry]) -> list[str]:
    """Name modules as PEFT matches them, by the ends of their paths; in full where an end would match others too."""
    everything = {name.rpartition(".")[0] for one in table for name in one.theirs}
    ends = {_end(module) for module in chosen}
    matched = {module for module in everything if any(module == end or module.endswith(f".{end}") for end in ends)}
    return sorted(ends if matched == chosen else chosen)


def _end(module: str) -> str:
    """Return what follows the layer's number, or the last name of a path that has none."""
    parts = module.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers else parts[-1]


def _is_embedding(module: str, by_name: Mapping[str, Entry]) -> bool:
    return f"{module}.weight" in by_name[f"{EMBEDDING}.table.weight"].theirs


# -- theirs to ours --------------------------------------------------------------------------------------------------


def from_peft(
    keys: dict[str, Any],
    tensors: Tensors,
    model: ModelConfig,
    table: list[Entry],
    copies: Mapping[str, str],
    read_base: Read,
) -> tuple[LoraConfig, Tensors]:
    """Make the method and our tensors of PEFT's files.

    Modules of different ranks or scales are filled up with zeros to the largest rank, and the scale goes into B.

    Raises:
        ConversionError: for keys that change the arithmetic and are not known, and for tensors that are not LoRA's.
    """
    check_keys(keys, _HONOURED)
    pairs, biases = _sort(tensors)
    biases = {name: tensor for name, tensor in biases.items() if name not in copies}
    scales = {module: _their_scale(keys, module, a.size(0)) for module, (a, _) in pairs.items()}
    rank = max((a.size(0) for a, _ in pairs.values()), default=0)
    if not rank:
        raise ConversionError("holds no pair of lora_A and lora_B", field="adapter_model.safetensors")
    is_uniform = len(set(scales.values())) == 1 and all(a.size(0) == rank for a, _ in pairs.values())
    ready = {module: _filled(pair, rank, 1.0 if is_uniform else scales[module]) for module, pair in pairs.items()}
    ours, names = _our_pairs(model, table, ready)
    settings = {"alpha": float(keys["lora_alpha"]), "rslora": bool(keys.get("use_rslora"))}
    if not is_uniform or keys.get("alpha_pattern") or keys.get("rank_pattern"):
        # One scale for all: of what is uniform after all, its own.
        settings = {"alpha": rank * (next(iter(scales.values())) if is_uniform else 1.0), "rslora": False}
    adapt = LoraConfig(
        rank=rank,
        dropout=float(keys.get("lora_dropout") or 0.0),
        targets=[target for target in _ORDER if target in names],
        bias=keys.get("bias", "none"),
        **settings,
    )
    return adapt, _complete(model, adapt, ours) | _our_biases(model, adapt, table, biases, read_base)


_ORDER = tuple(LoraConfig.model_fields["targets"].annotation.__args__[0].__args__)  # type: ignore[union-attr]


def _sort(tensors: Tensors) -> tuple[dict[str, Pair], Tensors]:
    halves: dict[str, dict[str, torch.Tensor]] = {}
    biases: Tensors = {}
    for name, tensor in tensors.items():
        found = _NAME.match(name.removeprefix(PREFIX))
        if found is not None:
            halves.setdefault(found["module"], {})[found["half"]] = tensor
        elif name.endswith(".bias"):
            biases[name.removeprefix(PREFIX).replace(".base_layer.bias", ".bias")] = tensor
        else:
            raise ConversionError("is no tensor of LoRA's, nor a bias", field=name)
    for module, own in halves.items():
        if own.keys() != {"A", "B"} or own["A"].dim() != 2 or own["A"].size(0) != own["B"].size(-1):
            raise ConversionError("has no matching lora_A and lora_B", field=module)
    return {module: (own["A"], own["B"]) for module, own in halves.items()}, biases


def _their_scale(keys: Mapping[str, Any], module: str, rank: int) -> float:
    """Return what PEFT multiplies a module's B A by; patterns match the ends of paths."""
    wanted = _by_pattern(keys.get("rank_pattern"), module, keys["r"])
    if wanted != rank:
        raise ConversionError(f"has the rank {rank}, and {wanted} by {CONFIG}", field=module)
    alpha = float(_by_pattern(keys.get("alpha_pattern"), module, keys["lora_alpha"]))
    return alpha / (math.sqrt(rank) if keys.get("use_rslora") else rank)


def _by_pattern(patterns: Any, module: str, otherwise: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def _filled(pair: Pair, rank: int, scale: float) -> Pair:
    a, b = pair
    missing = rank - a.size(0)
    return torch.cat((a, a.new_zeros(missing, a.size(1)))), torch.cat(
        (b * scale, b.new_zeros(b.size(0), missing)), dim=1
    )


def _our_pairs(model: ModelConfig, table: list[Entry], pairs: Mapping[str, Pair]) -> tuple[Tensors, set[str]]:
    """Name the pairs by our places; return them and the targets that they are of."""
    where = {name.removesuffix(".weight"): (one, index) for one in table for index, name in enumerate(one.theirs)}
    ours: Tensors = {}
    names: set[str] = set()
    for module, (a, b) in pairs.items():
        entry, index = where.get(module, (None, 0))
        place = entry.ours.removesuffix(".weight") if entry is not None else ""
        name = "embedding" if place == f"{EMBEDDING}.table" else _target(model, place, index, entry)
        if entry is None or name is None:
            raise ConversionError("LoRA beside it cannot be taken: lmscale has none there", field=module)
        if name == "embedding":
            check_has_embedding(model)
            place, a = EMBEDDING, torch.cat((a, a.new_zeros(a.size(0), model.padded_vocab_size - a.size(1))), dim=1)
        elif len(entry.theirs) == 1:
            b = _rows_to_ours(entry, b)
        names.add(name)
        ours |= {f"{place}.lora.{name}.a": a, f"{place}.lora.{name}.b": b}
    return ours, names


def _target(model: ModelConfig, place: str, index: int, entry: Entry | None) -> str | None:
    """Name the target that a module of theirs is: a part of our tensor, or all of it."""
    is_part = entry is not None and len(entry.theirs) > 1
    inner = re.sub(r"^(encoder_|decoder_)?layers\.\d+\.", "", place)
    is_fed = place.startswith("decoder_layers")
    candidates = [name for where, name, _, _ in layer_targets(model, is_fed) if where == inner]
    if is_part:
        return next((name for name in candidates if PARTS.get(name) == index), None)
    has_parts = fused_rows(model, place) is not None
    return next((name for name in candidates if not has_parts or name not in PARTS), None)


def _rows_to_ours(entry: Entry, rows: torch.Tensor) -> torch.Tensor:
    tensors = [rows]
    for step in _row_steps(entry):
        tensors = step.to_ours(tensors)
    return tensors[0]


def _complete(model: ModelConfig, adapt: LoraConfig, ours: Tensors) -> Tensors:
    """Fill up with zeros: our targets are of all layers, theirs may be of some."""
    complete: Tensors = {}
    for name, shape in lora_shapes(model, adapt).items():
        tensor = ours.get(name, torch.zeros(shape))
        if tuple(tensor.shape) != shape:
            raise ConversionError(f"has the shape {tuple(tensor.shape)}, and {shape} in this base", field=name)
        complete[name] = tensor
    return complete


def _our_biases(model: ModelConfig, adapt: LoraConfig, table: list[Entry], biases: Tensors, read_base: Read) -> Tensors:
    """Take trained biases; those that our method leaves alone must be the base's."""
    adaptation, taken = Adaptation(model, adapt), set()
    ours: Tensors = {}
    for one in table:
        if not one.ours.endswith(".bias") or not (adaptation.trains(one.ours) or set(one.theirs) & biases.keys()):
            continue
        before = read_base(one.ours)
        former = one.to_theirs(before)
        tensor = one.to_ours([biases.get(name, old) for name, old in zip(one.theirs, former, strict=True)])
        taken |= set(one.theirs)
        if adaptation.trains(one.ours):
            ours[one.ours] = tensor
        elif not torch.equal(tensor, before):
            kind = "head's" if not is_bias(one.ours) else "other layer's"
            raise ConversionError(
                f"was trained, and adapt.bias = {adapt.bias!r} trains no {kind} bias", field=one.theirs[0]
            )
    unknown = sorted(biases.keys() - taken)
    if unknown:
        raise ConversionError("is no bias of this base", field=unknown[0])
    return ours
