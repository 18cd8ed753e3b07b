"""Examples as each kind of task reads them: typed, checked, and not yet tokens."""

from __future__ import annotations

from dataclasses import dataclass

from lmscale.config.task import TaskColumns
from lmscale.errors import DataError
from lmscale.tasks.fields import Answer, answers_of, as_text, number_of, text_of, texts_of, value_of, words_of
from lmscale.tasks.files import Example
from lmscale.tasks.labels import Labels


@dataclass(frozen=True)
class Sentence:
    """A text, or a pair of them, and its class or number. `gold` is a number of a class for classification."""

    place: str
    first: str
    second: str | None
    gold: float


@dataclass(frozen=True)
class Words:
    """Words and the number of the class of each."""

    place: str
    words: list[str]
    tags: list[int]


@dataclass(frozen=True)
class Question:
    """A question, and the places of its answers in a context."""

    place: str
    question: str
    context: str
    answers: list[Answer]


@dataclass(frozen=True)
class Names:
    """The columns of a task, by their names in its files."""

    text: str
    pair: str | None
    label: str
    target: str
    tokens: str
    tags: str
    question: str
    context: str
    answers: str

    @staticmethod
    def of(columns: TaskColumns) -> Names:
        """Fill in the names that are left out."""
        keys = ("text", "label", "target", "tokens", "tags", "question", "context", "answers")
        return Names(pair=columns.pair, **{key: getattr(columns, key) or key for key in keys})


def label_of(example: Example, column: str) -> str:
    """Return a class as text.

    Raises:
        DataError: if the column is not there, or empty.
    """
    text = as_text(value_of(example, column))
    if text is None or not text.strip():
        raise DataError(f"column {column!r} is empty or no label", field=example.place)
    return text


def read_sentence(example: Example, names: Names, labels: Labels | None) -> Sentence:
    """Read an example of classification, or, without labels, of regression.

    Raises:
        DataError: if a column is missing or empty, or the class is not known.
    """
    second = None if names.pair is None else text_of(example, names.pair)
    if labels is None:
        gold = number_of(example, names.target)
    else:
        gold = float(labels.number(label_of(example, names.label), example.place))
    return Sentence(example.place, text_of(example, names.text), second, gold)


def read_words(example: Example, names: Names, labels: Labels) -> Words:
    """Read an example of token classification.

    Raises:
        DataError: if a column is missing or empty, words and tags are not as many, or a class is not known.
    """
    words, tags = words_of(example, names.tokens), words_of(example, names.tags)
    if len(words) != len(tags):
        raise DataError(f"has {len(words)} {names.tokens} and {len(tags)} {names.tags}", field=example.place)
    return Words(example.place, words, [labels.number(tag, example.place) for tag in tags])


def read_question(example: Example, names: Names) -> Question:
    """Read an example of extractive question answering.

    Raises:
        DataError: if a column is missing or empty, or an answer is not where it is said to be.
    """
    question, context = text_of(example, names.question), text_of(example, names.context)
    return Question(example.place, question, context, answers_of(example, names.answers, context))


def targets_of(example: Example, names: Names) -> list[str]:
    """Return the texts of generation that count as right."""
    return texts_of(example, names.target)
