"""Rows of extractive question answering: the question, and a window of its context.

Shapes: n rows, s places of a row, u units of a context, p pieces of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmscale.batch import LABELS, LOSS_MASK
from lmscale.config.task import MAX_ANSWER_TOKENS, TaskConfig
from lmscale.data.tokenizer import Tokenizer
from lmscale.errors import ConfigError, DataError
from lmscale.tasks.base import Arrays
from lmscale.tasks.head_rows import Frame, encode_words, encoded
from lmscale.tasks.items import Question
from lmscale.tasks.texts import Ints, Texts

_UNIT = re.compile(r"\w+|[^\w\s]")
"""What answers begin and end with: words, and signs on their own."""


@dataclass(frozen=True)
class Context:
    """A context in pieces, each with the characters of the unit that it is of.

    Attributes:
        pieces: token ids.
        begins, ends: int64 [p], characters of the unit of each piece.
        first, last: pieces of the learned answer; -1 where there is none.
    """

    pieces: list[int]
    begins: Ints
    ends: Ints
    first: int
    last: int


class SpanRows:
    """Windows over contexts, each behind its question.

    A window holds as many pieces as fit, and begins `step` pieces behind the one before; the last one reaches the end. The
    answer of a window is that of its example where it holds all of it, else place 0, the first token of the row. A
    question takes half of the places at most.

    Args:
        items: the examples.
        tokenizer: of the run.
        frame: of the rows.
        task: the section.

    Raises:
        DataError: if the tokenizer makes nothing of a question or a context.
        ConfigError: if windows would leave pieces out.
    """

    def __init__(self, items: Sequence[Question], tokenizer: Tokenizer, frame: Frame, task: TaskConfig):
        self.items, self._frame = items, frame
        self._longest = task.max_answer_tokens or MAX_ANSWER_TOKENS
        self._contexts = _contexts(items, tokenizer)
        questions = encoded([item.question for item in items], [item.place for item in items], tokenizer)
        room = frame.room(True)
        heads = np.minimum(questions.sizes, max(1, room // 2))
        questions = questions.part(np.zeros_like(heads), heads)
        windows = list(self._windows(room - heads, task.window_step))
        # Of each row: its example, the first piece of its window and the one behind it.
        self.examples, self._starts, self._behind = np.array(windows, np.int64).T
        self.num_rows = len(windows)
        texts = Texts.of([context.pieces for context in self._contexts]).take(self.examples)
        self._tokens, self._types = frame.rows(questions.take(self.examples), texts.part(self._starts, self._behind))
        self.offsets = heads[self.examples] + len(frame.first) + len(frame.between)
        self._labels = self._spans()

    def _windows(self, rooms: Ints, step: int | None) -> Iterator[tuple[int, int, int]]:
        for number, (context, room) in enumerate(zip(self._contexts, rooms.tolist(), strict=True)):
            advance = step or max(1, room // 2)
            if advance > room:
                raise ConfigError(
                    f"leaves pieces out between windows of {room} tokens ({self.items[number].place})",
                    field="task.window_step",
                    value=advance,
                    remedy="give less, or raise data.seq_length",
                )
            start = 0
            while start + room < len(context.pieces):
                yield number, start, start + room
                start += advance
            yield number, start, len(context.pieces)

    def _spans(self) -> Ints:
        """Return the first and the last place of the answer in each row, int64 [rows, 2]; 0 where it does not hold all."""
        first = np.array([context.first for context in self._contexts])[self.examples]
        last = np.array([context.last for context in self._contexts])[self.examples]
        is_there = (first >= self._starts) & (last < self._behind) & (first >= 0)
        moved = self.offsets - self._starts
        return np.where(is_there[:, None], np.stack([first + moved, last + moved], axis=1), 0)

    def make(self, indices: Ints) -> Arrays:
        """Make the arrays of rows; see `Rows.arrays`."""
        made = self._frame.arrays(self._tokens.take(indices), self._types.take(indices))
        labels = self._labels[indices]
        return made | {LABELS.name: labels, LOSS_MASK.name: np.ones(labels.shape, np.float32)}

    def answers(self, scores: NDArray[np.float32], may_be_absent: bool) -> list[str]:
        """Find the answer of each example: the span of the highest sum of its scores, over all its windows.

        A span begins and ends in the context, in this order, and has `max_answer_tokens` tokens at most. Where answers may
        be absent, there is none if no span of the example scores above the least sum of scores of the first tokens.

        Args:
            scores: float32 [rows, 2, s], of each place as the first and as the last of the answer.
            may_be_absent: whether there are questions without an answer.
        """
        best: list[tuple[float, int, int]] = [(-np.inf, 0, 0)] * len(self.items)
        absent = np.full(len(self.items), np.inf)
        for row, example in enumerate(self.examples.tolist()):
            start, offset = int(self._starts[row]), int(self.offsets[row])
            size = int(self._behind[row]) - start
            inside = scores[row, :, offset : offset + size]
            score, first, last = best_span(inside[0], inside[1], self._longest)
            absent[example] = min(absent[example], float(scores[row, 0, 0] + scores[row, 1, 0]))
            if score > best[example][0]:
                best[example] = (score, start + first, start + last)
        return [
            "" if may_be_absent and score <= absent[number] else self._text(number, first, last)
            for number, (score, first, last) in enumerate(best)
        ]

    def _text(self, number: int, first: int, last: int) -> str:
        context = self._contexts[number]
        return self.items[number].context[context.begins[first] : context.ends[last]]


def best_span(firsts: NDArray[np.float32], lasts: NDArray[np.float32], longest: int) -> tuple[float, int, int]:
    """Return the highest firsts[i] + lasts[j] with i <= j < i + longest, and its i and j.

    Args:
        firsts: [p], scores as the first.
        lasts: [p], scores as the last.
        longest: most pieces of a span.
    """
    count = len(firsts)
    reach = min(longest, count)
    padded = np.concatenate([lasts, np.full(reach, -np.inf, lasts.dtype)])
    sums = firsts[:, None] + np.lib.stride_tricks.sliding_window_view(padded, reach)[:count]
    first, further = divmod(int(sums.argmax()), reach)
    return float(sums[first, further]), first, first + further


def _contexts(items: Sequence[Question], tokenizer: Tokenizer) -> list[Context]:
    units = [[(found.start(), found.end()) for found in _UNIT.finditer(item.context)] for item in items]
    spelt = [
        [(item.context[begin:end], begin > 0 and item.context[begin - 1].isspace()) for begin, end in bounds]
        for item, bounds in zip(items, units, strict=True)
    ]
    return [
        _context(item, bounds, ids)
        for item, bounds, ids in zip(items, units, encode_words(spelt, tokenizer), strict=True)
    ]


def _context(item: Question, bounds: list[tuple[int, int]], ids: list[list[int]]) -> Context:
    sizes = np.array([len(each) for each in ids], np.int64)
    if not sizes.sum():
        raise DataError("has a context of which the tokenizer makes no token", field=item.place)
    begins, ends = np.repeat(np.array(bounds, np.int64).reshape(-1, 2), sizes, axis=0).T
    first = last = -1
    if item.answers:
        text, start = item.answers[0]
        touched = np.flatnonzero((ends > start) & (begins < start + len(text)))
        if not len(touched):
            raise DataError(f"has the answer {text[:40]!r}, of which the tokenizer makes no token", field=item.place)
        first, last = int(touched[0]), int(touched[-1])
    return Context([piece for each in ids for piece in each], begins, ends, first, last)
