"""What must not change when a run goes on: compared before any rank starts, key by key and by content. No torch here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lmscale.config.checkpoint_paths import tokenizer_copy
from lmscale.config.run import RunConfig
from lmscale.data.tokenizer import tokenizer_hash
from lmscale.errors import CheckpointError, ConfigError
from lmscale.train.stages import blend_of, is_same_blend, stages_of

_CHANGES = {
    "batch": ("batch.global_batch_size", "batch.ramp", "batch.stages"),
    "curriculum": ("data.seq_length_stages",),
    "data": ("data.train",),
    "seed": ("train.seed",),
}
"""What checkpoint.allow_change permits: keys that the steps to come read, and nothing that is in the past."""
_MEASURED = {"dev", "dev_limit", "test", "test_limit", "max_new_tokens", "max_answer_tokens", "metric", "patience"}
"""Keys of a task that say what is measured, and nothing of what is learned."""
_SHOWN_DIGITS = 12


def identity_of(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of what must not change when a run is resumed.

    Layout, micro batch, intervals and the length of the run may change; the model, what it reads, in which order, and
    how much of it goes into a step may not, but for what checkpoint.allow_change names.
    """
    excluded: dict[str, Any] = {"preset": True, "init_from": True}
    yield from _flatten("model", config.model.model_dump(exclude=excluded))
    yield from _flatten(
        "data",
        config.data.model_dump(include={"train", "split", "seq_length", "decoder_seq_length", "reset_attention_mask"}),
    )
    yield from _flatten("objective", config.objective.model_dump())
    if config.task is not None:
        yield from _flatten("task", config.task.model_dump(exclude=_MEASURED))
    adapt = None if config.adapt is None else config.adapt.model_dump()
    yield from _flatten("adapt", adapt or {"method": None})
    yield "train.seed", config.train.seed
    yield "batch.global_batch_size", config.batch.global_batch_size
    yield "batch.ramp", None if config.batch.ramp is None else config.batch.ramp.model_dump()
    yield "batch.stages", [stage.model_dump() for stage in config.batch.stages]
    yield "data.seq_length_stages", [stage.model_dump() for stage in config.data.seq_length_stages]


def check_same_run(config: RunConfig, former: RunConfig, place: str, remedy: str, hashes: Mapping[str, str]) -> None:
    """Check that a run goes on as what it was.

    Args:
        config: as it would go on.
        former: as it was.
        place: where `former` is from, for the message.
        remedy: what to do, for the message.
        hashes: of the former corpora, by prefix: the same content under another name is the same.

    Raises:
        ConfigError: naming the first key that differs, with both values, and what allows it.
    """
    there = dict(identity_of(former))
    for key, ours in identity_of(config):
        if ours == there.get(key) or _is_allowed(key, config):
            continue
        if key == "data.train" and hashes and is_same_blend(blend_of(former, hashes), blend_of(config)):
            continue
        raise ConfigError(f"{place} has {there.get(key)!r}", field=key, value=ours, remedy=remedy + _permission(key))


def hashes_of_run(directory: Path) -> dict[str, str]:
    """Read the content hashes of the corpora that a run has read, by prefix; none where its manifest is not there."""
    try:
        found = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))["data"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return dict(found) if isinstance(found, dict) else {}


def check_same_content(config: RunConfig, checkpoint: Path, manifest: Mapping[str, Any]) -> None:
    """Check by content that a run reads the corpora and the tokenizer of the checkpoint that it goes on from.

    Raises:
        CheckpointError: naming both hashes.
        DataError: if a corpus or the tokenizer is missing or damaged.
    """
    _check_same_tokenizer(config, checkpoint)
    stages = stages_of(checkpoint, manifest)
    if not stages or _is_allowed("data.train", config):
        return
    ours, theirs = blend_of(config), stages[-1]["train"]
    if is_same_blend(ours, theirs):
        return
    pairs = ((mine, other) for mine, other in zip(ours, theirs, strict=False) if not is_same_blend([mine], [other]))
    mine, other = next(pairs, (ours[-1] if ours else None, theirs[-1] if theirs else None))
    raise CheckpointError(
        f"the checkpoint {checkpoint} has read {_shown(other)}, and there is {_shown(mine)}",
        field="data.train",
        value=[source["prefix"] for source in ours],
        remedy="use the corpora that it was trained on" + _permission("data.train"),
    )


def _check_same_tokenizer(config: RunConfig, checkpoint: Path) -> None:
    if config.tokenizer is None or not (checkpoint / "tokenizer").is_dir():
        return
    copy = tokenizer_copy(checkpoint, config.tokenizer.path)
    theirs = config.tokenizer.model_copy(update={"path": str(copy)})
    ours, there = tokenizer_hash(config.tokenizer), tokenizer_hash(theirs)
    if ours != there:
        raise CheckpointError(
            f"has SHA-256 {ours[:_SHOWN_DIGITS]}, and the tokenizer of the checkpoint {checkpoint} {there[:_SHOWN_DIGITS]}",
            field="tokenizer.path",
            value=config.tokenizer.path,
            remedy=f"use the checkpoint's, {copy}",
        )


def _shown(source: Mapping[str, Any] | None) -> str:
    if source is None:
        return "none"
    content = source["content_hash"]
    known = f" with content {content[:_SHOWN_DIGITS]}" if content else ""
    return f"{source['prefix']}{known}, weight {source['weight']:g}"


def _is_allowed(key: str, config: RunConfig) -> bool:
    return any(key in _CHANGES[name] for name in config.checkpoint.allow_change)


def _permission(key: str) -> str:
    names = [name for name, keys in _CHANGES.items() if key in keys]
    return f", or checkpoint.allow_change = {names} to go on otherwise from here" if names else ""


def _flatten(prefix: str, section: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _flatten(f"{prefix}.{name}", value)
        else:
            yield f"{prefix}.{name}", value
