"""The errors that lmscale raises on purpose.

Each carries one line for the user (field, value, rule, remedy) and the exit status that the commands return for it.
Anything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

from typing import Any

EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED_AND_SAVED = 75
EXIT_HANG = 76
EXIT_BUDGET = 77

_ABSENT = object()


class LmscaleError(Exception):
    """Report a condition that the user can act on, in one line.

    Args:
        rule: what has to hold and does not, as a clause ("must divide model.num_attention_heads = 16").
        field: the dotted config key, the file or the option concerned.
        value: what was found there.
        remedy: what to do about it, as a clause.
    """

    exit_status = EXIT_FAILURE

    def __init__(self, rule: str, *, field: str | None = None, value: Any = _ABSENT, remedy: str | None = None):
        self.rule, self.field, self.remedy = rule, field, remedy
        self.value = None if value is _ABSENT else value
        line = rule
        if field is not None:
            line = f"{field}: {rule}" if value is _ABSENT else f"{field} = {value!r}: {rule}"
        if remedy:
            line += f"; {remedy}"
        super().__init__(line.replace("\n", " "))

    def __reduce__(self) -> tuple[Any, ...]:
        """Carry the error whole to another process: by default its finished line would become the rule."""
        return _restore, (type(self), self.__dict__, self.args)


def _restore(kind: type[LmscaleError], state: dict[str, Any], line: tuple[str]) -> LmscaleError:
    error = kind.__new__(kind, *line)
    error.__dict__.update(state)
    return error


class ConfigError(LmscaleError):
    """The configuration is wrong, alone or against the machine."""

    exit_status = EXIT_BAD_INPUT


class DataError(LmscaleError):
    """A corpus, a tokenizer or an indexed data set cannot be used."""

    exit_status = EXIT_BAD_INPUT


class CheckpointError(LmscaleError):
    """A checkpoint is missing, torn, foreign or of another model."""

    exit_status = EXIT_BAD_INPUT


class ConversionError(LmscaleError):
    """A model of another library cannot be mapped to or from ours."""

    exit_status = EXIT_BAD_INPUT


class OutputError(LmscaleError):
    """What was to be written cannot be: the disk is full, or the place that the user named cannot be written."""

    exit_status = EXIT_BAD_INPUT


class RunError(LmscaleError):
    """A run cannot go on, though its input was right: a loss scale at its minimum, a process that died."""


class HangError(RunError):
    """A run has made no progress for longer than it may."""

    exit_status = EXIT_HANG


class FaultError(RunError):
    """The fault policy ends a run: it says so, or its budget is spent, or there is no checkpoint to go back to."""

    exit_status = EXIT_BUDGET
