"""A whole run, and the rules that hold between its sections."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from lmscale.config.base import Section
from lmscale.config.data import DataConfig, TokenizerConfig
from lmscale.config.layouts import Layout, check_layout
from lmscale.config.lengths import SampleLengths, sample_lengths
from lmscale.config.model import ModelConfig
from lmscale.config.objective import (
    OBJECTIVE_OF,
    BartConfig,
    BertConfig,
    CausalLMConfig,
    ObjectiveConfig,
    RobertaConfig,
    T5Config,
)
from lmscale.config.optim import BatchConfig, LossScaleConfig, OptimConfig
from lmscale.config.parallel import ParallelConfig
from lmscale.config.train import CheckpointConfig, MonitorConfig, TrainConfig
from lmscale.errors import ConfigError


class RunConfig(Section):
    """Everything that a run is made of; `config.yaml` in its directory holds it resolved."""

    model: ModelConfig
    """The architecture."""
    tokenizer: TokenizerConfig | None = None
    """The tokenizer that made the corpora; needed to generate text from the checkpoint."""
    data: DataConfig
    """Corpora and samples."""
    objective: ObjectiveConfig = CausalLMConfig()
    """What the model is trained to predict; left out, its architecture's own objective."""
    parallel: ParallelConfig = ParallelConfig()
    """The layout over the ranks."""
    precision: Literal["fp16", "bf16", "fp32"] = "fp32"
    """Arithmetic of forward and backward; master weights and optimizer state are fp32 in every case."""
    loss_scale: LossScaleConfig | None = None
    """Dynamic loss scaling, with precision: fp16 only; left out there, its defaults."""
    batch: BatchConfig
    """Batch sizes."""
    optim: OptimConfig
    """Optimizer and schedule."""
    train: TrainConfig
    """Length, seed, intervals."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""
    monitor: MonitorConfig = MonitorConfig()
    """Where metrics go."""
    deepspeed: str | dict[str, Any] = {"zero_optimization": {"stage": 1}}
    """A DeepSpeed JSON file (ds_configs/) or the same keys here: ZeRO stage, offload, communication."""
    output_dir: str
    """The run's directory."""

    @property
    def lengths(self) -> SampleLengths:
        """Lengths of the samples."""
        return sample_lengths(self.data, self.objective)


class ZeroChoice(Section):
    """What the DeepSpeed JSON decides about the layout."""

    stage: int = 0
    """ZeRO stage."""
    offload_optimizer: bool = False
    """Optimizer state in host memory."""
    offload_param: bool = False
    """Parameters in host memory."""


def check_run(config: RunConfig, zero: ZeroChoice, world_size: int) -> None:
    """Check the rules between sections, for a number of ranks.

    Raises:
        ConfigError: the first rule that does not hold, with the values and a remedy.
    """
    for rule in CROSS_SECTION_RULES:
        rule(config)
    _tokenizer_is_there(config)
    _offload_has_the_optimizer(config, zero)
    check_layout(
        Layout(
            zero_stage=zero.stage,
            pp_size=config.parallel.pp_size,
            tp_size=config.parallel.tp_size,
            sequence_parallel=config.parallel.sequence_parallel,
            precision=config.precision,
            offload_optimizer=zero.offload_optimizer,
            offload_param=zero.offload_param,
            optimizer=config.optim.name,
        )
    )
    dp_size_of(config, world_size)


def _tokenizer_is_there(config: RunConfig) -> None:
    """Ask for the tokenizer where training needs it; weights alone do without."""
    if config.objective.name != "causal_lm" and config.tokenizer is None:
        raise ConfigError(
            f"is required by objective {config.objective.name}, for its special ids",
            field="tokenizer",
            remedy="add the section",
        )


def _offload_has_the_optimizer(config: RunConfig, zero: ZeroChoice) -> None:
    for key in ("adam_eps_mode", "adam_bias_correction"):
        value = getattr(config.optim, key)
        if zero.offload_optimizer and value != OptimConfig.model_fields[key].default:
            raise ConfigError(
                "DeepSpeed's CPU Adam, which offload_optimizer takes, has no such choice",
                field=f"optim.{key}",
                value=value,
                remedy="leave it out, or offload_optimizer",
            )


