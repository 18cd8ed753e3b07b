"""Rules for what changes over a run: rate, weight decay, batch size, sequence length."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from lmscale.config.data import SeqLengthStage
from lmscale.config.optim import BatchStage, OptimConfig
from lmscale.config.run import RunConfig
from lmscale.config.validation import check_divides
from lmscale.errors import ConfigError

_DECAYS_TO_AN_END = ("cosine", "linear", "polynomial")


def _ramp_reaches_batch(config: RunConfig) -> None:
    batch, ramp = config.batch, config.batch.ramp
    if ramp is None:
        return
    if ramp.start > batch.global_batch_size:
        raise ConfigError(
            f"must be at most batch.global_batch_size = {batch.global_batch_size}",
            field="batch.ramp.start",
            value=ramp.start,
        )
    check_divides(
        "batch.global_batch_size - batch.ramp.start",
        batch.global_batch_size - ramp.start,
        ramp.increment,
        f"batch.ramp.increment = {ramp.increment}",
    )
    if ramp.start == batch.global_batch_size:
        raise ConfigError("changes nothing: it is batch.global_batch_size", field="batch.ramp.start", value=ramp.start)
    most = _samples_of_the_run(config)
    if ramp.ramp_samples > most:
        raise ConfigError(
            f"the ramp never ends: train.train_tokens = {config.train.train_tokens} are {most} samples",
            field="batch.ramp.ramp_samples",
            value=ramp.ramp_samples,
        )


def _samples_of_the_run(config: RunConfig) -> int:
    """Count the samples that train_tokens hold, under the curriculum."""
    samples = begin = 0
    for stage in config.data.seq_length_stages:
        samples += (stage.until_tokens - begin) // stage.seq_length
        begin = stage.until_tokens
    return samples + -(-(config.train.train_tokens - begin) // config.lengths.nominal)


def _batch_stages_lead_to_batch(config: RunConfig) -> None:
    batch = config.batch
    if batch.stages and batch.ramp is not None:
        raise ConfigError(
            "is the other form of batch.stages", field="batch.ramp", value="a section", remedy="keep one of them"
        )
    sizes = [stage.batch_size for stage in batch.stages]
    _stages_follow("batch.stages", "batch_size", batch.stages, sizes, batch.global_batch_size, config)
    for number, size in enumerate(sizes):
        if size > batch.global_batch_size:
            raise ConfigError(
                f"must be at most batch.global_batch_size = {batch.global_batch_size}",
                field=f"batch.stages.{number}.batch_size",
                value=size,
            )


def _curriculum_leads_to_length(config: RunConfig) -> None:
    data, stages = config.data, config.data.seq_length_stages
    if not stages:
        return
    if config.objective.name != "causal_lm":
        raise ConfigError(
            f"cuts windows of causal_lm, and the objective is {config.objective.name}",
            field="data.seq_length_stages",
            value=f"{len(stages)} stages",
            remedy="leave it out",
        )
    if config.train.compile:
        raise ConfigError(
            "train.compile: true compiles for one length",
            field="data.seq_length_stages",
            value=f"{len(stages)} stages",
            remedy="leave out one of the two",
        )
    lengths = [stage.seq_length for stage in stages]
    for number, length in enumerate(lengths):
        field = f"data.seq_length_stages.{number}.seq_length"
        if length > data.seq_length:
            raise ConfigError(f"must be at most data.seq_length = {data.seq_length}", field=field, value=length)
        if config.parallel.sequence_parallel:
            check_divides(field, length, config.parallel.tp_size, f"parallel.tp_size = {config.parallel.tp_size}")
    _stages_follow("data.seq_length_stages", "seq_length", stages, lengths, data.seq_length, config)


def _stages_follow(
    field: str,
    key: str,
    stages: Sequence[BatchStage | SeqLengthStage],
    values: Sequence[int],
    full: int,
    config: RunConfig,
) -> None:
    """Check that stages end one after the other, before the run does, and that each changes something."""
    for number, (one, other) in enumerate(itertools.pairwise(stages), start=1):
        if other.until_tokens <= one.until_tokens:
            raise ConfigError(
                f"must be above the end of the stage before, {one.until_tokens}",
                field=f"{field}.{number}.until_tokens",
                value=other.until_tokens,
            )
    if stages and stages[-1].until_tokens >= config.train.train_tokens:
        raise ConfigError(
            f"the stage never ends: train.train_tokens is {config.train.train_tokens}",
            field=f"{field}.{len(stages) - 1}.until_tokens",
            value=stages[-1].until_tokens,
        )
    for number, (value, following) in enumerate(itertools.pairwise([*values, full])):
        if value == following:
            raise ConfigError(
                "is that of what follows the stage: it changes nothing", field=f"{field}.{number}.{key}", value=value
            )


def _warmup_precedes_decay(config: RunConfig) -> None:
    optim = config.optim
    decay_tokens = optim.lr_decay_tokens or config.train.train_tokens
    if optim.lr_decay_style in (*_DECAYS_TO_AN_END, "wsd") and optim.lr_warmup_tokens >= decay_tokens:
        raise ConfigError(
            f"the warm-up must end before the decay, at {decay_tokens} tokens",
            field="optim.lr_warmup_tokens",
            value=optim.lr_warmup_tokens,
        )
    if optim.lr_warmup_tokens > config.train.train_tokens:
        raise ConfigError(
            f"the warm-up never ends: train.train_tokens is {config.train.train_tokens}",
            field="optim.lr_warmup_tokens",
            value=optim.lr_warmup_tokens,
        )
    ends_at_zero = optim.lr_decay_style in (*_DECAYS_TO_AN_END, "wsd") and optim.min_lr == 0
    if ends_at_zero and decay_tokens < config.train.train_tokens and optim.lr_cooldown is None:
        raise ConfigError(
            f"the rate is 0 from there to the end, at train.train_tokens = {config.train.train_tokens}",
            field="optim.lr_decay_tokens",
            value=decay_tokens,
            remedy="train to there, or give optim.min_lr",
        )
    if optim.min_lr > optim.lr:
        raise ConfigError(f"must be at most optim.lr = {optim.lr}", field="optim.min_lr", value=optim.min_lr)


def _stable_phase_precedes_its_decay(config: RunConfig) -> None:
    optim, train_tokens = config.optim, config.train.train_tokens
    if optim.lr_decay_style != "wsd":
        return
    end = optim.lr_decay_tokens or train_tokens
    if optim.lr_cooldown_tokens is None:
        raise ConfigError("is required with optim.lr_decay_style: wsd", field="optim.lr_cooldown_tokens")
    if end > train_tokens and optim.lr_cooldown is None:
        raise ConfigError(
            f"the cooldown never ends: train.train_tokens is {train_tokens}", field="optim.lr_decay_tokens", value=end
        )
    if optim.lr_warmup_tokens + optim.lr_cooldown_tokens > end:
        raise ConfigError(
            f"overlaps the warm-up: it would begin at {end - optim.lr_cooldown_tokens} tokens, and the warm-up ends at "
            f"{optim.lr_warmup_tokens}",
            field="optim.lr_cooldown_tokens",
            value=optim.lr_cooldown_tokens,
        )


def _schedule_is_read(config: RunConfig) -> None:
    optim = config.optim
    if optim.lr_warmup_style != "linear" and not optim.lr_warmup_tokens:
        raise ConfigError(
            "is read with optim.lr_warmup_tokens above 0 only",
            field="optim.lr_warmup_style",
            value=optim.lr_warmup_style,
        )
    for key, style in (
        ("lr_decay_power", "polynomial"),
        ("lr_cooldown_tokens", "wsd"),
        ("lr_cooldown_style", "wsd"),
    ):
        _read_with(optim, key, f"optim.lr_decay_style: {style}", optim.lr_decay_style == style)
    if optim.lr_decay_style == "constant":
        floor_is_read = optim.lr_cooldown is not None and optim.lr_cooldown.end_lr is None
        _read_with(optim, "lr_decay_tokens", "an optim.lr_decay_style that decays", False)
        _read_with(optim, "min_lr", "an optim.lr_decay_style that decays, or optim.lr_cooldown", floor_is_read)
    if optim.lr_decay_style != "inverse_sqrt":
        return
    if not optim.lr_warmup_tokens:
        raise ConfigError(
            "optim.lr_decay_style: inverse_sqrt begins its decay there: must be above 0",
            field="optim.lr_warmup_tokens",
            value=0,
        )
    if optim.lr_decay_tokens is not None:
        raise ConfigError(
            "optim.lr_decay_style: inverse_sqrt has no end",
            field="optim.lr_decay_tokens",
            value=optim.lr_decay_tokens,
            remedy="leave it out; optim.min_lr bounds the rate",
        )


def _read_with(optim: OptimConfig, key: str, reader: str, is_read: bool) -> None:
    value: Any = getattr(optim, key)
    if not is_read and value != OptimConfig.model_fields[key].default:
        raise ConfigError(f"is read with {reader} only", field=f"optim.{key}", value=value)


def _cooldown_fits(config: RunConfig) -> None:
    optim, cooldown, train_tokens = config.optim, config.optim.lr_cooldown, config.train.train_tokens
    if cooldown is None:
        return
    end = cooldown.start_tokens + cooldown.tokens
    if optim.lr_decay_style in (*_DECAYS_TO_AN_END, "wsd") and optim.lr_decay_tokens is None:
        raise ConfigError(
            "is required with optim.lr_cooldown, whose run is shorter: the rate at its start depends on it",
            field="optim.lr_decay_tokens",
            remedy="give the train.train_tokens that the schedule was made for",
        )
    if cooldown.start_tokens < optim.lr_warmup_tokens:
        raise ConfigError(
            f"overlaps the warm-up, which ends at optim.lr_warmup_tokens = {optim.lr_warmup_tokens}",
            field="optim.lr_cooldown.start_tokens",
            value=cooldown.start_tokens,
        )
    if optim.lr_decay_style == "wsd" and optim.lr_cooldown_tokens is not None:
        own = (optim.lr_decay_tokens or train_tokens) - optim.lr_cooldown_tokens
        if cooldown.start_tokens > own:
            raise ConfigError(
                f"overlaps the cooldown of optim.lr_decay_style: wsd, which begins at {own} tokens",
                field="optim.lr_cooldown.start_tokens",
                value=cooldown.start_tokens,
            )
    if end > train_tokens:
        raise ConfigError(
            f"the cooldown never ends: it would at {end} tokens, and train.train_tokens is {train_tokens}",
            field="optim.lr_cooldown.tokens",
            value=cooldown.tokens,
            remedy=f"set train.train_tokens = {end}",
        )
    floor = optim.min_lr if cooldown.end_lr is None else cooldown.end_lr
    if end < train_tokens and floor == 0:
        raise ConfigError(
            f"the rate would be 0 from {end} tokens on, and train.train_tokens is {train_tokens}",
            field="optim.lr_cooldown.tokens",
            value=cooldown.tokens,
            remedy=f"set train.train_tokens = {end}",
        )


def _rewarmup_fits(config: RunConfig) -> None:
    optim, rewarmup, train_tokens = config.optim, config.optim.lr_rewarmup, config.train.train_tokens
    if rewarmup is None:
        return
    end = rewarmup.start_tokens + rewarmup.tokens
    if rewarmup.start_tokens < optim.lr_warmup_tokens:
        raise ConfigError(
            f"overlaps the warm-up, which ends at optim.lr_warmup_tokens = {optim.lr_warmup_tokens}",
            field="optim.lr_rewarmup.start_tokens",
            value=rewarmup.start_tokens,
        )
    if end > train_tokens:
        raise ConfigError(
            f"the warm-up never ends: it would at {end} tokens, and train.train_tokens is {train_tokens}",
            field="optim.lr_rewarmup.tokens",
            value=rewarmup.tokens,
        )
    for name, begin, behind in _cooldowns(optim, train_tokens):
        if rewarmup.start_tokens < behind and begin < end:
            raise ConfigError(
                f"overlaps {name}, from {begin} to {behind} tokens",
                field="optim.lr_rewarmup.start_tokens",
                value=rewarmup.start_tokens,
            )


def _cooldowns(optim: OptimConfig, train_tokens: int) -> list[tuple[str, int, int]]:
    found = []
    if optim.lr_cooldown is not None:
        begin = optim.lr_cooldown.start_tokens
        found.append(("optim.lr_cooldown", begin, begin + optim.lr_cooldown.tokens))
    elif optim.lr_decay_style == "wsd" and optim.lr_cooldown_tokens is not None:
        end = optim.lr_decay_tokens or train_tokens
        found.append(("the cooldown of optim.lr_decay_style: wsd", end - optim.lr_cooldown_tokens, end))
    return found


def _weight_decay_is_read(config: RunConfig) -> None:
    optim = config.optim
    if optim.weight_decay_style == "constant" and optim.weight_decay_end is not None:
        raise ConfigError(
            "is read with optim.weight_decay_style linear or cosine only",
            field="optim.weight_decay_end",
            value=optim.weight_decay_end,
        )
    if optim.weight_decay_style != "constant" and optim.weight_decay_end is None:
        raise ConfigError(
            f"is required with optim.weight_decay_style: {optim.weight_decay_style}",
            field="optim.weight_decay_end",
        )
    if optim.weight_decay_end == optim.weight_decay and optim.weight_decay_style != "constant":
        raise ConfigError(
            "changes nothing: it is optim.weight_decay", field="optim.weight_decay_end", value=optim.weight_decay_end
        )


def _change_is_of_a_resumed_run(config: RunConfig) -> None:
    if config.checkpoint.allow_change and config.checkpoint.resume == "never":
        raise ConfigError(
            "is read where a run is resumed, and checkpoint.resume is never",
            field="checkpoint.allow_change",
            value=list(config.checkpoint.allow_change),
        )


SCHEDULE_RULES: tuple[Callable[[RunConfig], None], ...] = (
    _batch_stages_lead_to_batch,
    _curriculum_leads_to_length,
    _ramp_reaches_batch,
    _warmup_precedes_decay,
    _stable_phase_precedes_its_decay,
    _schedule_is_read,
    _cooldown_fits,
    _rewarmup_fits,
    _weight_decay_is_read,
    _change_is_of_a_resumed_run,
)
