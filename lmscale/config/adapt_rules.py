"""Rules between an adaptation and the rest of a run."""

from __future__ import annotations

from collections.abc import Callable

from lmscale.config.adapt import AdapterConfig, BitFitConfig, FullConfig, LoraConfig, num_adaptations
from lmscale.config.optim import OptimConfig
from lmscale.config.run import RunConfig, ZeroChoice
from lmscale.errors import ConfigError


def _base_is_named(config: RunConfig) -> None:
    if config.adapt is not None and config.model.init_from is None:
        raise ConfigError(
            f"is what adapt.method: {config.adapt.method} adapts, and is left out",
            field="model.init_from",
            remedy="name a checkpoint, or leave out the section adapt to pretrain",
        )


def _full_options_are_read(config: RunConfig) -> None:
    adapt = config.adapt
    if not isinstance(adapt, FullConfig) or adapt.top_layers is None:
        return
    if adapt.top_layers > config.model.num_layers:
        raise ConfigError(
            f"must be at most model.num_layers = {config.model.num_layers}",
            field="adapt.top_layers",
            value=adapt.top_layers,
            remedy="leave it out to train all",
        )
    if adapt.top_layers < 2 and adapt.layer_decay != 1.0:
        raise ConfigError(
            f"tells layers apart, and adapt.top_layers = {adapt.top_layers} leaves nothing to tell apart",
            field="adapt.layer_decay",
            value=adapt.layer_decay,
            remedy="leave it out",
        )


def _adapter_options_are_read(config: RunConfig) -> None:
    adapt = config.adapt
    if not isinstance(adapt, AdapterConfig):
        return
    if adapt.init_std is not None and adapt.chosen_init == "zero_up":
        raise ConfigError(
            "is not read with adapt.init: zero_up",
            field="adapt.init_std",
            value=adapt.init_std,
            remedy="leave it out, or set adapt.init to normal or truncated_normal",
        )
    _is_thin("adapt.width", adapt.width, config)


def _lora_is_thin(config: RunConfig) -> None:
    if isinstance(config.adapt, LoraConfig):
        _is_thin("adapt.rank", config.adapt.rank, config)


def _is_thin(field: str, width: int, config: RunConfig) -> None:
    if width > config.model.hidden_size:
        raise ConfigError(
            f"must be at most model.hidden_size = {config.model.hidden_size}",
            field=field,
            value=width,
            remedy="a wider one takes more than the matrix that it stands in for",
        )


def _biases_are_there(config: RunConfig) -> None:
    adapt, model = config.adapt, config.model
    in_norms = model.normalization == "layernorm"
    if isinstance(adapt, BitFitConfig):
        field, value, of_linear = "adapt.method", "bitfit", adapt.which == "query_fc1"
        if of_linear:
            field, value = "adapt.which", "query_fc1"
    elif isinstance(adapt, LoraConfig) and adapt.bias != "none":
        field, value, of_linear = "adapt.bias", adapt.bias, adapt.bias == "lora_only"
    else:
        return
    if model.linear_bias or (in_norms and not of_linear):
        return
    kinds = "linear layers have no biases" if in_norms else "layers have no biases"
    raise ConfigError(
        f"the model's {kinds} (model.linear_bias: false, model.normalization: {model.normalization})",
        field=field,
        value=value,
        remedy="train what it has by lora or adapter" if isinstance(adapt, BitFitConfig) else "use adapt.bias: none",
    )


def _held_back_biases_stay(config: RunConfig) -> None:
    """Decay would move the biases of keys and values, which share a tensor with those of queries."""
    adapt, optim = config.adapt, config.optim
    if isinstance(adapt, BitFitConfig) and adapt.which == "query_fc1" and optim.decay_biases_and_norms:
        raise ConfigError(
            "would decay biases that adapt.which: query_fc1 leaves as they are",
            field="optim.decay_biases_and_norms",
            value=True,
            remedy="leave it out, or use adapt.which: all",
        )


