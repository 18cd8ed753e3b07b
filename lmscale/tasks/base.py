"""What a task is to the rest: splits of rows for the model, and metrics of what it predicted.

Shapes: n rows, s = data.seq_length - room places of a row, d places of the decoder's, l places for labels, c outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lmscale.batch import ADAPTER_IDS, LOSS_MASK
from lmscale.config.task import Domain, HeadKind
from lmscale.tasks.texts import Ints

Arrays = dict[str, NDArray[Any]]
"""Named, typed and shaped as in lmscale.batch."""
Predictions = Any
"""What the metrics compare; see `Task.metrics`."""


class Maker(Protocol):
    """Makes the arrays of rows by their numbers; the same rows give the same arrays, in any batch."""

    num_rows: int

    def make(self, indices: Ints) -> Arrays:
        """Make the arrays of rows, int64 [n], all of them at least 0."""
        ...


class Rows:
    """Rows that a model reads.

    Attributes:
        num_examples: of the file.
        num_rows: fewer where examples are packed, more where a context has several windows or a text several labels.

    Args:
        maker: makes the arrays.
        num_examples: of the file.
        entries: int64 [rows], the adaptation of each; None where there is one for all.
    """

    def __init__(self, maker: Maker, num_examples: int, entries: Ints | None = None):
        self._maker, self._entries = maker, entries
        self.num_examples = num_examples
        self.num_rows = maker.num_rows

    def with_entries(self, entries: Ints) -> Rows:
        """Return the same rows with the adaptation of each, int64 [rows]."""
        return Rows(self._maker, self.num_examples, entries)

    def arrays(self, indices: Ints) -> Arrays:
        """Make the arrays of rows.

        Args:
            indices: int64 [n], numbers of rows below num_rows; a negative one gives a filler row, whose loss_mask is 0.

        Returns:
            With a head: tokens, document_ids int64 [n, s]; token_types int64 [n, s] for bert; labels int64 [n, l], or
            targets float32 [n, 1] for values; loss_mask float32 [n, l]. l is 1 for classes and values, s for
            token_classes (the first piece of each word counts), 2 for a span (its first and last place in the row, 0 where
            the row does not hold the answer).
            gpt: tokens, labels int64 [n, s]; loss_mask float32 [n, s]; document_ids and positions int64 [n, s] where rows
            are packed.
            t5, bart: tokens, document_ids int64 [n, s]; decoder_tokens, decoder_document_ids, labels int64 [n, d];
            loss_mask float32 [n, d]; positions int64 [n, s] and decoder_positions int64 [n, d] where rows are packed.
            adapter_ids int64 [n], where there are several adaptations.

        Raises:
            IndexError: if there is no such row.
        """
        indices = np.asarray(indices, np.int64)
        if len(indices) and int(indices.max()) >= self.num_rows:
            raise IndexError(f"there are {self.num_rows} rows, and none has the number {int(indices.max())}")
        made = self._maker.make(np.maximum(indices, 0))
        if self._entries is not None:
            made[ADAPTER_IDS.name] = self._entries[np.maximum(indices, 0)]
        made[LOSS_MASK.name] = made[LOSS_MASK.name] * (indices >= 0).astype(np.float32)[:, None]
        return made


@dataclass(frozen=True)
class Split:
    """The examples of one file.

    Attributes:
        name: train, dev or that of a test set.
        domain: in or out of the training set's.
        rows: what the model reads.
        references: texts that count as right, for each example, where text is written; empty lists elsewhere.
        gold: what the metrics compare with.
    """

    name: str
    domain: Domain
    rows: Rows
    references: list[list[str]]
    gold: Any
    _candidates: Callable[[], Rows] | None = None
    _prompts: Callable[[], list[list[int]]] | None = None

    @property
    def num_examples(self) -> int:
        """Examples of the file."""
        return self.rows.num_examples

    @property
    def num_rows(self) -> int:
        """Rows that hold them."""
        return self.rows.num_rows

    def with_entries(self, entries: Ints) -> Split:
        """Return the split with the adaptation of each example, int64 [examples]; each example is a row."""
        candidates = self._candidates

        def of_each() -> Rows:
            assert candidates is not None
            rows = candidates()
            return rows.with_entries(np.repeat(entries, rows.num_rows // len(entries)))

        return replace(self, rows=self.rows.with_entries(entries), _candidates=None if candidates is None else of_each)

    def arrays(self, indices: Ints) -> Arrays:
        """Make the arrays of rows; see `Rows.arrays`."""
        return self.rows.arrays(indices)

    def candidates(self) -> Rows:
        """Return each example with each label as its target: row = example x labels + number of the label.

        Raises:
            ValueError: if the task is not a classification by text.
        """
        if self._candidates is None:
            raise ValueError("candidates are of classification by text")
        return self._candidates()

    def prompts(self) -> list[list[int]]:
        """Return the inputs, as ids that end where the target begins; without special tokens at their ends for t5 and bart.

        Raises:
            ValueError: if the task writes no text.
        """
        if self._prompts is None:
            raise ValueError("prompts are of tasks that write text")
        return self._prompts()


Measure = Callable[[Split, Predictions], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """A task as a model sees it. Made by `lmscale.tasks.build.build_task`.

    Attributes:
        head: kind of the new head; None for the language-model head, which writes text or compares labels.
        num_outputs: numbers that the head gives: for each row (classes, value) or each place (token_classes; span: scores
            as the first and as the last place). 0 without a head.
        labels: the classes, in order; empty where there are none.
        metric: the metric that decides, the higher the better.
        max_new_tokens: most tokens to write for an example; 0 where no text is written.
        splits: train, dev where there is one, and each test set, by name.
    """

    head: HeadKind | None
    num_outputs: int
    labels: tuple[str, ...]
    metric: str
    max_new_tokens: int
    splits: Mapping[str, Split]
    _measure: Measure = field(repr=False)

    @property
    def compares_labels(self) -> bool:
        """Whether predictions are scores of `Split.candidates`."""
        return self.head is None and bool(self.labels)

    @property
    def writes_text(self) -> bool:
        """Whether predictions are texts written behind `Split.prompts`."""
        return self.head is None and not self.labels

    def metrics(self, split: Split | str, predictions: Predictions) -> dict[str, float]:
        """Measure predictions of a whole split, in its order.

        All metrics are the higher the better, and 1 at best (BLEU and ROUGE too).

        Args:
            split: of this task, or its name.
            predictions: with a head, its outputs for `Split.rows`, float32 [rows, l, c]: [rows, 1, labels], [rows, 1, 1],
                [rows, s, labels], or, of a span, [rows, 2, s], scores as the first and as the last place. Where labels are
                compared, log-likelihoods [examples, labels]. Where text is written, a list of texts.

        Raises:
            ValueError: if predictions are not as many as the split asks for.
            ConfigError: if a library of lmscale[tasks] is missing.
        """
        return self._measure(self.splits[split] if isinstance(split, str) else split, predictions)
