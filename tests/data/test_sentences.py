from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmscale.data.sentences import SentenceMode, SentenceSplitter
from lmscale.data.tokenizer import SentencePieceTokenizer

HARD = [
    "Dr",
    "e.g.",
    ".",
    "!",
    "?",
    "。",
    "।",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\u00a0",
    "\u2028",
    "\x85",
    "A",
    "b",
    "é",
]
HARD += ["“", "”", "(", ")", "1.", "- ", "a)", "[1]", "🙂", "\u0301", "\ufeff", "\u2581"]


def test_sentences_are_found_with_their_white_space() -> None:
    text = "  Dr. Smith came.  He left!\n\nWho?\nA new line, and\tno end "
    expected = ["  Dr. Smith came. ", " He left!\n\n", "Who?\n", "A new line, and\tno end "]
    assert SentenceSplitter("split")(text) == expected


def test_each_line_is_a_sentence() -> None:
    assert SentenceSplitter("lines")("One. Two.\n\n \nThree\n  Four") == ["One. Two.\n\n \n", "Three\n ", " Four"]
    assert SentenceSplitter("lines")("\n\n") == ["\n\n"]


def test_the_language_decides_what_ends_a_sentence() -> None:
    assert len(SentenceSplitter("split", "de")("Das ist z. B. so. Ja.")) == 2


@pytest.mark.parametrize("mode", ["split", "lines"])
@given(parts=st.lists(st.one_of(st.sampled_from(HARD), st.text(max_size=3)), max_size=30))
def test_sentences_concatenate_to_the_text_and_none_is_white_space(mode: SentenceMode, parts: list[str]) -> None:
    text = "".join(parts)
    sentences = SentenceSplitter(mode)(text)
    assert "".join(sentences) == text
    assert len(sentences) == 1 or all(sentence.strip() for sentence in sentences)


def test_sentences_encode_to_the_pieces_of_the_running_text(tokenizer: SentencePieceTokenizer) -> None:
    text = "The quick brown fox jumps. The lazy dog does not! Over the dog.\nFor i in range, print."
    sentences = SentenceSplitter("split")(text)
    assert len(sentences) == 4
    pieces = [piece for ids in tokenizer.encode_batch(sentences) for piece in ids]
    assert pieces == tokenizer.encode(text)
