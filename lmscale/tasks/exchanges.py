"""Examples as text to read and text to write: by templates, label words, or the turns of a conversation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lmscale.config.task import TaskConfig, label_name
from lmscale.errors import ConfigError, DataError
from lmscale.tasks.fields import as_text, number_of, text_of, value_of
from lmscale.tasks.files import Example
from lmscale.tasks.items import Names, label_of, read_question, targets_of
from lmscale.tasks.labels import Labels
from lmscale.tasks.template import Template

ROLES = {"system": "{content}\n", "user": "User: {content}\n", "assistant": "Assistant: {content}"}
LEARNED_ROLE = "assistant"
NO_ANSWER = "unanswerable"
"""What is written where a question has no answer."""


@dataclass(frozen=True)
class Exchange:
    """What is read, and what is to be written behind it.

    Attributes:
        place: file and line.
        segments: text, and whether it is learned; the last one is. Neighbours differ, or both are learned.
        references: what counts as right, for the last one; none where labels are compared.
        tail: how the text that is read ends, which stays where it is too long.
        label: the number of the class; -1 where there are none.
    """

    place: str
    segments: tuple[tuple[str, bool], ...]
    references: list[str]
    tail: str = ""
    label: int = -1


class Writer:
    """Makes exchanges of examples.

    Args:
        task: the section.
        architecture: gpt, t5 or bart.
        labels: the classes of a classification.

    Raises:
        ConfigError: if a template is none, or reads what is to be written.
    """

    def __init__(self, task: TaskConfig, architecture: str, labels: Labels | None):
        self._task, self._labels = task, labels
        self._names = Names.of(task.columns)
        kind = task.kind
        self._target_column = {"classification": self._names.label, "extractive_qa": self._names.answers}.get(
            kind, self._names.target
        )
        self.words = (
            ()
            if labels is None
            else labels.words({label_name(label): word for label, word in (task.label_words or {}).items()})
        )
        self.roles = {
            role: Template(text, f"task.roles.{role}") for role, text in {**ROLES, **(task.roles or {})}.items()
        }
        for template in self.roles.values():
            template.check_columns(("content",))
        self._template = Template(task.template or self._default(architecture), "task.template")
        behind_space = "" if architecture != "gpt" else " "
        default = f"{behind_space}{{{self._target_column}}}"
        self._target = Template(task.target_template or default, "task.target_template")
        if self._target_column in self._template.columns:
            raise ConfigError(
                "reads the column that is to be written",
                field="task.template",
                value=task.template,
                remedy="leave it out",
            )
        self._target.check_columns((self._target_column,))

    def _default(self, architecture: str) -> str:
        names = self._names
        read = {"extractive_qa": (names.question, names.context)}.get(self._task.kind, (names.text, names.pair))
        columns = [column for column in read if column is not None]
        named = len(columns) > 1 or architecture == "gpt"
        text = " ".join(f"{_escaped(column)}: {{{column}}}" if named else f"{{{column}}}" for column in columns)
        return text + (f" {_escaped(self._target_column)}:" if architecture == "gpt" else "")

    def target(self, text: str) -> str:
        """Write what is to be learned of a class's word, a number or a text."""
        return self._target.fill(lambda column: text)

    def unwrapped(self, text: str) -> str:
        """Take what was written out of the template of what is learned."""
        if self._task.columns.messages is not None:
            before, behind = self.roles[LEARNED_ROLE].around()
            before = ""  # it is part of what is read
        else:
            before, behind = self._target.around()
        return text.strip().removeprefix(before.strip()).removesuffix(behind.strip()).strip()

    def read(self, example: Example) -> Exchange:
        """Read an example.

        Raises:
            DataError: if a column is missing, empty or wrong.
            ConfigError: if a template names a column that is not there.
        """
        if self._task.columns.messages is not None:
            return self._conversation(example, self._task.columns.messages)
        target, references, label = _TARGETS[self._task.kind](self, example)
        text = self._template.fill(lambda column: self._place(example, column))
        if not text.strip():
            raise DataError("gives an empty input", field=example.place, remedy="put a column into task.template")
        segments = ((text, False), (self.target(target), True))
        return Exchange(example.place, segments, references, self._template.tail, label)

    def _place(self, example: Example, column: str) -> str:
        if column not in example.columns and self._task.template is not None:
            raise ConfigError(
                f"names a column {column!r} that {example.place} does not have",
                field="task.template",
                value=self._task.template,
                remedy="it has " + ", ".join(sorted(example.columns)),
            )
        return text_of(example, column)

    def _classified(self, example: Example) -> tuple[str, list[str], int]:
        assert self._labels is not None
        number = self._labels.number(label_of(example, self._names.label), example.place)
        return self.words[number], [], number

    def _number(self, example: Example) -> tuple[str, list[str], int]:
        number_of(example, self._names.target)
        text = text_of(example, self._names.target).strip()
        return text, [text], -1

    def _answer(self, example: Example) -> tuple[str, list[str], int]:
        answers = [text for text, _ in read_question(example, self._names).answers]
        return (answers[0] if answers else NO_ANSWER), answers or [""], -1

    def _written(self, example: Example) -> tuple[str, list[str], int]:
        texts = targets_of(example, self._names)
        return texts[0], texts, -1

    def _conversation(self, example: Example, column: str) -> Exchange:
        """Join the turns up to the last one of the assistant; what stands before its words is read, not learned."""
        turns = [self._turn(example, column, turn) for turn in _turns(example, column)]
        while turns and turns[-1][0] != LEARNED_ROLE:
            turns.pop()
        if not turns:
            raise DataError(f"column {column!r} has no turn of the {LEARNED_ROLE}", field=example.place)
        segments: list[tuple[str, bool]] = []
        read = ""
        for role, content in turns:
            before, behind = self.roles[role].around()
            if role != LEARNED_ROLE:
                read += before + content + behind
                continue
            if read + before:
                segments.append((read + before, False))
            segments.append((content + behind, True))
            read = ""
        if segments[0][1]:
            raise DataError(f"column {column!r} begins with what is to be written", field=example.place)
        return Exchange(example.place, tuple(segments), [turns[-1][1]])

    def _turn(self, example: Example, column: str, turn: Any) -> tuple[str, str]:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise DataError(f"column {column!r} holds a turn that is not {{role, content}}", field=example.place)
        role, content = turn["role"], as_text(turn.get("content"))
        if role not in self.roles:
            raise DataError(
                f"column {column!r} has a turn of role {role!r}, which has no template",
                field=example.place,
                remedy="add it to task.roles",
            )
        if content is None or not content.strip():
            raise DataError(f"column {column!r} has an empty turn of role {role!r}", field=example.place)
        return role, content


def _turns(example: Example, column: str) -> list[Any]:
    turns = value_of(example, column)
    if not isinstance(turns, list) or not turns:
        raise DataError(f"column {column!r} is no list of turns, or empty", field=example.place)
    return turns


def _escaped(name: str) -> str:
    return name.replace("{", "{{").replace("}", "}}")


_TARGETS: dict[str, Callable[[Writer, Example], tuple[str, list[str], int]]] = {
    "classification": Writer._classified,
    "regression": Writer._number,
    "extractive_qa": Writer._answer,
    "generation": Writer._written,
}
"""What is to be written, what counts as right, the number of the class."""
