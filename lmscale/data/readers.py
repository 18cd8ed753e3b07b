"""How `lmscale tokenize` makes the sequences of a document from a record."""

from __future__ import annotations

from dataclasses import dataclass

from lmscale.data.corpus import Record, Skipped, parse_record, parse_texts
from lmscale.data.manifest import PAIRS
from lmscale.data.sentences import SentenceSplitter
from lmscale.errors import DataError


@dataclass(frozen=True)
class TextReader:
    """Makes one sequence of a document, or, with a splitter, one of each sentence.

    Attributes:
        json_key: the key of the text in JSON lines.
        splitter: divides a document into sentences.
    """

    json_key: str = "text"
    splitter: SentenceSplitter | None = None

    def __call__(self, record: Record) -> list[str] | Skipped:
        """Read a record's sequences, one at least, or say why it holds none."""
        text = parse_record(record, self.json_key)
        if isinstance(text, Skipped):
            return text
        return [text] if self.splitter is None else self.splitter(text)

    @property
    def division(self) -> str | None:
        """What the manifest says of it."""
        return None if self.splitter is None else self.splitter.mode

    def finish(self, sequences: list[list[int]]) -> list[list[int]]:
        """Leave out sentences of which a tokenizer that drops white space makes nothing."""
        return sequences if self.splitter is None else [ids for ids in sequences if ids] or sequences[:1]


@dataclass(frozen=True)
class PairReader:
    """Makes two sequences of a JSON line: a task's input and its target.

    Attributes:
        input_key, target_key: keys of the texts.
        prefix: the task, put in front of each input ("summarize: ").
    """

    input_key: str
    target_key: str
    prefix: str = ""

    def __call__(self, record: Record) -> list[str] | Skipped:
        """Read a record's pair, or say why it holds none.

        Raises:
            DataError: if the record is a whole file, not a JSON line.
        """
        if record.line is None:
            raise DataError(
                "holds one text, and pairs have two", field=record.path, remedy="give .jsonl files, an example a line"
            )
        texts = parse_texts(record, (self.input_key, self.target_key))
        return texts if isinstance(texts, Skipped) else [self.prefix + texts[0], texts[1]]

    @property
    def division(self) -> str:
        """What the manifest says of it."""
        return PAIRS

    def finish(self, sequences: list[list[int]]) -> list[list[int]]:
        """Keep both, also where the tokenizer makes nothing of one."""
        return sequences


Reader = TextReader | PairReader
