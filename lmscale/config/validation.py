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
    field = prefix + ".".join(str(part) for part in path)
    if finding["type"] == "extra_forbidden":
        return ConfigError("unknown key", field=field, remedy=nearest(str(path[-1]), _fields_at(model, path[:-1])))
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


def _fields_at(model: type[BaseModel], path: list[Any]) -> list[str]:
    for part in path:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        model = next(
            branch for branch in branches(annotation) if isinstance(branch, type) and issubclass(branch, BaseModel)
        )
    return list(model.model_fields)
