"""What every section of a run's config has in common."""

from __future__ import annotations

import types
import typing
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """A frozen, strict group of keys: an unknown key is an error, and each key carries its documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _switches_are_not_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `micro_batch_size: yes`, which pydantic reads as 1."""
        if isinstance(value, bool) and bool not in branches(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("true and false are not values of this key")
        return value


def branches(annotation: Any) -> list[Any]:
    """List the members of a union, list or Annotated annotation, nested ones included."""
    if typing.get_origin(annotation) is typing.Annotated:
        return branches(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list):
        return [branch for arg in typing.get_args(annotation) for branch in branches(arg)]
    return [annotation]
