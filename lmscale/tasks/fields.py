"""Values of an example's columns, each of the kind that is asked for or refused with file and line."""

from __future__ import annotations

import json
import math
from typing import Any

from lmscale.errors import DataError
from lmscale.tasks.files import Example

Answer = tuple[str, int]
"""Its text, and where it begins in the context, in characters."""


def value_of(example: Example, column: str) -> Any:
    """Return a column's value.

    Raises:
        DataError: if there is no such column; the message names those there are.
    """
    if column not in example.columns:
        raise DataError(
            f"has no column {column!r}",
            field=example.place,
            remedy="it has " + ", ".join(sorted(example.columns)) + "; name the column in task.columns",
        )
    return example.columns[column]


def _wrong(example: Example, column: str, rule: str) -> DataError:
    return DataError(f"column {column!r} {rule}", field=example.place)


def as_text(value: Any) -> str | None:
    """Write a string, number or truth value as text; None of anything else."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, str | int | float) else None


def text_of(example: Example, column: str) -> str:
    """Return a text that is not empty.

    Raises:
        DataError: if it is, or is no text.
    """
    text = as_text(value_of(example, column))
    if text is None:
        raise _wrong(example, column, "is no text")
    if not text.strip():
        raise _wrong(example, column, "is empty")
    return text


def number_of(example: Example, column: str) -> float:
    """Return a finite number.

    Raises:
        DataError: if it is none.
    """
    text = text_of(example, column)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise _wrong(example, column, f"is no number: {text[:40]!r}")
    return number


def texts_of(example: Example, column: str) -> list[str]:
    """Return one text or several, none of them empty.

    Raises:
        DataError: if there is none, or one is empty.
    """
    value = value_of(example, column)
    if not isinstance(value, list):
        return [text_of(example, column)]
    texts = [as_text(each) for each in value]
    if not texts or any(text is None or not text.strip() for text in texts):
        raise _wrong(example, column, "is empty, or holds what is empty or no text")
    return [text for text in texts if text is not None]


def words_of(example: Example, column: str) -> list[str]:
    """Return a list of words: of JSON, or, in a table, JSON or words between spaces.

    Raises:
        DataError: if it is empty, or a word is.
    """
    value = _parsed(value_of(example, column))
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list):
        raise _wrong(example, column, "is no list")
    texts = [as_text(word) for word in words]
    if not texts or any(text is None or not text.strip() for text in texts):
        raise _wrong(example, column, "is empty, or holds an empty word")
    return [text for text in texts if text is not None]


def answers_of(example: Example, column: str, context: str) -> list[Answer]:
    """Return answers and their places; none where the question has no answer.

    Raises:
        DataError: if they are not in SQuAD's form, or a text does not stand in the context where it should begin.
    """
    value = _parsed(value_of(example, column))
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        is_sound = isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)
        pairs = list(zip(texts, starts, strict=True)) if is_sound else None  # type: ignore[arg-type]
    elif isinstance(value, list) and all(isinstance(each, dict) for each in value):
        pairs = [(each.get("text"), each.get("answer_start")) for each in value]
    else:
        pairs = None
    if pairs is None or any(not isinstance(text, str) or type(start) is not int for text, start in pairs):
        raise _wrong(example, column, "is not {text: [...], answer_start: [...]}")
    for text, start in pairs:
        if not text.strip():
            raise _wrong(example, column, "holds an empty answer")
        there = context[start : start + len(text)] if start >= 0 else ""
        if there != text:
            raise _wrong(example, column, f"says that {text[:40]!r} begins at {start}, where there is {there[:40]!r}")
    return pairs


def _parsed(value: Any) -> Any:
    """Read what a table writes as JSON."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value