def dp_size_of(config: RunConfig, world_size: int) -> int:
    """Compute the data-parallel size and check that the batch divides over it.

    Raises:
        ConfigError: if the ranks, or the batch, do not divide.
    """
    parallel, batch = config.parallel, config.batch
    model_ranks = parallel.tp_size * parallel.pp_size
    if world_size % model_ranks:
        raise ConfigError(
            f"must be a multiple of parallel.tp_size x parallel.pp_size = {parallel.tp_size} x {parallel.pp_size}",
            field="ranks",
            value=world_size,
            remedy=f"start {max(1, world_size // model_ranks) * model_ranks} ranks, or change the layout",
        )
    dp_size = world_size // model_ranks
    quantum = batch.micro_batch_size * dp_size
    _check_divides(
        "batch.global_batch_size",
        batch.global_batch_size,
        quantum,
        f"batch.micro_batch_size x dp_size = {batch.micro_batch_size} x {dp_size} = {quantum}",
    )
    if batch.ramp is not None:
        _check_divides("batch.ramp.start", batch.ramp.start, quantum, f"batch.micro_batch_size x dp_size = {quantum}")
        _check_divides(
            "batch.ramp.increment", batch.ramp.increment, quantum, f"batch.micro_batch_size x dp_size = {quantum}"
        )
    return dp_size


def _check_divides(field: str, value: int, divisor: int, divisor_name: str) -> None:
    if value % divisor:
        lower = value // divisor * divisor
        nearest = f"{lower} or {lower + divisor}" if lower else str(divisor)
        raise ConfigError(f"must be a multiple of {divisor_name}", field=field, value=value, remedy=f"use {nearest}")


def _heads_divide_hidden(config: RunConfig) -> None:
    model = config.model
    if model.head_dim is None:
        _check_divides(
            "model.hidden_size",
            model.hidden_size,
            model.num_attention_heads,
            f"model.num_attention_heads = {model.num_attention_heads} (or set model.head_dim)",
        )
    if model.position_embedding == "rope" and model.head_size % 2:
        raise ConfigError("rope rotates pairs: must be even", field="model.head_dim", value=model.head_size)


def _query_groups_divide_heads(config: RunConfig) -> None:
    model = config.model
    _check_divides(
        "model.num_attention_heads",
        model.num_attention_heads,
        model.query_groups,
        f"model.num_query_groups = {model.query_groups}",
    )


def _tensor_parallel_divides(config: RunConfig) -> None:
    model, tp_size = config.model, config.parallel.tp_size
    name = f"parallel.tp_size = {tp_size}"
    _check_divides("model.num_attention_heads", model.num_attention_heads, tp_size, name)
    _check_divides("model.num_query_groups", model.query_groups, tp_size, name)
    _check_divides("model.ffn_hidden_size", model.ffn_size, tp_size, name)
    if model.padded_vocab_size % tp_size:
        rule = f"must divide the padded vocabulary of {model.padded_vocab_size} rows"
        raise ConfigError(rule, field="parallel.tp_size", value=tp_size, remedy="use a power of two")
    if config.parallel.sequence_parallel:
        _check_divides("data.seq_length", config.data.seq_length, tp_size, name)
        _check_divides("data.decoder_seq_length", config.lengths.decoder, tp_size, name)


