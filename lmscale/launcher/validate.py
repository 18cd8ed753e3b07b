"""Everything about a run that can be checked before a rank starts: config, layout, corpora, tokenizer, directory.

A rank that finds a mistake on its own takes ten seconds to start and may be killed before it can say what was wrong.
No torch and no deepspeed here; cheap checks come first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmscale.config.deepspeed_json import check_deepspeed, load_deepspeed, resolve_deepspeed
from lmscale.config.io import load_run
from lmscale.config.run import RunConfig, ZeroChoice, check_run, dp_size_of
from lmscale.errors import CheckpointError, ConfigError, DataError, LmscaleError

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class LaunchPlan:
    """A checked run and the number of ranks that it is for."""

    config: RunConfig
    """With DeepSpeed's keys in it, so that one file is all that a rank needs."""
    zero: ZeroChoice
    """What DeepSpeed's keys say about the layout."""
    num_ranks: int
    """Ranks on all hosts together."""
    dp_size: int
    """Data-parallel ranks."""


def validate_run(config: RunConfig, devices: int) -> LaunchPlan:
    """Check a run for a number of ranks.

    Args:
        config: as `load_run` returned it.
        devices: ranks, over all hosts.

    Raises:
        ConfigError: if keys contradict each other, the layout is illegal, or output_dir cannot be used.
        DataError: if a corpus or the tokenizer is missing, damaged, too small, or not the model's.
        CheckpointError: if a checkpoint that the config names is missing.
    """
    keys = load_deepspeed(config.deepspeed)
    zero = check_deepspeed(keys, config)
    check_run(config, zero, devices)
    dp_size = dp_size_of(config, devices)
    resolve_deepspeed(keys, config, dp_size)
    inlined = config.model_copy(update={"deepspeed": keys})
    _check_checkpoints_exist(config)
    check_output_dir(inlined)
    _check_data(config)
    return LaunchPlan(inlined, zero, devices, dp_size)


def _check_checkpoints_exist(config: RunConfig) -> None:
    for field, value in (("model.init_from", config.model.init_from), ("checkpoint.resume", config.checkpoint.resume)):
        if value not in (None, "auto", "never") and not Path(str(value)).exists():
            raise CheckpointError("there is no such checkpoint", field=field, value=value)


def check_output_dir(config: RunConfig) -> None:
    """Check that output_dir can be written and does not hold another run.

    Raises:
        ConfigError: naming the first key that differs from the run that is there, with both values.
    """
    directory = Path(config.output_dir)
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"{existing} is not a directory", field="output_dir", value=config.output_dir)
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{existing} cannot be written", field="output_dir", value=config.output_dir)
    if config.checkpoint.resume == "never":
        if any(directory.glob("checkpoints/step-*")):
            raise ConfigError(
                f"{directory} holds checkpoints already",
                field="checkpoint.resume",
                value="never",
                remedy="use another output_dir, or checkpoint.resume = auto to go on from them",
            )
        return
    if (directory / CONFIG_FILE).is_file():
        _check_same_run(config, directory / CONFIG_FILE)


def _check_same_run(config: RunConfig, path: Path) -> None:
    try:
        former = load_run(path)
    except LmscaleError as error:
        raise ConfigError(
            f"{path} is of a run that cannot be resumed ({error})",
            field="output_dir",
            value=config.output_dir,
            remedy="use another output_dir",
        ) from None
    there = dict(identity_of(former))
    for key, ours in identity_of(config):
        if ours != there.get(key):
            raise ConfigError(
                f"the run in {config.output_dir} has {there.get(key)!r}",
                field=key,
                value=ours,
                remedy="use another output_dir, or the former value",
            )


def identity_of(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of what must not change when a run is resumed.

    Layout, micro batch, intervals and the length of the run may change; the model, what it reads, in which order, and
    how much of it goes into a step may not.
    """
    excluded: dict[str, Any] = {"preset": True, "init_from": True}
    yield from _flatten("model", config.model.model_dump(exclude=excluded))
    yield from _flatten(
        "data",
        config.data.model_dump(include={"train", "split", "seq_length", "decoder_seq_length", "reset_attention_mask"}),
    )
    yield from _flatten("objective", config.objective.model_dump())
    yield "train.seed", config.train.seed
    yield "batch.global_batch_size", config.batch.global_batch_size
    yield "batch.ramp", None if config.batch.ramp is None else config.batch.ramp.model_dump()


def _flatten(prefix: str, section: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _flatten(f"{prefix}.{name}", value)
        else:
            yield f"{prefix}.{name}", value


def _check_data(config: RunConfig) -> None:
    """Open the tokenizer and the corpora as the ranks will, by the same code. Samples are not cut: that can take long."""
    from lmscale.feed.sources import open_held_out, open_train
    from lmscale.feed.vocabulary import build_vocabulary, check_full_stop
    from lmscale.objectives.base import Vocabulary
    from lmscale.objectives.registry import build_objective

    if config.tokenizer is not None and config.tokenizer.type == "hf":
        # transformers takes seconds to import; the ranks look at its vocabulary.
        vocabulary = Vocabulary(config.model.vocab_size)
    else:
        _check_vocabulary_size(config)
        vocabulary = build_vocabulary(config)
        build_objective(config.objective, config.lengths, vocabulary)
    sources = [*open_train(config, vocabulary.document_end_id)]
    sources += open_held_out(config, vocabulary.document_end_id).values()
    check_full_stop(vocabulary, config.objective, sources)


def _check_vocabulary_size(config: RunConfig) -> None:
    from lmscale.data.tokenizer import load_tokenizer, padded_sizes
    from lmscale.feed.vocabulary import vocabulary_multiple

    if config.tokenizer is None:
        return
    num_ids = load_tokenizer(config.tokenizer).vocab_size
    if config.model.vocab_size not in padded_sizes(num_ids, vocabulary_multiple(config.objective)):
        raise DataError(
            f"the tokenizer {config.tokenizer.path} has {num_ids} entries",
            field="model.vocab_size",
            value=config.model.vocab_size,
            remedy=f"use model.vocab_size = {num_ids}",
        )
