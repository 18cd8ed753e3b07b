"""Documents to sentences: what `lmscale tokenize --sentences` divides them into."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

SentenceMode = Literal["split", "lines"]

# sentencex 1.0 panics on some of these ("B\u00a0. "), where it counts a byte for each; lengths in characters stay.
_ODD_SPACES = {number: " " for number in range(0x80, 0x3001) if chr(number).isspace()}
_LINE = re.compile(r"[^\n]*\n|[^\n]+")


@dataclass(frozen=True)
class SentenceSplitter:
    """Divides a document into sentences whose concatenation is the document.

    White space stays with the sentence before it, but for one space directly in front of a sentence, which goes with
    that: tokenizers make one piece of a space and the word behind it, and so prose has the pieces of its running text.
    What is nothing but white space is no sentence of its own.

    Attributes:
        mode: split: by the rules of the sentencex package; lines: one sentence a line.
        language: ISO 639 code that chooses the rules and abbreviations; read with split only.
    """

    mode: SentenceMode
    language: str = "en"

    def __call__(self, text: str) -> list[str]:
        """Return the sentences of a text, one at least."""
        if self.mode == "lines":
            return _at_content(text, _LINE.findall(text))
        # Here, since who reads a corpus does not need it.
        from sentencex import segment

        return _at_content(text, segment(self.language, text.translate(_ODD_SPACES)))


def _at_content(text: str, parts: Iterable[str]) -> list[str]:
    """Cut a text where the content of its parts begins, or at the space in front of that."""
    cuts: list[int] = []
    position = 0
    for part in parts:
        if content := part.lstrip():
            start = position + len(part) - len(content)
            cuts.append(start - 1 if text[start - 1 : start] == " " else start)
        position += len(part)
    cuts[:1] = [0]
    return [text[start:end] for start, end in pairwise([*cuts, len(text)])]
