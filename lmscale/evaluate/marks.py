"""Prompts with gaps: a mask, or a sentinel, that is spelled in the text stands for its token.

Tokenizers never find special tokens in text, so the text is cut there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lmscale.data.tokenizer import Tokenizer


def marks_of(tokenizer: Tokenizer) -> dict[str, int]:
    """Map what stands for a gap in a prompt to its id: the mask, and the sentinels <extra_id_0>, <extra_id_1>, ..."""
    marks = {f"<extra_id_{number}>": token for number, token in enumerate(tokenizer.sentinel_ids)}
    if tokenizer.mask_text is not None and tokenizer.mask_id is not None:
        marks[tokenizer.mask_text] = tokenizer.mask_id
    return marks


def encode_marked(tokenizer: Tokenizer, texts: Sequence[str], marks: Mapping[str, int]) -> list[list[int]]:
    """Encode texts in which some strings stand for tokens.

    The space before a mark goes into it: pieces begin with their space, and so what was masked in training held it.
    """
    if not marks:
        return tokenizer.encode_batch(texts)
    longest_first = sorted(marks, key=len, reverse=True)
    pattern = re.compile(f" ?({'|'.join(map(re.escape, longest_first))})")
    cut = [pattern.split(text) for text in texts]
    plain = iter(tokenizer.encode_batch([part for parts in cut for part in parts[::2]]))
    rows = []
    for parts in cut:
        ids = list(next(plain))
        for mark in parts[1::2]:
            ids += [marks[mark], *next(plain)]
        rows.append(ids)
    return rows


def fill_spans(ids: Sequence[int], written: Sequence[int], sentinels: Sequence[int]) -> list[int]:
    """Put what stands behind each sentinel in a decoder's output in the place of that sentinel in the input.

    A sentinel behind which nothing was written goes; what was written before the first one, or behind one that the
    input lacks, is left out.
    """
    known, spans = set(sentinels), dict[int, list[int]]()
    span: list[int] = []
    for token in written:
        if token in known:
            span = spans.setdefault(token, [])
        else:
            span.append(token)
    filled: list[int] = []
    for token in ids:
        filled += spans.get(token, []) if token in known else [token]
    return filled
