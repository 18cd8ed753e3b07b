"""The tokenizer goes along in both directions, and must be the model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lmscale.config.data import TokenizerConfig
from lmscale.config.io import load_run
from lmscale.convert.exporting import export_hf
from lmscale.convert.importing import import_hf
from lmscale.convert.sentencepiece_to_hf import write_hf_tokenizer
from lmscale.convert.tokenizer_files import count_entries, special_ids
from lmscale.data.tokenizer import hash_hf_files, load_tokenizer
from lmscale.data.tokenizer_training import train_tokenizer
from lmscale.errors import ConversionError
from tests.convert.models import build, save, stored
from tests.data.corpora import TEXTS
from tests.distributed.ranks import run_ranks
from tests.evaluate.checkpoints import run_keys, write_checkpoint

PROMPT = "def f(x):"
UNSEEN = ["range(dog)   fox\n\n\n  x\t\ty", "<pad <s <0x41 >", "Ω 2 — über 字字 the\r\n", " ", "a" * 50 + " " * 50]


def write_tokenizer(directory: Path, vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer of transformers and save it; <s>, </s> and <pad> are its first ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    assert len(fast) == vocab_size
    fast.save_pretrained(directory)
    return fast


@pytest.mark.distributed
def test_an_import_with_its_tokenizer_writes_what_transformers_writes(tmp_path):
    source = save(build("gpt2", vocab_size=300, bos_token_id=0, eos_token_id=1, pad_token_id=2), tmp_path / "source")
    theirs = write_tokenizer(source, 300)
    notes = import_hf(source, tmp_path / "checkpoint").notes
    assert notes == []
    config = load_run(tmp_path / "checkpoint" / "config.yaml")
    assert config.tokenizer == TokenizerConfig(type="hf", path=str(tmp_path / "checkpoint" / "tokenizer"))
    assert hash_hf_files(tmp_path / "checkpoint" / "tokenizer") == hash_hf_files(source)

    (tmp_path / "checkpoint").rename(tmp_path / "moved")
    text = run_ranks(1, _generate, str(tmp_path / "moved"))[0]
    model = build("gpt2", vocab_size=300, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    ids = torch.tensor([theirs.encode(PROMPT)])
    with torch.no_grad():
        written = model.generate(ids, do_sample=False, max_new_tokens=8)[0].tolist()
    assert text == theirs.decode(written, skip_special_tokens=True)

    export_hf(tmp_path / "moved", tmp_path / "exported")
    assert hash_hf_files(tmp_path / "exported") == hash_hf_files(source)
    keys = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert [keys[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [0, 1, 2]
    generation = json.loads((tmp_path / "exported" / "generation_config.json").read_text())
    assert generation == {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def _generate(checkpoint: str) -> str:
    from lmscale.evaluate.inference import load

    return load(checkpoint).generate(PROMPT, 8, temperature=0.0)[0]


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path):
    source = save(build("gpt2", vocab_size=290), tmp_path / "source")
    write_tokenizer(source, 300)
    with pytest.raises(ConversionError, match=r"its tokenizer has 300 ids, and config\.json says vocab_size = 290"):
        import_hf(source, tmp_path / "checkpoint")
    source = save(build("gpt2", vocab_size=600), tmp_path / "larger")
    write_tokenizer(source, 300)
    with pytest.raises(ConversionError, match="put the model's own tokenizer there"):
        import_hf(source, tmp_path / "checkpoint")


def test_rows_without_a_token_are_noted(tmp_path):
    source = save(build("gpt2", vocab_size=320), tmp_path / "source")
    write_tokenizer(source, 300)
    (note,) = import_hf(source, tmp_path / "checkpoint").notes
    assert note == "the tokenizer has 300 ids, the table 320 rows: train with model.vocab_size=300"


def test_ids_are_found_in_whatever_files_there_are(tmp_path):
    assert count_entries(tmp_path) is None
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\na\n")
    assert count_entries(tmp_path) == 3
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "[PAD]"}}')
    assert special_ids(tmp_path) == {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    (tmp_path / "config.json").write_text('{"eos_token_id": [1, 2], "decoder_start_token_id": 0}')
    found = {"bos_token_id": None, "eos_token_id": [1, 2], "pad_token_id": 0, "decoder_start_token_id": 0}
    assert special_ids(tmp_path) == found
    (tmp_path / "added_tokens.json").write_text('{"<more>": 7}')
    assert count_entries(tmp_path) == 8
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": [["a", 0.0], ["b", -1.0]]}, "added_tokens": []}')
    assert count_entries(tmp_path) == 8
    (tmp_path / "added_tokens.json").unlink()
    assert count_entries(tmp_path) == 2
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ConversionError, match="files cannot be read"):
        count_entries(tmp_path)


@pytest.mark.parametrize("model_type", ["unigram", "bpe", "char"])
def test_our_tokenizer_goes_along(tmp_path, model_type):
    from transformers import AutoTokenizer

    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    size = {"char": 156, "unigram": 434}.get(model_type, 450)
    ours = train_tokenizer([str(tmp_path / "text.jsonl")], size, model_type, tmp_path / "tokenizer")
    checkpoint = our_checkpoint(tmp_path, size)
    notes = export_hf(checkpoint, tmp_path / "exported").notes
    keys = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert [keys[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [ours.bos_id, ours.eos_id, ours.pad_id]
    assert notes == []
    theirs = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert len(theirs) == size
    for text in (*TEXTS, *UNSEEN):
        ids = theirs.encode(text, add_special_tokens=False)
        assert ids == ours.encode(text)
        if ours.decode(ids) == text:
            assert theirs.decode(ids) == text
    special = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.mask_token_id)
    assert special == (ours.bos_id, ours.eos_id, ours.pad_id, ours.mask_id)
    import_hf(tmp_path / "exported", tmp_path / "again")
    again = load_tokenizer(TokenizerConfig(type="hf", path=str(tmp_path / "again" / "tokenizer")))
    assert again.vocab_size == size
    assert again.sentinel_ids == ours.sentinel_ids


@pytest.mark.parametrize(
    ("architecture", "one", "two"),
    [
        ("gpt", "A", "A B"),
        ("bert", "<cls> A <sep>", "<cls> A <sep> B <sep>"),
        ("roberta", "<s> A </s>", "<s> A </s> </s> B </s>"),
        ("bart", "<s> A </s>", "<s> A </s> </s> B </s>"),
        ("t5", "A </s>", "A </s> B </s>"),
    ],
)
def test_special_tokens_stand_around_a_text_as_in_training(tmp_path, architecture, one, two):
    from transformers import AutoTokenizer

    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    train_tokenizer([str(tmp_path / "text.jsonl")], 156, "char", tmp_path)
    assert write_hf_tokenizer(tmp_path / "tokenizer.model", tmp_path, architecture)
    (tmp_path / "tokenizer.model").unlink()
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    pair = theirs("A", "l", return_token_type_ids=True)
    assert theirs.convert_ids_to_tokens(theirs("A")["input_ids"]) == one.split()
    assert theirs.convert_ids_to_tokens(pair["input_ids"]) == two.replace("B", "l").split()
    types = {"gpt": [0, 1], "bert": [0, 0, 0, 1, 1]}
    assert pair["token_type_ids"] == types.get(architecture, [0] * len(pair["input_ids"]))


def test_a_sentencepiece_model_that_changes_text_is_copied_and_said_so(tmp_path):
    import sentencepiece

    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    (tmp_path / "tokenizer").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "tokenizer" / "tokenizer"),
        vocab_size=90,
        model_type="char",
        minloglevel=2,
    )
    (tmp_path / "tokenizer" / "tokenizer.vocab").unlink()
    content = (tmp_path / "tokenizer" / "tokenizer.model").read_bytes()
    size = sentencepiece.SentencePieceProcessor(model_proto=content).vocab_size()
    (note,) = export_hf(our_checkpoint(tmp_path, size), tmp_path / "exported").notes
    assert note == "the tokenizer is copied as tokenizer.model: read it with sentencepiece, AutoTokenizer cannot"
    assert (tmp_path / "exported" / "tokenizer.model").read_bytes() == content


def our_checkpoint(home: Path, vocab_size: int) -> Path:
    """Write a random checkpoint of a GPT with the tokenizer in home / "tokenizer"."""
    source = save(build("gpt2", vocab_size=vocab_size), home / "source")
    import_hf(source, home / "blank")
    tensors = {name.removeprefix("param/"): tensor for name, tensor in stored(home / "blank").items()}
    shapes = {piece["name"]: piece["shape"] for piece in json.loads((home / "blank" / "rank-00000.json").read_text())}
    keys = run_keys(
        load_run(home / "blank" / "config.yaml").model.model_dump(), tokenizer={"path": str(home / "tokenizer")}
    )
    path = write_checkpoint(home / "ours", keys, {name: value.view(shapes[name]) for name, value in tensors.items()})
    (home / "tokenizer").rename(path / "tokenizer")
    return path
