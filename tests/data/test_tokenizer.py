from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmscale.config.data import TokenizerConfig
from lmscale.data.tokenizer import HfTokenizer, SentencePieceTokenizer, load_tokenizer, tokenizer_hash
from lmscale.data.tokenizer_training import train_tokenizer
from lmscale.errors import DataError
from tests.data.corpora import TEXTS

TEXT = st.text() | st.text(alphabet=" \t\n\r\u2581\x00ab<>/s_")


@pytest.fixture(scope="module")
def unigram(corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    return train_tokenizer([str(corpus_file)], 420, "unigram", tmp_path_factory.mktemp("unigram"))


@given(text=TEXT)
def test_bpe_gives_every_text_back(tokenizer: SentencePieceTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=TEXT)
def test_unigram_gives_every_text_back(unigram: SentencePieceTokenizer, text: str) -> None:
    assert unigram.decode(unigram.encode(text)) == text


def test_special_ids_stand_in_front_and_sentinels_descend_from_the_end(tokenizer: SentencePieceTokenizer) -> None:
    t = tokenizer
    assert (t.pad_id, t.bos_id, t.eos_id, t.mask_id, t.cls_id, t.sep_id) == (0, 2, 3, 4, 5, 6)
    assert t.vocab_size == 450
    assert t.sentinel_ids == list(range(449, 349, -1))


def test_text_that_spells_a_special_token_stays_text(tokenizer: SentencePieceTokenizer) -> None:
    for text in ("</s>", "<mask>", "<extra_id_0>", "<0x0A>"):
        ids = tokenizer.encode(text)
        assert not {0, 2, 3, 4, 5, 6, *tokenizer.sentinel_ids} & set(ids)
        assert tokenizer.decode(ids) == text


def test_a_batch_encodes_as_its_texts_do(tokenizer: SentencePieceTokenizer) -> None:
    texts = [*TEXTS[:4], "", "a\u2581b"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_newlines_and_indentation_are_learned_as_pieces(tokenizer: SentencePieceTokenizer) -> None:
    text = "for i in range(10):\n    print(i)\n"
    assert len(tokenizer.encode(text)) < len(text) / 2


def test_equal_corpora_train_equal_tokenizers(
    corpus_file: Path, tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    again = train_tokenizer([str(corpus_file)], 450, "bpe", tmp_path)
    assert again.content_hash == tokenizer.content_hash == tokenizer_hash(TokenizerConfig(path=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]


@pytest.mark.parametrize("model_type", ["unigram", "bpe", "char"])
def test_a_vocabulary_beyond_the_corpus_is_refused_with_one_that_works(
    corpus_file: Path, tmp_path: Path, model_type: str
) -> None:
    with pytest.raises(DataError, match="more than the corpus can fill") as caught:
        train_tokenizer([str(corpus_file)], 20_000, model_type, tmp_path)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    limit = int(str(caught.value).split("at most ")[1].split(",")[0])
    assert train_tokenizer([str(corpus_file)], limit, model_type, tmp_path).vocab_size == limit  # type: ignore[arg-type]


@pytest.mark.parametrize("vocab_size", [1, 107, 300])
def test_a_vocabulary_without_room_is_refused_with_one_that_works(
    corpus_file: Path, tmp_path: Path, vocab_size: int
) -> None:
    with pytest.raises(DataError, match="too small") as caught:
        train_tokenizer([str(corpus_file)], vocab_size, "bpe", tmp_path)
    least = int(str(caught.value).split("at least ")[1])
    assert train_tokenizer([str(corpus_file)], least, "bpe", tmp_path).vocab_size == least


def test_what_is_wrong_with_the_corpus_reaches_the_user_through_sentencepiece(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{"text"\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: broken JSON"):
        train_tokenizer([str(path)], 400, "bpe", tmp_path / "out", strict=True)
    path.write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="holds no text"):
        train_tokenizer([str(path)], 400, "bpe", tmp_path / "out")
    with pytest.raises(DataError, match="matches no file"):
        train_tokenizer([f"{tmp_path}/*.txt"], 400, "bpe", tmp_path / "out")


def test_a_missing_or_foreign_model_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no tokenizer"):
        load_tokenizer(TokenizerConfig(path=str(tmp_path)))
    (tmp_path / "tokenizer.model").write_bytes(b"something else")
    with pytest.raises(DataError, match="not a sentencepiece model"):
        load_tokenizer(TokenizerConfig(path=str(tmp_path)))


@pytest.fixture(scope="module")
def hf_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    names = ["<|end|>", "<extra_id_0>", "<extra_id_1>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=names, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    path = tmp_path_factory.mktemp("hf")
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(path)
    return str(path)


def test_a_tokenizer_of_transformers_serves_too(hf_path: str) -> None:
    config = TokenizerConfig(type="hf", path=hf_path)
    loaded = load_tokenizer(config)
    assert (loaded.eos_id, loaded.pad_id, loaded.mask_id, loaded.sentinel_ids) == (0, None, None, [1, 2])
    assert loaded.content_hash == tokenizer_hash(config)
    for text in TEXTS[:4]:
        assert loaded.decode(loaded.encode(text)) == text


def test_text_that_spells_a_special_token_stays_text_with_transformers_too(hf_path: str) -> None:
    loaded = HfTokenizer(hf_path)
    ids = loaded.encode("a<|end|>b")
    assert loaded.eos_id not in ids
    assert loaded.decode(ids) == "a<|end|>b"


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DataError, match=r"pip install lmscale\[hf\]"):
        load_tokenizer(TokenizerConfig(type="hf", path=str(tmp_path)))
