"""Rows of a task with a head: texts or pairs between special tokens, with a class or a number for each.

Shapes: n rows, s places of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmscale.batch import DOCUMENT_IDS, LABELS, LOSS_MASK, PADDING_ID, TARGETS, TOKEN_TYPES, TOKENS
from lmscale.data.tokenizer import Tokenizer, document_end_id
from lmscale.errors import ConfigError, DataError
from lmscale.tasks.base import Arrays
from lmscale.tasks.items import Sentence, Words
from lmscale.tasks.texts import Ints, Texts, joined, marked

_NAMES = {"cls_id": "cls token", "sep_id": "sep token", "bos_id": "token for the begin of a text"}
_NAMES |= {"eos_id": "token for the end of a text", "pad_id": "token for padding"}


def special_ids(tokenizer: Tokenizer, architecture: str, *names: str) -> list[int]:
    """Return ids of special tokens.

    Raises:
        DataError: if the tokenizer lacks one.
    """
    ids = [getattr(tokenizer, name) for name in names]
    missing = [_NAMES[name] for name, number in zip(names, ids, strict=True) if number is None]
    if missing:
        raise DataError(
            f"has no {' and no '.join(missing)}, which a task of {architecture} needs",
            field="tokenizer",
            remedy="take a tokenizer that has",
        )
    return ids


def end_id(tokenizer: Tokenizer) -> int:
    """Return the id that ends a text of gpt, as in its corpora.

    Raises:
        DataError: if there is none.
    """
    number = document_end_id(tokenizer)
    return special_ids(tokenizer, "gpt", "eos_id")[0] if number is None else number


@dataclass(frozen=True)
class Frame:
    """The special tokens of a row, and its length.

    Attributes:
        first, between, last: ids before the first text, between two, and behind the last one.
        pad: id of padding.
        width: places of a row.
        has_types: whether rows have token types.
    """

    first: tuple[int, ...]
    between: tuple[int, ...]
    last: tuple[int, ...]
    pad: int
    width: int
    has_types: bool

    @staticmethod
    def of(architecture: str, tokenizer: Tokenizer, width: int) -> Frame:
        """Make the frame of an architecture.

        bert: [CLS] A [SEP] B [SEP]; roberta: <s> A </s></s> B </s>; gpt, whose head reads the last token, and t5: A </s> B </s>;
        bart as roberta.

        Raises:
            DataError: if the tokenizer lacks a token.
        """
        if architecture == "bert":
            cls, sep, pad = special_ids(tokenizer, architecture, "cls_id", "sep_id", "pad_id")
            return Frame((cls,), (sep,), (sep,), pad, width, True)
        if architecture in ("roberta", "bart"):
            bos, eos, pad = special_ids(tokenizer, architecture, "bos_id", "eos_id", "pad_id")
            return Frame((bos,), (eos, eos), (eos,), pad, width, False)
        if architecture == "t5":
            eos, pad = special_ids(tokenizer, architecture, "eos_id", "pad_id")
            return Frame((), (eos,), (eos,), pad, width, False)
        end = end_id(tokenizer)
        return Frame((), (end,), (end,), end if tokenizer.pad_id is None else tokenizer.pad_id, width, False)

    def room(self, is_pair: bool) -> int:
        """Return the places for text.

        Raises:
            ConfigError: if there are none.
        """
        room = self.width - len(self.first) - len(self.last) - (len(self.between) if is_pair else 0)
        least = 2 if is_pair else 1
        if room < least:
            raise ConfigError(
                f"leaves {self.width} places in a row, too few for special tokens and text",
                field="data.seq_length",
                remedy=f"give at least {least - room} more",
            )
        return room

    def rows(self, first: Texts, second: Texts | None) -> tuple[Texts, Texts]:
        """Put texts that fit between the special tokens: tokens, and 1 where they are of the second text or behind it."""
        count = len(first)
        parts = [Texts.constant(self.first, count), first]
        if second is not None:
            parts += [Texts.constant(self.between, count), second]
        parts.append(Texts.constant(self.last, count))
        numbers = marked(*parts)
        return joined(*parts), numbers.like(numbers.tokens >= 3)

    def arrays(self, tokens: Texts, types: Texts) -> Arrays:
        """Make what the model reads of rows."""
        made: Arrays = {
            TOKENS.name: tokens.padded(self.width, self.pad),
            DOCUMENT_IDS.name: tokens.like(np.zeros(len(tokens.tokens))).padded(self.width, PADDING_ID),
        }
        if self.has_types:
            made[TOKEN_TYPES.name] = types.padded(self.width, 0)
        return made


def shortened(first: Ints, second: Ints, most: int) -> tuple[Ints, Ints]:
    """Cut lengths of pairs to `most` together: the longer of the two first, and both equally once they are as long.

    Returns:
        int64 [n] twice; the first has the odd token.
    """
    shorter = np.minimum(first, second)
    is_even = 2 * shorter > most
    left = np.where(is_even, (most + 1) // 2, np.where(first >= second, most - shorter, first))
    right = np.where(is_even, most // 2, np.where(first >= second, second, most - shorter))
    fits = first + second <= most
    return np.where(fits, first, left), np.where(fits, second, right)


class SentenceRows:
    """A row for each text or pair, cut at its end where it is too long.

    Args:
        items: the examples.
        tokenizer: of the run.
        frame: of the rows.
        is_value: whether to predict a number.

    Raises:
        DataError: if the tokenizer makes nothing of a text.
    """

    def __init__(self, items: Sequence[Sentence], tokenizer: Tokenizer, frame: Frame, is_value: bool):
        self._frame, self._is_value = frame, is_value
        self.num_rows = len(items)
        self.gold: NDArray[np.float64] = np.array([item.gold for item in items], np.float64)
        self.words = [(item.first.split() or [""])[0] for item in items]  # the first of each
        places = [item.place for item in items]
        first = encoded([item.first for item in items], places, tokenizer)
        seconds = [item.second for item in items if item.second is not None]
        second = encoded(seconds, places, tokenizer) if seconds else None
        room = frame.room(second is not None)
        none = np.zeros(len(items), np.int64)
        if second is None:
            first = first.part(none, np.minimum(first.sizes, room))
        else:
            a, b = shortened(first.sizes, second.sizes, room)
            first, second = first.part(none, a), second.part(none, b)
        self._tokens, self._types = frame.rows(first, second)

    def make(self, indices: Ints) -> Arrays:
        """Make the arrays of rows; see `Rows.arrays`."""
        made = self._frame.arrays(self._tokens.take(indices), self._types.take(indices))
        gold = self.gold[indices][:, None]
        if self._is_value:
            made[TARGETS.name] = gold.astype(np.float32)
        else:
            made[LABELS.name] = gold.astype(np.int64)
        made[LOSS_MASK.name] = np.ones(gold.shape, np.float32)
        return made


def encoded(texts: Sequence[str], places: Sequence[str], tokenizer: Tokenizer) -> Texts:
    """Encode texts.

    Raises:
        DataError: if the tokenizer makes nothing of one.
    """
    made = Texts.of(tokenizer.encode_batch(list(texts)))
    empty = np.flatnonzero(made.sizes == 0)
    if len(empty):
        raise DataError("holds a text of which the tokenizer makes no token", field=places[int(empty[0])])
    return made


def encode_words(words: Sequence[Sequence[tuple[str, bool]]], tokenizer: Tokenizer) -> list[list[list[int]]]:
    """Encode words on their own, those with True behind a space; each different one once."""
    spelt = [[" " * behind_space + word for word, behind_space in each] for each in words]
    different = sorted({word for each in spelt for word in each})
    ids = dict(zip(different, tokenizer.encode_batch(different), strict=True))
    return [[ids[word] for word in each] for each in spelt]


class WordRows:
    """Rows of as many words as fit, each word of an example in one of its rows; the first piece of a word has its class.

    A word of more pieces than a row has places is cut.

    Args:
        items: the examples.
        tokenizer: of the run.
        frame: of the rows.

    Raises:
        DataError: if the tokenizer makes nothing of a word.
    """

    def __init__(self, items: Sequence[Words], tokenizer: Tokenizer, frame: Frame):
        self._frame = frame
        spelt = [[(word, number > 0) for number, word in enumerate(item.words)] for item in items]
        pieces = encode_words(spelt, tokenizer)
        self.words = [word for item in items for word in item.words]
        self.counts = np.array([len(item.words) for item in items], np.int64)
        self.gold: Ints = np.array([tag for item in items for tag in item.tags], np.int64)
        rows: list[list[int]] = []
        words: list[tuple[int, int]] = []
        for item, ids in zip(items, pieces, strict=True):
            _fill_rows(item, ids, frame.room(False), rows, words)
        where = np.array(words, np.int64)
        # Of each word, over all examples: its row, and the place of its first piece in it.
        self.word_rows, self.word_places = where[:, 0], where[:, 1] + len(frame.first)
        self._starts = np.searchsorted(self.word_rows, np.arange(len(rows) + 1))
        self._tokens, self._types = frame.rows(Texts.of(rows), None)
        self.num_rows = len(rows)

    def make(self, indices: Ints) -> Arrays:
        """Make the arrays of rows; see `Rows.arrays`."""
        made = self._frame.arrays(self._tokens.take(indices), self._types.take(indices))
        labels = np.zeros(made[TOKENS.name].shape, np.int64)
        mask = np.zeros(labels.shape, np.float32)
        starts, counts = self._starts[indices], self._starts[indices + 1] - self._starts[indices]
        rows = np.repeat(np.arange(len(indices)), counts)
        words = np.arange(len(rows)) + np.repeat(starts - np.cumsum(counts) + counts, counts)
        where = (rows, self.word_places[words])
        labels[where], mask[where] = self.gold[words], 1.0
        return made | {LABELS.name: labels, LOSS_MASK.name: mask}


def _fill_rows(
    item: Words, pieces: list[list[int]], room: int, rows: list[list[int]], words: list[tuple[int, int]]
) -> None:
    """Append the rows of an example, and the (row, place) of each of its words."""
    row: list[int] = []
    for word, ids in zip(item.words, pieces, strict=True):
        if not ids:
            raise DataError(f"holds the word {word!r}, of which the tokenizer makes no token", field=item.place)
        ids = ids[:room]
        if len(row) + len(ids) > room:
            rows.append(row)
            row = []
        words.append((len(rows), len(row)))
        row = row + ids
    rows.append(row)
