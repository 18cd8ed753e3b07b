"""The documents that a source cuts into samples, and the sentences in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmscale.data.indexed import IndexedCorpus
from lmscale.errors import DataError


@dataclass(frozen=True)
class Sentences:
    """The sentences of a part that hold text; those of a document follow each other without a gap.

    Attributes:
        starts: int64 [sentences], the first token of each in the corpus.
        ends: int64 [sentences], the token behind the last of each; the document end is no part of a sentence.
        documents: int64 [sentences], the document of each, from 0 in the part.
    """

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    documents: NDArray[np.int64]


class Part:
    """Some documents of a corpus, one behind the other.

    Args:
        corpus: read as it is now; nothing is cached.
        documents: (first, behind last); None takes all.
        name: of the part, for messages.
        end_id: the token that ends documents where the corpus itself does not tell; None where it is not known.
    """

    def __init__(
        self,
        corpus: IndexedCorpus,
        documents: tuple[int, int] | None = None,
        name: str = "the corpus",
        end_id: int | None = None,
    ):
        self.first, self.behind = documents or (0, corpus.num_documents)
        self.corpus, self.name = corpus, name
        self.has_ends = corpus.has_document_ends(end_id)

    @property
    def num_documents(self) -> int:
        """Documents of the part."""
        return self.behind - self.first

    @property
    def offsets(self) -> NDArray[np.int64]:
        """The first token of each document in the corpus, and the end: int64 [num_documents + 1]."""
        return self.corpus.document_offsets[self.first : self.behind + 1]

    @property
    def text_offsets(self) -> NDArray[np.int64]:
        """The same with the tokens counted from 0 in the part and without document ends: int64 [num_documents + 1]."""
        if not self.has_ends:
            return np.asarray(self.offsets - self.offsets[0])
        lengths = np.maximum(np.diff(self.offsets) - 1, 0)
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])

    def check_sentences(self, reader: str) -> None:
        """Check that there are sentences, and text in them.

        Args:
            reader: what asks for them, for the message.

        Raises:
            DataError: if there are none.
        """
        if not self.corpus.has_sentences or self.corpus.has_pairs:
            raise DataError(
                f"its documents are not divided into sentences, which {reader} is made of",
                field=self.corpus.prefix,
                remedy="make it again: lmscale tokenize --sentences split",
            )
        num_tokens = int(self.offsets[-1] - self.offsets[0])
        if num_tokens <= self.num_documents * self.has_ends:
            raise self.without_text()

    def check_pairs(self) -> None:
        """Check that each document is a pair of sequences, an input and a target.

        Raises:
            DataError: if one is not.
        """
        sequences = np.diff(self.corpus.document_sentences[self.first : self.behind + 1])
        if not self.corpus.has_pairs or (sequences != 2).any():
            raise DataError(
                "its documents are not pairs of an input and a target, which objective text_to_text is made of",
                field=self.corpus.prefix,
                remedy="make it again: lmscale tokenize --pair INPUT_KEY TARGET_KEY",
            )
        if self.num_documents == 0:
            raise self.without_text()

    def without_text(self) -> DataError:
        """Say that there is nothing to cut."""
        return DataError(
            f"{self.name} has no text in {self.num_documents} documents",
            field=self.corpus.prefix,
            remedy="give more text or another data.split",
        )

    def sentences(self) -> Sentences:
        """Find the sentences that hold text.

        Raises:
            DataError: if none does.
        """
        bounds = self.corpus.document_sentences[self.first : self.behind + 1]
        counts = np.diff(bounds)
        offsets = self.corpus.sentence_offsets[bounds[0] : bounds[-1] + 1]
        starts, ends = offsets[:-1], offsets[1:].copy()
        if self.has_ends:
            ends[bounds[1:][counts > 0] - bounds[0] - 1] -= 1
        documents = np.repeat(np.arange(self.num_documents), counts)
        is_text = ends > starts
        if not is_text.any():
            raise self.without_text()
        return Sentences(starts[is_text], ends[is_text], documents[is_text])
