"""Rules of trained prompts and prefixes: the room that they take, and what cannot stand behind them."""

from __future__ import annotations

from collections.abc import Callable

from lmscale.config.adapt import (
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningV2Config,
    prefix_length,
    prompt_length,
)
from lmscale.config.objective import TextToTextConfig
from lmscale.config.run import RunConfig
from lmscale.errors import ConfigError


def _prompt_leaves_room(config: RunConfig) -> None:
    length, whole = prompt_length(config.adapt), config.data.seq_length
    if not length:
        return
    shortest = min([whole, *(stage.seq_length for stage in config.data.seq_length_stages)])
    if length >= shortest:
        field = "data.seq_length" if shortest == whole else "data.seq_length_stages"
        raise ConfigError(
            f"leaves no room in {field} = {shortest}, which counts the prompt's vectors in",
            field="adapt.length",
            value=length,
            remedy="shorten the prompt or lengthen the sequence",
        )
    if config.task is not None:
        return  # rows of tasks are cut to the room that is left
    try:
        _ = config.text_lengths
    except ConfigError as error:
        raise ConfigError(
            f"leaves {whole - length} of data.seq_length = {whole} for text, and {error.field} {error.rule}",
            field="adapt.length",
            value=length,
            remedy="shorten the prompt or lengthen the sequence",
        ) from None


def _prompt_has_one_example_behind_it(config: RunConfig) -> None:
    if not prompt_length(config.adapt):
        return
    packs = isinstance(config.objective, TextToTextConfig) and config.objective.packed
    for field, is_set in (("data.reset_attention_mask", config.data.reset_attention_mask), ("objective.packed", packs)):
        if is_set:
            raise ConfigError(
                "prompt tuning has one prompt in front of a row, which only its first document would see",
                field=field,
                value=True,
                remedy="set it to false",
            )


def _prefix_fits_positions(config: RunConfig) -> None:
    length, model = prefix_length(config.adapt), config.model
    if not length or model.position_embedding == "relative":
        return
    lengths = config.lengths
    for field, tokens in (("data.seq_length", lengths.encoder), ("data.decoder_seq_length", lengths.decoder)):
        if tokens + length > model.max_position_embeddings:
            raise ConfigError(
                f"and the {tokens} tokens of {field}, whose positions count from behind it, must be at most "
                f"model.max_position_embeddings = {model.max_position_embeddings}",
                field="adapt.length",
                value=length,
                remedy="shorten the prefix or the sequence",
            )


def _init_text_is_read(config: RunConfig) -> None:
    adapt = config.adapt
    if not isinstance(adapt, PromptTuningConfig | PrefixTuningConfig):
        return
    if adapt.init != "text" and adapt.init_text is not None:
        raise ConfigError("is read with adapt.init: text only", field="adapt.init_text", value=adapt.init_text)
    if adapt.init == "text" and not adapt.init_text:
        raise ConfigError("is required by adapt.init: text", field="adapt.init_text", value=adapt.init_text)
    if adapt.init == "text" and config.tokenizer is None:
        raise ConfigError("is required by adapt.init: text", field="tokenizer", remedy="add the section")


def _init_scale_is_read(config: RunConfig) -> None:
    adapt = config.adapt
    if not isinstance(adapt, PromptTuningConfig) or adapt.init in ("uniform_sym", "uniform_pos"):
        return
    if adapt.init_scale != PromptTuningConfig.model_fields["init_scale"].default:
        raise ConfigError(
            "is read with adapt.init: uniform_sym and uniform_pos only",
            field="adapt.init_scale",
            value=adapt.init_scale,
        )


def _compiled_prefixes_drop_nothing(config: RunConfig) -> None:
    adapt = config.adapt
    if isinstance(adapt, PrefixTuningConfig | PTuningV2Config) and config.train.compile and adapt.dropout:
        raise ConfigError(
            "train.compile: true needs 0.0: compiled layers would draw other dropout masks",
            field="adapt.dropout",
            value=adapt.dropout,
            remedy="set it to 0.0, or train.compile: false",
        )


_PREFIX_AND_PROMPT_RULES = (
    _prompt_leaves_room,
    _prompt_has_one_example_behind_it,
    _prefix_fits_positions,
    _init_text_is_read,
    _init_scale_is_read,
    _compiled_prefixes_drop_nothing,
)

PROMPT_RULES: tuple[Callable[[RunConfig], None], ...] = (*_PREFIX_AND_PROMPT_RULES,)
