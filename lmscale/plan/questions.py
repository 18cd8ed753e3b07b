"""What is asked of the planner beside the ranking: a run of a preset's name, fewest devices, largest model, a config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmscale.config.check import check_run, dp_size_of
from lmscale.config.deepspeed_json import check_deepspeed, load_deepspeed, resolve_deepspeed
from lmscale.config.io import load_run, parse_run
from lmscale.config.model import ModelConfig
from lmscale.config.presets import PRESETS, preset
from lmscale.config.run import RunConfig
from lmscale.errors import ConfigError
from lmscale.plan.device_types import DeviceType
from lmscale.plan.groups import check_groups
from lmscale.plan.params import num_parameters
from lmscale.plan.search import PlanRow, Search, no_layout, search

MOST_DEVICES = 1_000_000
MOST_FEWEST = 16_384
RECIPES = Path(__file__).resolve().parents[2] / "launch" / "runs"
HEAD_SIZE = 128
WIDTH_STEP = 1024
WIDEST = 65_536


def base_run(name: str, device: DeviceType, overrides: Sequence[str] = ()) -> RunConfig:
    """Load the run to plan for: a file, the recipe of a preset's name, or GPT-3's settings around the preset.

    A preset is taken in the first of bf16, fp16 and fp32 that the device computes in; the precision of a file stays, and
    so does one that is given.

    Raises:
        ConfigError: if there is neither such a file nor such a preset (the nearest is named), or the run is wrong.
    """
    config = _load(name, device, overrides)
    check_groups(config.model, config.optim)
    return config


def _load(name: str, device: DeviceType, overrides: Sequence[str]) -> RunConfig:
    if name.endswith((".yaml", ".yml")) or Path(name).is_file():
        return load_run(name, overrides)
    preset(name)
    recipe = next((path for path in _recipes(name) if path.is_file()), None)
    config = load_run(recipe, overrides) if recipe else parse_run(_default_keys(name), overrides)
    if recipe and isinstance(config.deepspeed, str) and not Path(config.deepspeed).is_file():
        # A recipe names files from the directory that holds launch/.
        config = config.model_copy(update={"deepspeed": str(RECIPES.parents[1] / config.deepspeed)})
    is_given = any(override.startswith("precision=") for override in overrides)
    if is_given or config.precision in device.flops_per_second:
        return config
    precision = next(kind for kind in ("bf16", "fp16", "fp32") if kind in device.flops_per_second)
    return config.model_copy(update={"precision": precision, "loss_scale": None})


def _recipes(name: str) -> list[Path]:
    return [RECIPES / f"{name}{ending}.yaml" for ending in ("-modern", "", "-128")]


def _default_keys(name: str) -> dict[str, Any]:
    return {
        "model": {"preset": name},
        "tokenizer": {"path": "tokenizer"},
        "data": {"train": [{"prefix": "data/corpus"}], "seq_length": min(2048, _positions(name))},
        "precision": "bf16",
        "batch": {"micro_batch_size": 1, "global_batch_size": 512},
        "optim": {"lr": 1.0e-4},
        "train": {"train_tokens": 300_000_000_000},
        "output_dir": f"runs/{name}",
    }


def _positions(name: str) -> int:
    return int(PRESETS[name].get("max_position_embeddings", 512))


def check_devices(number: int) -> None:
    """Refuse numbers of devices that nobody has.

    Raises:
        ConfigError: below 1, or above a million.
    """
    if not 1 <= number <= MOST_DEVICES:
        raise ConfigError(f"must be between 1 and {MOST_DEVICES:,}", field="--devices", value=number)


def fewest_devices(config: RunConfig, device: DeviceType) -> tuple[int, Search]:
    """Find the smallest number of devices on which a run fits, of powers of two and the eighths between two of them.

    More than a node has are whole nodes.

    Raises:
        ConfigError: if it fits on none up to 16,384; the reason is that of the last.
    """
    number = 1
    while not (found := search(config, number, device, stop_at_first=True)).rows:
        if number >= MOST_FEWEST:
            raise no_layout(found, number, device)
        number *= 2
    for fewer in _between(number // 2, number, device.devices_per_node):
        if search(config, fewer, device, stop_at_first=True).rows:
            number = fewer
            break
    return number, search(config, number, device)


def _between(low: int, high: int, devices_per_node: int) -> list[int]:
    """List the eighths of `high` between two powers of two, ascending, those above a node that are whole nodes."""
    numbers = range(low + 1, high) if high < 8 else range(low + high // 8, high, high // 8)
    return [number for number in numbers if number < devices_per_node or number % devices_per_node == 0]


def largest_preset(config: RunConfig, num_devices: int, device: DeviceType) -> tuple[str, Search] | None:
    """Find the published model of the run's architecture with most parameters that fits, in the run's place."""
    architecture = config.model.architecture
    models = {
        name: parse_run({**_default_keys(name), "objective": config.objective.model_dump()}).model
        for name, keys in PRESETS.items()
        if keys["architecture"] == architecture
    }
    for name in sorted(models, key=lambda name: num_parameters(models[name]), reverse=True):
        found = _search_model(config, models[name], num_devices, device)
        if found.rows:
            return name, found
    return None


def largest_model(config: RunConfig, num_devices: int, device: DeviceType) -> tuple[ModelConfig, Search] | None:
    """Find the widest model of GPT-3 175B's proportions that fits: heads of 128, a layer for each 128 of width.

    Widths are multiples of 1,024, so that layers divide over stages; all else is the run's. Only for gpt. Whether a width
    is legal on the devices does not depend on its size alone, so every width is tried, from the top of what could fit: no
    layout takes less than 2 bytes a parameter.
    """
    room = num_devices * (device.memory_bytes + device.host_memory_bytes)
    for number in range(WIDEST // WIDTH_STEP, 0, -1):
        model = _proportioned(config.model, number * WIDTH_STEP)
        if 2 * num_parameters(model) > room:
            continue
        found = _search_model(config, model, num_devices, device)
        if found.rows:
            return model, found
    return None


def _proportioned(model: ModelConfig, width: int) -> ModelConfig:
    return model.model_copy(
        update={
            "preset": None,
            "hidden_size": width,
            "num_layers": width // HEAD_SIZE,
            "num_attention_heads": width // HEAD_SIZE,
            "num_query_groups": None,
            "head_dim": None,
            "ffn_hidden_size": None,
        }
    )


def _search_model(config: RunConfig, model: ModelConfig, num_devices: int, device: DeviceType) -> Search:
    return search(config.model_copy(update={"model": model}), num_devices, device, stop_at_first=True)


def written_run(config: RunConfig, row: PlanRow) -> RunConfig:
    """Return the run on a row's layout, DeepSpeed's keys in it, checked as `lmscale train` checks it.

    Raises:
        ConfigError: if a rule refuses it.
    """
    step, zero = row.candidate.step, row.candidate.zero
    host = {"device": "cpu", "pin_memory": True}
    keys = load_deepspeed(config.deepspeed)
    zero_keys = keys["zero_optimization"] = {**keys.get("zero_optimization", {}), "stage": zero.stage}
    for name, is_offloaded in (("offload_optimizer", zero.offload_optimizer), ("offload_param", zero.offload_param)):
        if is_offloaded:
            zero_keys[name] = {**host, **zero_keys.get(name, {}), "device": "cpu"}
        else:
            zero_keys.pop(name, None)
    if config.precision == "bf16":
        keys.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    parallel = {
        "tp_size": step.tp_size,
        "pp_size": step.pp_size,
        "sequence_parallel": step.sequence_parallel,
        "recompute": step.recompute,
    }
    changed = config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=parallel),
            "batch": config.batch.model_copy(update={"micro_batch_size": step.micro_batch_size}),
            "deepspeed": keys,
        }
    )
    num_devices = step.tp_size * step.pp_size * row.candidate.dp_size
    check_run(changed, check_deepspeed(keys, changed), num_devices, elsewhere=True)
    resolve_deepspeed(keys, changed, dp_size_of(changed, num_devices))
    return changed
