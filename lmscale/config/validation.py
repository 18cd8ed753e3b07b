"""Turn what pydantic found wrong into the one line that a user can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from lmscale.config.base import branches
from lmscale.errors import ConfigError


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Suggest the candidate that a misspelt name most likely means, or list them all."""
    names = sorted(candidates)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "one of " + ", ".join(names)


def config_error(error: ValidationError, model: type[BaseModel], prefix: str = "") -> ConfigError:
    """Make a ConfigError of a pydantic ValidationError: of its first unknown key, or else of its first finding.

    A misspelt key that is required shows up as missing too; the misspelling is the news.
    """
    findings = error.errors()
    finding = next((finding for finding in findings if finding["type"] == "extra_forbidden"), findings[0])
    path = [part for part in finding["loc"] if not _is_union_tag(part)]
    if finding["type"].startswith("union_tag"):
        names = [name.strip().strip("'") for name in str(finding["ctx"].get("expected_tags", "")).split(",")]
        value = finding["ctx"].get("tag")
        key = "method" if path[-1] == "adapt" else "name"
        return ConfigError(
            "is not one of its kinds",
            field=prefix + f"{path[-1]}.{key}",
            value=value,
            remedy=nearest(str(value), names),
        )
    shown, section = _walk(model, path)
    field = prefix + ".".join(shown)
    if finding["type"] == "extra_forbidden":
        return ConfigError("unknown key", field=field, remedy=nearest(shown[-1], section.model_fields))
    if finding["type"] == "missing":
        return ConfigError("is required and missing", field=field, remedy="add it to the config or as key=value")
    if finding["type"] in {"model_type", "dict_type"}:
        return ConfigError("must be a section with keys of its own", field=field, value=finding["input"])
    rule = finding["msg"].removeprefix("Value error, ")
    rule = rule[:1].lower() + rule[1:]
    return ConfigError(rule, field=field, value=finding["input"])


def _is_union_tag(part: int | str) -> bool:
    """Pydantic names the branch of a union in a finding's path; users do not write it."""
    return isinstance(part, str) and (part in {"str", "int", "float"} or "[" in part)


def _walk(model: type[BaseModel], path: list[Any]) -> tuple[list[str], type[BaseModel]]:
    """Follow a finding's path to the section that it ends in; return the path as users write it, and that section.

    Where a section is of one of several kinds, pydantic's path names the kind too.
    """
    shown: list[str] = []
    kinds: dict[str, type[BaseModel]] = {}
    for part in path:
        if part in kinds and len(kinds) > 1:
            model, kinds = kinds[part], {}
            continue
        shown.append(str(part))
        if part not in model.model_fields:
            continue
        sections = [
            branch
            for branch in branches(model.model_fields[part].annotation)
            if isinstance(branch, type) and issubclass(branch, BaseModel)
        ]
        kinds = (
            {str(section.model_fields[kind_key(section)].default): section for section in sections}
            if len(sections) > 1
            else {}
        )
        model = sections[0] if sections else model
    return shown, model


def kind_key(section: type[BaseModel]) -> str:
    """Return the key by which a section of one of several kinds tells which it is."""
    return "method" if "method" in section.model_fields else "name"


def check_divides(field: str, value: int, divisor: int, divisor_name: str) -> None:
    """Check that a value is a multiple of another.

    Raises:
        ConfigError: naming the nearest multiples.
    """
    if value % divisor:
        lower = value // divisor * divisor
        nearest = f"{lower} or {lower + divisor}" if lower else str(divisor)
        raise ConfigError(f"must be a multiple of {divisor_name}", field=field, value=value, remedy=f"use {nearest}")
