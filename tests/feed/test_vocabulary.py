from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from lmscale.config.data import TokenizerConfig
from lmscale.data.tokenizer import HfTokenizer, SentencePieceTokenizer
from lmscale.errors import DataError
from lmscale.feed.sources import open_train
from lmscale.feed.vocabulary import build_vocabulary, check_full_stop
from lmscale.launcher.validate import validate_run
from lmscale.objectives.registry import build_objective
from tests.feed.runs import make_encoder_run, make_run


@pytest.fixture
def make(tmp_path: Path, prefix: Path, tokenizer_path: Path) -> Any:
    def make_one(objective: dict[str, Any], *overrides: str) -> Any:
        return make_encoder_run(tmp_path, prefix, tokenizer_path, objective, overrides)

    return make_one


def word_piece(directory: Path, words: list[str]) -> str:
    (directory / "vocab.txt").write_text("\n".join(words))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return str(directory)


def byte_level(directory: Path) -> str:
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", ".", "Ġfox", "Ġthe", "es", "##", "\u010a"]
    (directory / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer"}')
    return str(directory)


def test_causal_lm_asks_for_the_size_only(tmp_path: Path) -> None:
    vocabulary = build_vocabulary(make_run(tmp_path))
    assert vocabulary.vocab_size == 1000
    assert vocabulary.special_ids is None
    build_vocabulary(make_run(tmp_path, overrides=("tokenizer.path=nowhere",)))


def test_special_ids_are_those_of_the_tokenizer(make: Any) -> None:
    vocabulary = build_vocabulary(make({"name": "roberta"}))
    assert (vocabulary.pad_id, vocabulary.bos_id, vocabulary.eos_id, vocabulary.mask_id) == (0, 2, 3, 4)
    assert (vocabulary.cls_id, vocabulary.sep_id, vocabulary.document_end_id) == (5, 6, 3)
    assert vocabulary.sentinel_ids == tuple(range(419, 319, -1))
    assert vocabulary.special_ids is not None
    assert vocabulary.special_ids.tolist() == [*range(7), *range(320, 420)]
    assert vocabulary.is_word_start is None
    assert vocabulary.full_stop_id is None


@pytest.mark.parametrize(
    "objective",
    [{"name": "bart"}, {"name": "roberta", "whole_words": True}, {"name": "bert", "whole_words": True}],
    ids=lambda objective: objective["name"],
)
def test_words_begin_where_the_tokenizer_marks_them(make: Any, tokenizer_path: Path, objective: Any) -> None:
    starts = build_vocabulary(make(objective)).is_word_start
    assert starts is not None
    assert starts.shape == (420,)
    tokenizer = SentencePieceTokenizer(tokenizer_path)
    ids = tokenizer.encode("The lazy dog. Does it?")
    words = np.split(ids, np.flatnonzero(starts[ids]))
    assert [tokenizer.decode(word.tolist()) for word in words] == ["The", " lazy", " dog.", " Does", " it?"]
    assert starts[[0, 3, 4, 419]].all()


def test_words_of_word_piece_and_of_byte_level_bpe(tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fox", "##es", "."]
    bert = HfTokenizer(word_piece(tmp_path / "bert", words))
    assert np.flatnonzero(~bert.word_starts()).tolist() == [6]
    assert bert.special_ids == [0, 1, 2, 3, 4]
    assert bert.piece_id(".") == 7
    assert bert.piece_id("none") is None
    (tmp_path / "roberta").mkdir()
    roberta = HfTokenizer(byte_level(tmp_path / "roberta"))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "roberta")) == roberta.vocab_size == 11
    assert np.flatnonzero(roberta.word_starts()).tolist() == [0, 1, 2, 3, 4, 6, 7]
    (tmp_path / "plain").mkdir()
    plain = HfTokenizer(word_piece(tmp_path / "plain", words[:6]))
    with pytest.raises(DataError, match="do not show where words begin"):
        plain.word_starts()


def test_what_the_tokenizer_lacks_is_named(make: Any, tmp_path: Path) -> None:
    path = word_piece(tmp_path, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fox", "##es", "."])
    tokenizer = TokenizerConfig(type="hf", path=path)
    assert build_vocabulary(make({"name": "bert"}).model_copy(update={"tokenizer": tokenizer})).cls_id == 2
    for name, lacks in (
        ("roberta", "no token for the begin of a text .* which objective roberta needs"),
        ("t5", "no token for the end of a text.* needs"),
    ):
        config = make({"name": name}).model_copy(update={"tokenizer": tokenizer})
        with pytest.raises(DataError, match=lacks):
            build_objective(config.objective, config.lengths, build_vocabulary(config))


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(make: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model\.vocab_size = 419: the tokenizer .* has 420 entries; use .* = 420"):
        build_vocabulary(make({"name": "roberta"}, "model.vocab_size=419"))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fox", "##es", "."]
    tokenizer = TokenizerConfig(type="hf", path=word_piece(tmp_path, pieces))
    small = make({"name": "bert"}, "model.vocab_size=7").model_copy(update={"tokenizer": tokenizer})
    with pytest.raises(DataError, match=r"model\.vocab_size = 7: the tokenizer .* has 8 entries"):
        build_vocabulary(small)


def test_the_full_stop_has_to_be_a_piece_and_to_be_found(make: Any) -> None:
    config = make({"name": "bart"})
    vocabulary = build_vocabulary(config)
    sources = open_train(config)
    check_full_stop(vocabulary, config.objective, sources)
    with pytest.raises(DataError, match=r"objective\.full_stop = 'stop': the tokenizer .* has no such piece"):
        build_vocabulary(make({"name": "bart", "full_stop": "stop"}))
    other = make({"name": "bart", "full_stop": "<0x01>"})
    with pytest.raises(DataError, match=r"has no full stop, objective\.full_stop = '<0x01>'"):
        check_full_stop(build_vocabulary(other), other.objective, sources)
    assert build_vocabulary(make({"name": "bart", "permuted_share": 0.0})).full_stop_id is None


@pytest.mark.parametrize("name", ["bert", "roberta", "bart", "t5"])
def test_the_launcher_opens_the_same_sources(make: Any, name: str) -> None:
    validate_run(make({"name": name}), 1)
    with pytest.raises(DataError, match=r"has 420 entries"):
        validate_run(make({"name": name}, "model.vocab_size=448"), 1)


def test_a_t5_vocabulary_may_be_rounded_up_to_128(make: Any) -> None:
    config = make({"name": "t5"}, "model.vocab_size=512")
    validate_run(config, 1)
    assert build_vocabulary(config).vocab_size == 420
    with pytest.raises(DataError, match=r"has 420 entries"):
        validate_run(make({"name": "bart"}, "model.vocab_size=512"), 1)


def test_the_launcher_refuses_what_the_ranks_would(make: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no full stop"):
        validate_run(make({"name": "bart", "full_stop": "<0x01>"}), 1)
    with pytest.raises(DataError, match="the valid share has 1 document with text"):
        validate_run(make({"name": "bert"}, "data.split='59,1,0'"), 1)
