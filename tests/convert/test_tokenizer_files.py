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
from lmscale.convert.tokenizer_files import count_entries, special_ids
from lmscale.data.tokenizer import hash_hf_files
from lmscale.errors import ConversionError
from tests.convert.models import build, save
from tests.data.corpora import TEXTS
from tests.distributed.ranks import run_ranks

PROMPT = "def f(x):"


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
