"""Rules between the sections that say what is trained on what: model, objective, data, layout."""

from __future__ import annotations

from collections.abc import Callable

from lmscale.config.model import InitConfig, ModelConfig
from lmscale.config.objective import OBJECTIVES_OF, BartConfig, BertConfig, RobertaConfig, T5Config
from lmscale.config.run import RunConfig
from lmscale.config.validation import check_divides
from lmscale.errors import ConfigError


def _objective_fits_architecture(config: RunConfig) -> None:
    architecture, objective = config.model.architecture, config.objective.name
    known = OBJECTIVES_OF[architecture]
    if objective not in known:
        raise ConfigError(
            f"model.architecture: {architecture} is trained by {' or '.join(known)}",
            field="objective.name",
            value=objective,
        )
    if config.data.decoder_seq_length is not None and not config.model.has_decoder_stack:
        raise ConfigError(
            f"is read by bart and t5 only, and model.architecture is {architecture}",
            field="data.decoder_seq_length",
            value=config.data.decoder_seq_length,
            remedy="leave it out",
        )
    if config.data.reset_attention_mask and architecture != "gpt":
        raise ConfigError(
            f"is read by gpt only, and model.architecture is {architecture}",
            field="data.reset_attention_mask",
            value=True,
            remedy="leave it out",
        )


def _architecture_is_built(config: RunConfig) -> None:
    """Refuse choices that no model of the architecture has."""
    model = config.model
    encodes = model.architecture != "gpt"
    for field, is_wrong, rule in (
        ("position_embedding", model.position_embedding == "rope" and encodes, "rope is built for gpt only"),
        (
            "position_embedding",
            (model.position_embedding == "relative") != (model.architecture == "t5"),
            "t5 is built with relative positions, and nothing else is",
        ),
        ("token_types", model.token_types > 0 and not model.is_encoder_only, "is read by bert and roberta only"),
        ("next_sentence_head", model.next_sentence_head and model.architecture != "bert", "is read by bert only"),
        ("tied_head", not model.tied_head and model.architecture in ("bert", "roberta", "bart"), "must be true"),
        ("scaled_logits", model.scaled_logits and not model.tied_head, "is read with tied_head: true only"),
        ("num_query_groups", model.query_groups != model.num_attention_heads and encodes, "is read by gpt only"),
    ):
        if is_wrong:
            raise ConfigError(rule, field=f"model.{field}", value=getattr(model, field))
    if model.architecture == "bert" and model.token_types < 2:
        raise ConfigError("bert has two segments", field="model.token_types", value=model.token_types)


def _objective_options_are_read(config: RunConfig) -> None:
    objective = config.objective
    unread: list[tuple[str, str]] = []
    if isinstance(objective, T5Config):
        if objective.noise != "spans":
            unread.append(("mean_span", "objective.noise: spans"))
        if objective.noise != "bert":
            unread.append(("random_share", "objective.noise: bert"))
        if objective.noise in ("prefix_lm", "deshuffle"):
            unread.append(("density", "objective.noise: spans, iid or bert"))
    if isinstance(objective, BartConfig):
        if objective.masking != "spans" or objective.preset is not None:
            unread.append(("span_lambda", "objective.masking: spans and without objective.preset"))
        if objective.preset is not None:
            unread.append(("random_share", "no objective.preset"))
        makes_masks = objective.masked_share > 0 and (objective.replacement != "none" or objective.masking == "spans")
        if not makes_masks and objective.inserted_share == 0:
            unread.append(("random_share", "masks to replace: objective.masked_share or inserted_share above 0"))
        if objective.masking != "spans" or objective.masked_share == 0:
            unread.append(("preset", "objective.masking: spans and objective.masked_share above 0"))
        if objective.masked_share == 0:
            unread += [(key, "objective.masked_share above 0") for key in ("masking", "replacement", "span_lambda")]
        if objective.permuted_share == 0:
            unread.append(("full_stop", "objective.permuted_share above 0"))
    for key, reader in unread:
        if getattr(objective, key) != type(objective).model_fields[key].default:
            raise ConfigError(f"is read with {reader} only", field=f"objective.{key}", value=getattr(objective, key))
    if isinstance(objective, RobertaConfig) and objective.kept_share + objective.random_share > 1:
        raise ConfigError(
            "kept_share and random_share sum to more than 1", field="objective.kept_share", value=objective.kept_share
        )
    if isinstance(objective, BertConfig) and config.lengths.labels > config.data.seq_length:
        raise ConfigError(
            "must be at most data.seq_length", field="objective.max_predictions", value=config.lengths.labels
        )


def _heads_divide_hidden(config: RunConfig) -> None:
    model = config.model
    if model.head_dim is None:
        check_divides(
            "model.hidden_size",
            model.hidden_size,
            model.num_attention_heads,
            f"model.num_attention_heads = {model.num_attention_heads} (or set model.head_dim)",
        )
    if model.position_embedding == "rope" and model.head_size % 2:
        raise ConfigError("rope rotates pairs: must be even", field="model.head_dim", value=model.head_size)


