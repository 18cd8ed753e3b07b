"""Their config.json: read with care, so that nothing that changes the arithmetic is passed over."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmscale.config.model import ModelConfig
from lmscale.errors import ConversionError

FILE = "config.json"
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}
"""Their names of activations and ours; of several that compute the same, we write the first."""
_ABSENT = object()


class HfConfig:
    """The keys of a config.json.

    Raises:
        ConversionError: if the file is missing or no JSON object.
    """

    def __init__(self, keys: Mapping[str, Any]):
        self.keys = dict(keys)

    @classmethod
    def read(cls, directory: Path) -> HfConfig:
        """Read a directory's config.json."""
        return cls(read_json(directory / FILE))

    def get(self, key: str, default: Any = _ABSENT) -> Any:
        """Return a key's value; without a default the key must be there."""
        value = self.keys.get(key, default)
        if value is _ABSENT:
            raise ConversionError("is missing", field=f"{FILE}: {key}")
        return value

    def integer(self, key: str, default: Any = _ABSENT) -> int:
        """Return a whole number."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(key, "must be a whole number")
        return value

    def only(self, key: str, *allowed: Any, default: Any = _ABSENT, rule: str = "") -> Any:
        """Return a key's value, which must be one of those that our models know."""
        value = self.get(key, allowed[0] if default is _ABSENT else default)
        if value not in allowed:
            raise self.wrong(key, rule or f"must be {' or '.join(repr(one) for one in allowed)} in a model of lmscale")
        return value

    def same(self, key: str, *others: str) -> Any:
        """Return a key's value, which the others must share: our models have one key for all of them."""
        value = self.get(key)
        for other in others:
            if self.get(other, value) != value:
                raise self.wrong(other, f"must equal {key} = {value!r} in a model of lmscale")
        return value

    def activation(self, key: str, default: str) -> str:
        """Return our name of an activation."""
        return ACTIVATIONS[self.only(key, *ACTIVATIONS, default=default)]

    def wrong(self, key: str, rule: str) -> ConversionError:
        """Make the error of a key's value."""
        return ConversionError(rule, field=f"{FILE}: {key}", value=self.keys.get(key))


def their_activation(model: ModelConfig, known: Mapping[str, str] = ACTIVATIONS) -> str:
    """Return their name of a model's activation.

    Raises:
        ConversionError: if the architecture has none such.
    """
    for theirs, ours in known.items():
        if ours == model.activation:
            return theirs
    raise ConversionError(
        f"their {model.architecture} has no such activation", field="model.activation", value=model.activation
    )


def read_json(file: Path) -> dict[str, Any]:
    """Read a file of theirs that holds a JSON object.

    Raises:
        ConversionError: if it is missing or holds something else.
    """
    try:
        keys = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError("is missing", field=str(file)) from None
    except (OSError, ValueError) as error:
        raise ConversionError(f"cannot be read: {error}", field=str(file)) from None
    if not isinstance(keys, dict):
        raise ConversionError("must hold a JSON object", field=str(file))
    return keys