def _pipeline_divides(config: RunConfig) -> None:
    model, pp_size = config.model, config.parallel.pp_size
    field = "model.num_layers, of both stacks," if model.has_decoder_stack else "model.num_layers"
    _check_divides(
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


def _objective_fits_architecture(config: RunConfig) -> None:
    architecture, objective = config.model.architecture, config.objective.name
    wanted = OBJECTIVE_OF[architecture]
    if objective != wanted:
        raise ConfigError(
            f"model.architecture: {architecture} is trained by {wanted}", field="objective.name", value=objective
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
    _check_divides(
        "batch.global_batch_size - batch.ramp.start",
        batch.global_batch_size - ramp.start,
        ramp.increment,
        f"batch.ramp.increment = {ramp.increment}",
    )


def _warmup_precedes_decay(config: RunConfig) -> None:
    optim = config.optim
    decay_tokens = optim.lr_decay_tokens or config.train.train_tokens
    if optim.lr_decay_style in ("cosine", "linear") and optim.lr_warmup_tokens >= decay_tokens:
        raise ConfigError(
            f"the warm-up must end before the decay, at {decay_tokens} tokens",
            field="optim.lr_warmup_tokens",
            value=optim.lr_warmup_tokens,
        )
    if optim.min_lr > optim.lr:
        raise ConfigError(f"must be at most optim.lr = {optim.lr}", field="optim.min_lr", value=optim.min_lr)


def _schedule_is_read(config: RunConfig) -> None:
    optim = config.optim
    if optim.lr_warmup_style != "linear" and not optim.lr_warmup_tokens:
        raise ConfigError(
            "is read with optim.lr_warmup_tokens above 0 only",
            field="optim.lr_warmup_style",
            value=optim.lr_warmup_style,
        )
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


def _loss_scale_needs_fp16(config: RunConfig) -> None:
    scale = config.loss_scale
    if scale is None:
        return
    if config.precision != "fp16":
        raise ConfigError(
            f"scales the loss of fp16, and precision is {config.precision}",
            field="loss_scale",
            remedy="drop the section, or set precision: fp16",
        )
    if scale.initial & (scale.initial - 1):
        raise ConfigError("must be a power of two", field="loss_scale.initial", value=scale.initial)
    if scale.minimum > scale.initial:
        raise ConfigError(
            f"must be at most loss_scale.initial = {scale.initial}", field="loss_scale.minimum", value=scale.minimum
        )


def _options_are_read(config: RunConfig) -> None:
    model, optim = config.model, config.optim
    if optim.adam_eps_mode == "raw" and not optim.adam_bias_correction:
        raise ConfigError(
            "is read with optim.adam_bias_correction: true only", field="optim.adam_eps_mode", value="raw"
        )
    for name, prefix in (("adamw", "adam_"), ("adafactor", "adafactor_")):
        for key, field in OptimConfig.model_fields.items():
            if optim.name != name and key.startswith(prefix) and getattr(optim, key) != field.default:
                raise ConfigError(
                    f"is read with optim.name: {name} only", field=f"optim.{key}", value=getattr(optim, key)
                )
    if model.position_embedding != "rope" and model.rope_theta != ModelConfig.model_fields["rope_theta"].default:
        raise ConfigError(
            "is read with model.position_embedding: rope only", field="model.rope_theta", value=model.rope_theta
        )
    for key in ("relative_buckets", "relative_max_distance"):
        value = getattr(model, key)
        if model.position_embedding != "relative" and value != ModelConfig.model_fields[key].default:
            raise ConfigError("is read with model.position_embedding: relative only", field=f"model.{key}", value=value)
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


def _corpora_are_distinct(config: RunConfig) -> None:
    for key, values in (
        ("data.valid.name", [source.name for source in config.data.valid]),
        ("data.train.prefix", [source.prefix for source in config.data.train]),
    ):
        repeated = sorted({value for value in values if values.count(value) > 1})
        if repeated:
            raise ConfigError("is given twice", field=key, value=repeated[0])
    split_shares(config.data.split)


def split_shares(split: str) -> tuple[float, float, float]:
    """Parse "98,1,1" into the fractions of train, valid and test.

    Raises:
        ConfigError: if it is not three numbers of at least 0, the first of them above 0.
    """
    try:
        parts = [float(part) for part in split.split(",")]
    except ValueError:
        parts = []
    if len(parts) != 3 or not all(0 <= part < math.inf for part in parts) or parts[0] <= 0:
        raise ConfigError(
            "must be three numbers, train,valid,test, train above 0",
            field="data.split",
            value=split,
            remedy='as in "98,1,1"',
        )
    total = sum(parts)
    return parts[0] / total, parts[1] / total, parts[2] / total


CROSS_SECTION_RULES: tuple[Callable[[RunConfig], None], ...] = (
    _objective_fits_architecture,
    _architecture_is_built,
    _objective_options_are_read,
    _heads_divide_hidden,
    _query_groups_divide_heads,
    _tensor_parallel_divides,
    _pipeline_divides,
    _sequence_fits_positions,
    _ramp_reaches_batch,
    _warmup_precedes_decay,
    _schedule_is_read,
    _loss_scale_needs_fp16,
    _options_are_read,
    _compiled_layers_draw_nothing,
    _corpora_are_distinct,
)
