"""YAML and dotted overrides to a RunConfig, and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lmscale.config.base import Section, branches
from lmscale.config.checkpoint_paths import resolve_checkpoint, tokenizer_copy
from lmscale.config.objective import OBJECTIVES_OF
from lmscale.config.presets import with_defaults
from lmscale.config.run import RunConfig
from lmscale.config.validation import config_error, kind_key
from lmscale.errors import ConfigError


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML, lay the preset under it and the overrides over it, and validate the result.

    Precedence, weakest first: defaults, model.preset, the file, the overrides ("optim.lr=3e-4").

    Raises:
        ConfigError: if the file cannot be read, or a key is unknown, missing, of the wrong type or out of range.
    """
    return parse_run(_read_yaml(Path(path)), overrides)


def parse_run(keys: dict[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Do as `load_run` does, from a mapping in the place of a file."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        merged = OmegaConf.create(keys)
        for override in overrides:
            _apply(merged, override)
        resolved: Any = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).split("\n")[0], field="config") from None
    model = resolved.get("model")
    if isinstance(model, dict):
        _take_from_checkpoint(resolved, model)
        resolved["model"] = with_defaults(resolved["model"])
        resolved["objective"] = _objective(resolved.get("objective"), resolved["model"])
    try:
        return RunConfig.model_validate(resolved)
    except ValidationError as error:
        raise config_error(error, RunConfig) from None


def _take_from_checkpoint(resolved: dict[str, Any], model: dict[str, Any]) -> None:
    """Where model names no size of its own, lay that of init_from's config under it, and its tokenizer under the run's."""
    source = model.get("init_from")
    if not isinstance(source, str) or {"preset", "num_layers", "hidden_size"} & model.keys():
        return
    checkpoint = resolve_checkpoint(Path(source))
    there = _read_yaml(checkpoint / "config.yaml")
    resolved["model"] = {**there["model"], "preset": None, **model}
    if resolved.get("tokenizer") is None and there.get("tokenizer") is not None:
        resolved["tokenizer"] = {
            **there["tokenizer"],
            "path": str(tokenizer_copy(checkpoint, there["tokenizer"]["path"])),
        }


def _objective(given: Any, model: dict[str, Any]) -> Any:
    """Name the architecture's objective where the config names none."""
    if given is not None and not isinstance(given, dict):
        return given
    name = OBJECTIVES_OF.get(str(model.get("architecture", "gpt")), ("causal_lm",))[0]
    return {"name": name, **(given or {})}


def show(config: Section) -> str:
    """Render a config as YAML that `load_run` reads back to the same config."""
    import yaml

    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)


def documentation(section: type[Section] = RunConfig, prefix: str = "") -> Iterable[tuple[str, str, str, str]]:
    """Yield (dotted key, type, default, documentation) for every key of a config."""
    from pydantic_core import PydanticUndefined

    for name, field in section.model_fields.items():
        nested = [b for b in branches(field.annotation) if isinstance(b, type) and issubclass(b, Section)]
        key = prefix + name
        if nested:
            yield key, "section" if "list" not in str(field.annotation) else "list", "", _one_line(field.description)
            separator = "[]." if "list" in str(field.annotation) else "."
            for branch in nested:
                kind = f"{branch.model_fields[kind_key(branch)].default}. " if len(nested) > 1 else ""
                for row in documentation(branch, key + separator):
                    yield *row[:3], kind + row[3]
            continue
        default = "required" if field.default is PydanticUndefined else repr(field.default)
        yield key, _type_name(field.annotation), default, _one_line(field.description)


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _type_name(annotation: Any) -> str:
    import typing

    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(str(value) for value in typing.get_args(annotation))
    if isinstance(annotation, type):
        return annotation.__name__
    return str(annotation).replace("typing.", "")


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml
    from omegaconf import OmegaConf

    try:
        keys = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError:
        raise ConfigError("does not exist", field="config", value=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", field="config", value=str(path)) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"is not YAML: {error}", field="config", value=str(path)) from None
    if not isinstance(keys, dict):
        raise ConfigError("must hold a mapping of keys", field="config", value=str(path))
    return {str(key): value for key, value in keys.items()}


def _apply(config: Any, override: str) -> None:
    """Lay "a.b=value" over a config; the value is YAML, a list's entries are named by number (data.train.0.prefix)."""
    import yaml
    from omegaconf import OmegaConf

    key, equals, text = override.partition("=")
    if not equals or not key or key.startswith("-"):
        raise ConfigError("is neither an option nor key=value", field="command line", value=override)
    try:
        # OmegaConf's own reader knows 1e-4, which YAML 1.1 takes for a string.
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except yaml.YAMLError:
        raise ConfigError("the value is not YAML", field="command line", value=override) from None
    try:
        OmegaConf.update(config, key, parsed["value"], merge=True, force_add=True)
    except (TypeError, ValueError, IndexError, AttributeError):
        raise ConfigError("does not fit the config that it overrides", field="command line", value=override) from None
