"""The DeepSpeed JSON: read it, check it against the run, and make the one that deepspeed.initialize is given.

Only what DeepSpeed owns belongs in the file: ZeRO, offload, communication. Batch, clipping and precision belong to the
run's config; where the file repeats them, the two must agree.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmscale.config.deepspeed_keys import KEYS, DeepSpeedKey
from lmscale.config.optim import LossScaleConfig
from lmscale.config.run import RunConfig, ZeroChoice
from lmscale.config.validation import nearest
from lmscale.errors import ConfigError

AUTO = "auto"
"""In the place of a value: take it from the run's config."""

NEVER = 1_000_000_000
"""Steps between DeepSpeed's own progress lines, for none."""

_OWNED = frozenset(
    {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"}
)


def load_deepspeed(value: str | dict[str, Any]) -> dict[str, Any]:
    """Return DeepSpeed's keys from a JSON file, or a copy of those that the config holds itself.

    Raises:
        ConfigError: if the file is missing, is not JSON, names a key twice, or does not hold an object.
    """
    if isinstance(value, dict):
        return copy.deepcopy(value)
    try:
        keys = json.loads(Path(value).read_text(), object_pairs_hook=_without_duplicates)
    except FileNotFoundError:
        raise ConfigError("does not exist", field="deepspeed", value=value) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", field="deepspeed", value=value) from None
    except json.JSONDecodeError as error:
        rule = f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        raise ConfigError(rule, field="deepspeed", value=value) from None
    if not isinstance(keys, dict):
        raise ConfigError("must hold a JSON object", field="deepspeed", value=value)
    return keys


def check_deepspeed(keys: dict[str, Any], config: RunConfig) -> ZeroChoice:
    """Check every key against the table of keys and against the run's config.

    Returns:
        What the keys say about the layout.

    Raises:
        ConfigError: if a key is unknown (the nearest is named), refused, of the wrong type, or contradicts the config.
    """
    _check_section(keys, "")
    for path, ours in _AGREEMENTS.items():
        name, expected = ours(config)
        if expected is not None:
            _check_agreement(keys, path, name, expected)
    if _get(keys, "fp16.loss_scale") not in (None, 0, AUTO):
        raise ConfigError(
            "is a static loss scale; lmscale scales dynamically",
            field="deepspeed.fp16.loss_scale",
            value=_get(keys, "fp16.loss_scale"),
            remedy="use 0, and the loss_scale section",
        )
    return _zero_choice(keys)


def resolve_deepspeed(keys: dict[str, Any], config: RunConfig, dp_size: int) -> dict[str, Any]:
    """Make the JSON that deepspeed.initialize is given: DeepSpeed's own keys, with the run's values filled in.

    Gradients are clipped by DeepSpeed from ZeRO 1 on. With ZeRO 0 its norm is wrong under a pipeline and not reported
    at all in fp32, so clipping is off there (0.0; left out, DeepSpeed would clip at 1.0) and lmscale clips.

    Args:
        keys: as `load_deepspeed` returned and `check_deepspeed` accepted them.
        config: the run.
        dp_size: data-parallel ranks.

    Raises:
        ConfigError: if the keys give other gradient_accumulation_steps than the batch.
    """
    batch = config.batch
    steps = batch.global_batch_size // (batch.micro_batch_size * dp_size)
    name = f"batch.global_batch_size / (batch.micro_batch_size x dp_size = {batch.micro_batch_size} x {dp_size})"
    _check_agreement(keys, "gradient_accumulation_steps", name, steps)
    ours = {"train_micro_batch_size_per_gpu": batch.micro_batch_size, "gradient_accumulation_steps": steps}
    stage = _zero_choice(keys).stage
    theirs = {key: copy.deepcopy(value) for key, value in keys.items() if key not in {*_OWNED, "fp16", "bf16"}}
    return {
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
        "zero_force_ds_cpu_optimizer": False,  # SGD and Lion update in host memory too
        **theirs,
        **ours,
        "gradient_clipping": config.optim.max_grad_norm if stage else 0.0,
        "zero_allow_untested_optimizer": True,
        # Partitioned sends fail on packed records and, under sequence parallelism, mix the rows of the ranks.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        **_precision_block(keys, config),
    }


def passed_notes(keys: dict[str, Any]) -> list[str]:
    """List the keys that DeepSpeed gets as they are though no test of ours covers them, each with its note.

    A section that is passed on stands for the keys in it.
    """
    passed = {path for path, key in KEYS.items() if key.status == "passed" and _get(keys, path) is not None}
    return [f"{path}: {key.note}" for path, key in KEYS.items() if path in passed and _parent(path) not in passed]


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ConfigError("is given twice", field=f"deepspeed key {repeated}", remedy="keep one")
    return keys


def _check_section(section: dict[str, Any], prefix: str) -> None:
    for name, value in section.items():
        path = prefix + str(name)
        key = KEYS.get(path)
        if key is None:
            depth = path.count(".")
            siblings = [p.removeprefix(prefix) for p in KEYS if p.startswith(prefix) and p.count(".") == depth]
            raise ConfigError("unknown key", field=f"deepspeed.{path}", remedy=nearest(str(name), siblings))
        if key.status == "refused":
            raise ConfigError(f"is refused: {key.note}", field=f"deepspeed.{path}", remedy=key.remedy)
        _check_type(key, value)
        if key.kind == "section":
            _check_section(value, path + ".")


_TYPES: dict[str, Callable[[Any], bool]] = {
    "int": lambda value: _is_number(value) and float(value).is_integer(),
    "float": lambda value: _is_number(value),
    "bool": lambda value: isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "section": lambda value: isinstance(value, dict),
    "any": lambda value: True,
}
_TYPE_NAMES = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a string",
    "section": "an object",
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_type(key: DeepSpeedKey, value: Any) -> None:
    if value == AUTO and (key.path in _AGREEMENTS or key.path in {"gradient_accumulation_steps", "fp16.loss_scale"}):
        return
    if not _TYPES[key.kind](value):
        remedy = "drop the key to get DeepSpeed's default" if value == AUTO else None
        raise ConfigError(f"must be {_TYPE_NAMES[key.kind]}", field=f"deepspeed.{key.path}", value=value, remedy=remedy)
    allowed = _CHOICES.get(key.path)
    if allowed is not None and value not in allowed:
        names = ", ".join(str(choice) for choice in allowed)
        raise ConfigError(f"must be one of {names}", field=f"deepspeed.{key.path}", value=value)


_CHOICES: dict[str, tuple[Any, ...]] = {
    "zero_optimization.stage": (0, 1, 2, 3),
    "zero_optimization.offload_optimizer.device": ("cpu", "none"),
    "zero_optimization.offload_param.device": ("cpu", "none"),
    "data_types.grad_accum_dtype": ("fp32", "bf16", "fp16"),
    "communication_data_type": ("fp32", "bf16", "fp16"),
    "zero_allow_untested_optimizer": (True,),
}


def _scale(config: RunConfig) -> LossScaleConfig | None:
    """Return the loss scale in force; None where nothing is scaled, and what the JSON says of it is without effect."""
    if config.precision != "fp16":
        return None
    return config.loss_scale or LossScaleConfig()


def _scale_key(name: str) -> Callable[[RunConfig], tuple[str, Any]]:
    def ours(config: RunConfig) -> tuple[str, Any]:
        scale = _scale(config)
        return f"loss_scale.{name}", None if scale is None else getattr(scale, name)

    return ours


def _scale_power(config: RunConfig) -> tuple[str, Any]:
    scale = _scale(config)
    return "log2(loss_scale.initial)", None if scale is None else scale.initial.bit_length() - 1


_AGREEMENTS: dict[str, Callable[[RunConfig], tuple[str, Any]]] = {
    "train_batch_size": lambda config: ("batch.global_batch_size", config.batch.global_batch_size),
    "train_micro_batch_size_per_gpu": lambda config: ("batch.micro_batch_size", config.batch.micro_batch_size),
    "gradient_clipping": lambda config: ("optim.max_grad_norm", config.optim.max_grad_norm),
    "fp16.enabled": lambda config: (f"precision = {config.precision}, fp16", config.precision == "fp16"),
    "bf16.enabled": lambda config: (f"precision = {config.precision}, bf16", config.precision == "bf16"),
    "fp16.initial_scale_power": _scale_power,
    "fp16.loss_scale_window": _scale_key("window"),
    "fp16.hysteresis": _scale_key("hysteresis"),
    "fp16.min_loss_scale": _scale_key("minimum"),
}
"""Keys that the run's config decides: the name and value there; value None where the key is without effect."""


def _check_agreement(keys: dict[str, Any], path: str, name: str, expected: Any) -> None:
    given = _get(keys, path)
    if given is None or given in (AUTO, expected):
        return
    raise ConfigError(
        f"contradicts {name} = {expected!r}",
        field=f"deepspeed.{path}",
        value=given,
        remedy='make them agree, or drop the DeepSpeed key (or set it to "auto")',
    )


def _get(keys: dict[str, Any], path: str) -> Any:
    value: Any = keys
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _zero_choice(keys: dict[str, Any]) -> ZeroChoice:
    return ZeroChoice(
        stage=int(_get(keys, "zero_optimization.stage") or 0),
        offload_optimizer=_get(keys, "zero_optimization.offload_optimizer.device") == "cpu",
        offload_param=_get(keys, "zero_optimization.offload_param.device") == "cpu",
        **{
            name: int(value)
            for name, key in (
                ("reduce_bucket", "reduce_bucket_size"),
                ("live_parameters", "stage3_max_live_parameters"),
            )
            if (value := _get(keys, f"zero_optimization.{key}")) is not None
        },
    )


def _precision_block(keys: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    scale = _scale(config)
    if scale is not None:
        ours = {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": scale.initial.bit_length() - 1,
            "loss_scale_window": scale.window,
            "hysteresis": scale.hysteresis,
            "min_loss_scale": scale.minimum,
        }
        return {"fp16": {**keys.get("fp16", {}), **ours}}
    if config.precision == "bf16":
        # Unless the file says otherwise, gradients of micro batches are summed in fp32: bf16 has 8 bits for the sum.
        return {
            "bf16": {**keys.get("bf16", {}), "enabled": True},
            "data_types": {"grad_accum_dtype": "fp32", **keys.get("data_types", {})},
        }
    return {}