def _entries_are_updated_by_rows(config: RunConfig) -> None:
    """Refuse what would move an adaptation that has no row in a batch, or let one change another's updates."""
    optim, count = config.optim, num_adaptations(config.adapt)
    if count == 1:
        return
    if optim.name not in ("sgd", "adamw"):
        raise ConfigError(
            f"adapt.entries = {count} needs sgd or adamw: the others move adaptations that have no row in a batch",
            field="optim.name",
            value=optim.name,
            remedy="use one of them, or train the adaptations one by one",
        )
    stay = {"sgd": ("sgd_momentum", "weight_decay", "weight_decay_end"), "adamw": ()}[optim.name]
    for key in (*stay, "max_grad_norm"):
        if getattr(optim, key):
            bound = key == "max_grad_norm"
            raise ConfigError(
                "scales one adaptation by another's gradient"
                if bound
                else "moves adaptations that have no row in a batch",
                field=f"optim.{key}",
                value=getattr(optim, key),
                remedy="set it to 0, or train the adaptations one by one",
            )
    own = ("implementation", "adam_bias_correction", "adam_eps_mode")
    for key in own if optim.name == "adamw" else ():
        default = OptimConfig.model_fields[key].default
        if getattr(optim, key) != default and (key, getattr(optim, key)) != ("implementation", "torch"):
            raise ConfigError(
                f"adapt.entries = {count} has an AdamW of its own, which does without",
                field=f"optim.{key}",
                value=getattr(optim, key),
                remedy="leave it out",
            )


def _entries_share_nothing(config: RunConfig) -> None:
    """Refuse parameters that all adaptations would train: of the base, or a task's head."""
    adapt, count = config.adapt, num_adaptations(config.adapt)
    if count == 1:
        return
    rule = f"adapt.entries = {count} would all train it"
    if isinstance(adapt, LoraConfig) and adapt.bias != "none":
        raise ConfigError(rule, field="adapt.bias", value=adapt.bias, remedy="use none")
    if isinstance(adapt, AdapterConfig) and adapt.trains_norms:
        raise ConfigError(rule, field="adapt.norms", value=True, remedy="set it to false")
    if config.task is not None and config.task.output_of(config.model.architecture) == "head":
        raise ConfigError(rule, field="task.output", value="head", remedy="train the adaptations one by one")


def _entries_are_told_apart(config: RunConfig) -> None:
    count = num_adaptations(config.adapt)
    if count > 1 and config.task is None:
        raise ConfigError(
            "is told by a task's rows (task.columns.entry), and the run has no task",
            field="adapt.entries",
            value=count,
            remedy="set it to 1, or add the section task",
        )


def _compiled_layers_draw_nothing(config: RunConfig) -> None:
    dropout = getattr(config.adapt, "dropout", 0.0)
    if config.train.compile and dropout:
        raise ConfigError(
            "train.compile: true needs 0.0: compiled layers would draw other dropout masks, and each be compiled anew",
            field="adapt.dropout",
            value=dropout,
            remedy="set it to 0.0, or train.compile: false",
        )


def check_adaptation(config: RunConfig, zero: ZeroChoice) -> None:
    """Check what an adaptation asks of ZeRO: flat shards do not know where one of several adaptations ends.

    Raises:
        ConfigError: if the stage splits several adaptations.
    """
    if num_adaptations(config.adapt) > 1 and zero.stage > 0:
        raise ConfigError(
            f"{num_adaptations(config.adapt)} adaptations side by side need ZeRO 0, and the stage is {zero.stage}",
            field="adapt.entries",
            value=num_adaptations(config.adapt),
            remedy="set zero_optimization.stage to 0",
        )


ADAPT_RULES: tuple[Callable[[RunConfig], None], ...] = (
    _base_is_named,
    _full_options_are_read,
    _adapter_options_are_read,
    _lora_is_thin,
    _biases_are_there,
    _held_back_biases_stay,
    _entries_are_updated_by_rows,
    _entries_share_nothing,
    _entries_are_told_apart,
    _compiled_layers_draw_nothing,
)
