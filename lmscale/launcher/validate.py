"""Everything about a run that can be checked before a rank starts: config, layout, corpora, tokenizer, directory.

A rank that finds a mistake on its own takes ten seconds to start and may be killed before it can say what was wrong.
No torch and no deepspeed here; cheap checks come first.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from lmscale.config.adapt import LoraConfig, ProbingConfig, prompt_length
from lmscale.config.check import check_run, dp_size_of
from lmscale.config.checkpoint_paths import list_checkpoints, resolve_checkpoint
from lmscale.config.deepspeed_json import check_deepspeed, load_deepspeed, resolve_deepspeed
from lmscale.config.io import load_run
from lmscale.config.run import RunConfig, ZeroChoice
from lmscale.errors import CheckpointError, ConfigError, DataError, LmscaleError
from lmscale.launcher.identity import check_same_content, check_same_run, hashes_of_run
from lmscale.optim.lr import check_cooldown
from lmscale.plan.adaptation import adaptation_of
from lmscale.plan.groups import check_groups
from lmscale.plan.lora import check_targets
from lmscale.plan.names import parameter_shapes
from lmscale.tasks.resolve import resolve_task
from lmscale.train.checkpoint_files import is_whole, read_manifest
from lmscale.train.stages import stages_of

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
        CheckpointError: if a checkpoint that the run will read is missing, torn or of another model.
    """
    config = resolve_task(config, prompt_length(config.adapt))
    keys = load_deepspeed(config.deepspeed)
    zero = check_deepspeed(keys, config)
    check_run(config, zero, devices)
    check_cooldown(config.optim, config.train.train_tokens)
    if isinstance(config.adapt, LoraConfig):
        check_targets(config.model, config.adapt)
    check_groups(config.model, config.optim, adaptation_of(config))
    dp_size = dp_size_of(config, devices)
    resolve_deepspeed(keys, config, dp_size)
    inlined = config.model_copy(update={"deepspeed": keys})
    _check_extras(config)
    check_output_dir(inlined)
    _check_checkpoints(config)
    _check_data(config)
    return LaunchPlan(inlined, zero, devices, dp_size)


def _check_extras(config: RunConfig) -> None:
    """Ask for the packages of an extra where the run will need them."""
    monitor = config.monitor
    for field, value, package, extra in (
        ("monitor.wandb", monitor.wandb, "wandb", "wandb"),
        ("monitor.prometheus_port", monitor.prometheus_port, "prometheus_client", "prometheus"),
    ):
        if value and package not in sys.modules and importlib.util.find_spec(package) is None:
            name = package.replace("_", "-")
            remedy = f"pip install lmscale[{extra}]"
            raise ConfigError(f"needs the {name} package", field=field, value=value, remedy=remedy)


def _check_checkpoints(config: RunConfig) -> None:
    """Look at the checkpoints that the run will read: whole, and of its model as far as their config.yaml tells.

    The ranks compare every tensor; what is found here does not cost their start.
    """
    resume = config.checkpoint.resume
    found = list_checkpoints(Path(config.output_dir) / "checkpoints") if resume == "auto" else []
    if found:
        # The ranks take the first that is whole; where none is, the first says why.
        newest = next(filter(is_whole, found), found[0])
        _check_checkpoint("checkpoint.resume", newest, config)
        check_same_content(config, newest, read_manifest(newest))
    for field, value in (("model.init_from", config.model.init_from), ("checkpoint.resume", resume)):
        if value in (None, "auto", "never"):
            continue
        if not Path(str(value)).exists():
            raise CheckpointError("there is no such checkpoint", field=field, value=value)
        path = resolve_checkpoint(Path(str(value)))
        former = _check_checkpoint(field, path, config)
        if field == "checkpoint.resume":
            _check_goes_on(config, path, former)


def _check_goes_on(config: RunConfig, path: Path, former: RunConfig | None) -> None:
    """Check that a run is that of a checkpoint elsewhere; one that no run has trained, as of an import, is anybody's."""
    manifest = read_manifest(path)
    if manifest.get("progress", {}).get("step") == 0:
        return
    if former is not None:
        stages = stages_of(path, manifest)
        hashes = {source["prefix"]: source["content_hash"] for source in (stages[-1]["train"] if stages else [])}
        remedy = "use the former value, or model.init_from to take the weights alone"
        check_same_run(config, former, f"the checkpoint {path}", remedy, hashes)
    check_same_content(config, path, manifest)


def _check_checkpoint(field: str, path: Path, config: RunConfig) -> RunConfig | None:
    """Check that a checkpoint is whole and of the run's model, and return its config where that can be read."""
    read_manifest(path)
    try:
        former = load_run(path / CONFIG_FILE)
    except LmscaleError:
        return None  # Of another version, perhaps: its tensors tell, and the ranks read them.
    theirs, ours = parameter_shapes(former.model), parameter_shapes(config.model)
    differing = next((name for name in [*ours, *theirs] if ours.get(name) != theirs.get(name)), None)
    if differing is not None:
        there, here = (shapes.get(differing, "absent") for shapes in (theirs, ours))
        raise CheckpointError(
            f"is of another model: {differing} is {there} there and {here} here",
            field=field,
            value=str(path),
            remedy="use the model of its config.yaml",
        )
    return former


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
    if isinstance(config.adapt, ProbingConfig):  # goes on with nothing: a second run may have another head
        if any(directory.glob("checkpoints/step-*")):
            raise ConfigError(
                "holds the checkpoints of another run",
                field="output_dir",
                value=config.output_dir,
                remedy="use another output_dir",
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
    place, remedy = f"the run in {config.output_dir}", "use another output_dir, or the former value"
    check_same_run(config, former, place, remedy, hashes_of_run(path.parent))


def _check_data(config: RunConfig) -> None:
    """Open the tokenizer and the corpora, or a task's files, as the ranks will, by the same code.

    Samples of corpora are not cut: that can take long.
    """
    if config.task is not None:
        from lmscale.tasks.check import check_task

        if config.tokenizer is not None and config.tokenizer.type != "hf":
            _check_vocabulary_size(config)
        check_task(config, prompt_length(config.adapt))
        return
    from lmscale.feed.sources import open_held_out, open_train
    from lmscale.feed.vocabulary import build_vocabulary, check_full_stop
    from lmscale.objectives.base import Vocabulary
    from lmscale.objectives.registry import build_objective

    if config.tokenizer is not None and config.tokenizer.type == "hf":
        # transformers takes seconds to import; the ranks look at its vocabulary.
        vocabulary = Vocabulary(config.model.vocab_size)
    else:
        _check_vocabulary_size(config)
        _check_prompts(config)
        vocabulary = build_vocabulary(config)
        build_objective(config.objective, config.text_lengths, vocabulary)
    sources = [*open_train(config, vocabulary.document_end_id)]
    sources += open_held_out(config, vocabulary.document_end_id).values()
    check_full_stop(vocabulary, config.objective, sources)


def _check_prompts(config: RunConfig) -> None:
    """Check that what a model is to continue leaves it room, which its tokenizer alone tells."""
    from lmscale.data.tokenizer import load_tokenizer
    from lmscale.feed.prompts import encode_prompts

    if config.monitor.samples is not None and config.tokenizer is not None:
        encode_prompts(config, load_tokenizer(config.tokenizer))


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
