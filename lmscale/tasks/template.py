"""Texts with places for columns."""

from __future__ import annotations

import string
from collections.abc import Callable

from lmscale.errors import ConfigError


class Template:
    """A text with {column} where the value of a column goes; {{ and }} are braces.

    Args:
        text: the template.
        field: the key that it is of, for messages.

    Raises:
        ConfigError: if it is not a template.
    """

    def __init__(self, text: str, field: str):
        self.text, self.field = text, field
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ConfigError(
                f"is no template: {error}", field=field, value=text, remedy="write {{ for a brace"
            ) from None
        for _, column, form, conversion in parts:
            if column == "" or form or conversion:
                raise ConfigError("a place holds the name of a column, and nothing else", field=field, value=text)
        self._parts = [(literal, column) for literal, column, _, _ in parts]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns, in order."""
        return tuple(column for _, column in self._parts if column is not None)

    @property
    def tail(self) -> str:
        """What stands behind the last column."""
        last = max((number for number, (_, column) in enumerate(self._parts) if column is not None), default=-1)
        return "".join(literal for literal, _ in self._parts[last + 1 :])

    def fill(self, value_of: Callable[[str], str]) -> str:
        """Put values in their places."""
        return "".join(literal + ("" if column is None else value_of(column)) for literal, column in self._parts)

    def around(self) -> tuple[str, str]:
        """Return what stands before and behind the only column."""
        before = ""
        for number, (literal, column) in enumerate(self._parts):
            before += literal
            if column is not None:
                return before, "".join(rest for rest, _ in self._parts[number + 1 :])
        return before, ""

    def check_columns(self, columns: tuple[str, ...]) -> None:
        """Check that it has places for just these columns.

        Raises:
            ConfigError: if it has not.
        """
        if self.columns != columns:
            places = " and ".join(f"{{{column}}}" for column in columns)
            raise ConfigError(f"must have one place, {places}", field=self.field, value=self.text)
