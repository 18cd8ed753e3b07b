"""Gaps in prompts: special tokens that are spelled, and what a decoder wrote for them put back."""

from __future__ import annotations

import pytest

from lmscale.data.tokenizer_training import train_tokenizer
from lmscale.evaluate.marks import encode_marked, fill_spans, marks_of
from tests.data.corpora import TEXTS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    home = tmp_path_factory.mktemp("tokenizer")
    (home / "text.txt").write_text("\n".join(TEXTS))
    return train_tokenizer([str(home / "text.txt")], 450, "bpe", home / "tokenizer")


def test_marks_become_their_tokens_and_take_the_space_before_them(tokenizer):
    marks, encode = marks_of(tokenizer), tokenizer.encode
    last = tokenizer.vocab_size - 1
    assert marks["<extra_id_0>"] == last
    assert marks["<extra_id_12>"] == last - 12
    rows = encode_marked(tokenizer, ["a <mask> b<extra_id_12>", "<mask><mask>", "plain  text", ""], marks)
    mask = tokenizer.mask_id
    assert rows == [[*encode("a"), mask, *encode(" b"), last - 12], [mask, mask], encode("plain  text"), []]
    assert encode_marked(tokenizer, ["<mask>"], {}) == [encode("<mask>")]


def test_what_training_masks_is_what_a_prompt_masks(tokenizer):
    text = "import the module"
    whole = tokenizer.encode(text)
    (marked,) = encode_marked(tokenizer, ["import <mask> module"], marks_of(tokenizer))
    first = marked.index(tokenizer.mask_id)
    rest = len(marked) - first - 1
    assert whole[:first] == marked[:first]
    assert whole[len(whole) - rest :] == marked[first + 1 :]
    filled = [*marked[:first], *whole[first : len(whole) - rest], *marked[first + 1 :]]
    assert tokenizer.decode(filled) == text


def test_spans_are_put_in_the_place_of_their_sentinels():
    source, sentinels = [1, 99, 2, 98, 3], [99, 98, 97]
    assert fill_spans(source, [99, 10, 11, 98, 12, 97, 13], sentinels) == [1, 10, 11, 2, 12, 3]
    assert fill_spans(source, [98, 12], sentinels) == [1, 2, 12, 3]
    assert fill_spans(source, [7, 99, 98, 12, 99, 5], sentinels) == [1, 5, 2, 12, 3]
    assert fill_spans(source, [], sentinels) == [1, 2, 3]