def _query_groups_divide_heads(config: RunConfig) -> None:
    model = config.model
    check_divides(
        "model.num_attention_heads",
        model.num_attention_heads,
        model.query_groups,
        f"model.num_query_groups = {model.query_groups}",
    )


def _tensor_parallel_divides(config: RunConfig) -> None:
    model, tp_size = config.model, config.parallel.tp_size
    name = f"parallel.tp_size = {tp_size}"
    check_divides("model.num_attention_heads", model.num_attention_heads, tp_size, name)
    check_divides("model.num_query_groups", model.query_groups, tp_size, name)
    check_divides("model.ffn_hidden_size", model.ffn_size, tp_size, name)
    if model.padded_vocab_size % tp_size:
        rule = f"must divide the padded vocabulary of {model.padded_vocab_size} rows"
        raise ConfigError(rule, field="parallel.tp_size", value=tp_size, remedy="use a power of two")
    if config.parallel.sequence_parallel:
        check_divides("data.seq_length", config.data.seq_length, tp_size, name)
        check_divides("data.decoder_seq_length", config.lengths.decoder, tp_size, name)


def _pipeline_divides(config: RunConfig) -> None:
    model, pp_size = config.model, config.parallel.pp_size
    field = "model.num_layers, of both stacks," if model.has_decoder_stack else "model.num_layers"
    check_divides(
        field, model.num_layers * (2 if model.has_decoder_stack else 1), pp_size, f"parallel.pp_size = {pp_size}"
    )


def _sequence_fits_positions(config: RunConfig) -> None:
    lengths = config.lengths
    if config.model.position_embedding == "relative":
        return
    for field, length in (("data.seq_length", lengths.encoder), ("data.decoder_seq_length", lengths.decoder)):
        if length > config.model.max_position_embeddings:
            raise ConfigError(
                f"must be at most model.max_position_embeddings = {config.model.max_position_embeddings}",
                field=field,
                value=length,
                remedy="shorten the sequence or enlarge the position table",
            )


def _position_options_are_read(config: RunConfig) -> None:
    model = config.model
    if model.position_embedding != "rope" and model.rope_theta != ModelConfig.model_fields["rope_theta"].default:
        raise ConfigError(
            "is read with model.position_embedding: rope only", field="model.rope_theta", value=model.rope_theta
        )
    for key in ("relative_buckets", "relative_max_distance"):
        value = getattr(model, key)
        if model.position_embedding != "relative" and value != ModelConfig.model_fields[key].default:
            raise ConfigError("is read with model.position_embedding: relative only", field=f"model.{key}", value=value)
    exact = model.relative_buckets // 2  # of a decoder: these hold one distance each, the others what lies beyond
    if model.position_embedding == "relative" and model.relative_max_distance <= exact:
        raise ConfigError(
            f"must be above half of model.relative_buckets = {model.relative_buckets}: {exact}",
            field="model.relative_max_distance",
            value=model.relative_max_distance,
        )
    if model.position_embedding != "learned" and model.position_offset:
        raise ConfigError(
            "is read with model.position_embedding: learned only",
            field="model.position_offset",
            value=model.position_offset,
        )
    if model.position_embedding != "learned" and model.init.position_std is not None:
        raise ConfigError(
            "is read with model.position_embedding: learned only",
            field="model.init.position_std",
            value=model.init.position_std,
        )


def _init_std_is_read(config: RunConfig) -> None:
    init = config.model.init
    if init.scheme not in ("normal", "truncated_normal") and init.std != InitConfig.model_fields["std"].default:
        raise ConfigError(
            "is read with model.init.scheme: normal and truncated_normal only", field="model.init.std", value=init.std
        )


def _compiled_layers_draw_nothing(config: RunConfig) -> None:
    model = config.model
    for field, probability in (
        ("model.hidden_dropout", model.hidden_dropout),
        ("model.attention_dropout", model.attention_dropout),
        ("model.ffn_dropout", model.ffn_dropout),
    ):
        if config.train.compile and probability:
            raise ConfigError(
                "train.compile: true needs 0.0: compiled layers would draw other dropout masks, and each be compiled anew",
                field=field,
                value=probability,
                remedy="set it to 0.0, or train.compile: false",
            )


MODEL_RULES: tuple[Callable[[RunConfig], None], ...] = (
    _objective_fits_architecture,
    _architecture_is_built,
    _objective_options_are_read,
    _heads_divide_hidden,
    _query_groups_divide_heads,
    _tensor_parallel_divides,
    _pipeline_divides,
    _sequence_fits_positions,
    _position_options_are_read,
    _init_std_is_read,
    _compiled_layers_draw_nothing,
)
