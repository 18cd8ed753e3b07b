"""What generation and evaluation refuse, each in one line, before anything is computed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lmscale.config.checkpoint_paths import resolve_checkpoint
from lmscale.errors import CheckpointError, ConfigError, DataError, LmscaleError
from lmscale.evaluate.batches import pad_left
from lmscale.evaluate.loading import read_config
from tests.data.corpora import write_corpus
from tests.distributed.ranks import run_ranks
from tests.evaluate import stacks
from tests.evaluate.checkpoints import reseal, run_keys, write_checkpoint
from tests.evaluate.reference import MODELS, load_pair

GPT2 = MODELS["gpt2"]


def test_a_run_or_its_checkpoints_stand_for_the_newest(tmp_path):
    for step in (1, 2):
        write_checkpoint(tmp_path / "checkpoints" / f"step-0000000{step}", run_keys(GPT2), {})
    (tmp_path / "checkpoints" / "latest").write_text("step-00000002\n")
    (tmp_path / "manifest.json").write_text("{}")  # a run has a manifest of its own
    newest = tmp_path / "checkpoints" / "step-00000002"
    assert resolve_checkpoint(tmp_path) == resolve_checkpoint(tmp_path / "checkpoints") == newest
    assert resolve_checkpoint(newest.with_name("step-00000001")).name == "step-00000001"


def test_a_directory_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"^checkpoint = '.*': holds no checkpoint$"):
        resolve_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"^checkpoint = '.*nowhere': does not exist$"):
        resolve_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("given", ["tokenizers/mine.model", "tokenizers/mine"])
def test_the_tokenizer_is_the_copy_in_the_checkpoint(tmp_path, given):
    keys = run_keys(GPT2, tokenizer={"path": given})
    path = write_checkpoint(tmp_path / "step-00000001", keys, {})
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "mine.model").touch()
    expected = path / "tokenizer" / ("mine.model" if given.endswith(".model") else "")
    assert Path(read_config(path).tokenizer.path) == expected


def test_padding_stands_on_the_left_in_another_document():
    padded = pad_left([[5, 6, 7], [8]], torch.device("cpu"))
    assert padded.tokens.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert padded.positions.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert padded.document_ids.tolist() == [[1, 1, 1], [0, 0, 1]]
    after = padded.after(torch.tensor([9, 10]))
    assert [tensor.tolist() for tensor in after.packed] == [[[9], [10]], [[3], [1]], [[1], [1]]]


@pytest.mark.distributed
def test_wrong_input_is_refused_in_one_line(tmp_path):
    write_corpus(tmp_path / "small", [[1, 2, 3]], vocab_size=131)
    write_corpus(tmp_path / "foreign", [[1] * 100], vocab_size=1000)
    found = run_ranks(1, _refusals, str(tmp_path))[0]
    assert found == {
        "no prompt": [],
        "empty": "ConfigError: text: holds no token; give at least one character",
        "id": "ConfigError: token id = 131: is outside the model's vocabulary of 131; "
        "use the tokenizer of the model's run",
        "long": "ConfigError: text: 60 tokens and 5 new ones are more than model.max_position_embeddings = 64; "
        "shorten the text or ask for fewer new tokens",
        "full": "ConfigError: text: 64 tokens and 1 new ones are more than model.max_position_embeddings = 64; "
        "shorten the text or ask for fewer new tokens",
        "scored": "ConfigError: text: 65 tokens, which is more than model.max_position_embeddings = 64; "
        "shorten the text",
        "none": "ConfigError: max_new_tokens = 0: must be at least 1",
        "tokenizer": "ConfigError: tokenizer: is missing from the checkpoint's config; "
        "give token ids, to generate_ids or score",
        "precision": "ConfigError: precision = 'fp8': must be one of fp32, bf16, fp16",
        "device": "ConfigError: device = 'cuda': is not a device of this machine",
        "small": f"DataError: {tmp_path}/small: the corpus has 3 tokens in 1 documents, fewer than one window of "
        "data.seq_length + 1 = 65; give more text, a shorter data.seq_length or another data.split",
        "foreign": f"DataError: {tmp_path}/foreign: was tokenized with a vocabulary of 1000, and model.vocab_size is "
        "131; set model.vocab_size=1000, or tokenize again",
        "sizes": f"CheckpointError: checkpoint = '{tmp_path}/other': final_norm.norm.bias is (32,) in its files and "
        "(64,) by its config.yaml",
        "truncated": f"CheckpointError: checkpoint = '{tmp_path}/torn': rank-00000.safetensors has 100 bytes of "
        f"{(tmp_path / 'gpt2' / 'rank-00000.safetensors').stat().st_size}; use another one",
    }


def _refusals(directory: str) -> dict[str, Any]:
    from lmscale.evaluate.inference import load
    from lmscale.evaluate.perplexity import measure_corpus

    model, _ = load_pair(directory, "gpt2")
    home = Path(directory)
    computed: list[object] = []
    model.module.register_forward_pre_hook(lambda *_: computed.append(1))
    model.module.trunk = lambda *_: computed.append(1)
    refusals = {
        "no prompt": _refusal(lambda: model.generate_ids([])),
        "empty": _refusal(lambda: model.generate_ids([[]], 5)),
        "id": _refusal(lambda: model.generate_ids([[1, 131]], 5)),
        "long": _refusal(lambda: model.generate_ids([[1], [1] * 60], 5)),
        "full": _refusal(lambda: model.generate_ids([[1] * 64])),
        "scored": _refusal(lambda: model.score([[1] * 65])),
        "none": _refusal(lambda: model.generate_ids([[1]], 0)),
        "tokenizer": _refusal(lambda: model.generate("text")),
        "precision": _refusal(lambda: load(home / "gpt2", precision="fp8")),
        "device": _refusal(lambda: load(home / "gpt2", device="cuda")),
        "small": _refusal(lambda: measure_corpus(model, str(home / "small"))),
        "foreign": _refusal(lambda: measure_corpus(model, str(home / "foreign"))),
        "sizes": _refusal(lambda: load(_with_other_width(home))),
        "truncated": _refusal(lambda: load(_truncated(home))),
    }
    assert not computed
    return refusals


def _refusal(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except (ConfigError, CheckpointError, DataError) as error:
        return f"{type(error).__name__}: {error}"


def _with_other_width(home: Path) -> Path:
    path = Path(shutil.copytree(home / "gpt2", home / "other"))
    config = (path / "config.yaml").read_text().replace("hidden_size: 32", "hidden_size: 64")
    (path / "config.yaml").write_text(config)
    reseal(path)
    return path


def _truncated(home: Path) -> Path:
    path = Path(shutil.copytree(home / "gpt2", home / "torn"))
    with (path / "rank-00000.safetensors").open("r+b") as file:
        file.truncate(100)
    return path


@pytest.mark.distributed
def test_what_an_architecture_cannot_do_is_refused_in_one_line(tmp_path):
    gpt = "model.architecture = 'gpt': cannot propose tokens for masks; "
    bert = "; use fill, generate (fills the masks) or logits"
    t5 = "; use generate, generate_ids, score(sources, targets) or logits"
    assert run_ranks(1, _wrong_calls, str(tmp_path))[0] == {
        "fill gpt": f"ConfigError: {gpt}use generate, generate_ids, score, logits or hidden_states",
        "write bert": f"ConfigError: model.architecture = 'bert': cannot write new tokens{bert}",
        "score bert": f"ConfigError: model.architecture = 'bert': cannot give a text a likelihood{bert}",
        "hidden bert": f"ConfigError: model.architecture = 'bert': cannot show its hidden states{bert}",
        "fill t5": f"ConfigError: model.architecture = 't5': cannot propose tokens for masks{t5}",
        "no mask": "ConfigError: text: holds no mask; write <mask> where a token is to be found",
        "no candidate": "ConfigError: top_k = 0: must be at least 1",
        "long bert": "ConfigError: text: 65 tokens, which is more than model.max_position_embeddings = 64; "
        "shorten the text",
        "no mask token": "ConfigError: tokenizer: has no mask token, which bert needs; "
        "use the tokenizer of the model's run",
        "long bart": "ConfigError: text: 2 tokens and 63 new ones are more than model.max_position_embeddings = 64; "
        "shorten the text or ask for fewer new tokens",
        "long source": "ConfigError: text: 65 tokens, which is more than model.max_position_embeddings = 64; "
        "shorten the text",
        "targets": "ConfigError: targets = 1: there are 2 sources; give one target for each source",
        "no source": [],
        "no length limit": 1,
    }


def _wrong_calls(directory: str) -> dict[str, Any]:
    gpt, _ = load_pair(directory, "gpt2")
    bert, bart, t5 = (stacks.load_pair(directory, family)[0] for family in ("bert", "bart", "t5"))
    refusals = {
        "fill gpt": _refusal(lambda: gpt.fill("a <mask>")),
        "write bert": _refusal(lambda: bert.generate_ids([[1]])),
        "score bert": _refusal(lambda: bert.score("20")),
        "hidden bert": _refusal(lambda: bert.hidden_states("20")),
        "fill t5": _refusal(lambda: t5.fill("20")),
        "no mask": _refusal(lambda: bert.generate("20 30")),
        "no candidate": _refusal(lambda: bert.fill("20 <mask>", 0)),
        "long bert": _refusal(lambda: bert.fill("20 " * 62 + "<mask>")),
        "long bart": _refusal(lambda: bart.generate("20", 63)),
        "long source": _refusal(lambda: bart.generate("20 " * 63)),
        "targets": _refusal(lambda: bart.score(["20", "30"], ["40"])),
        "no source": _refusal(lambda: t5.generate_ids([])),
        "no length limit": _refusal(lambda: len(t5.generate("20 " * 70, 80, stop_at_eos=False))),
    }
    bert.tokenizer.mask_id = None
    return {**refusals, "no mask token": _refusal(lambda: bert.fill([20]))}


@pytest.mark.distributed
def test_ranks_that_do_not_divide_the_model_are_refused(tmp_path):
    path = write_checkpoint(tmp_path / "c", run_keys({**GPT2, "num_attention_heads": 1}), {})
    refusals = run_ranks(2, _load, str(path))
    assert len(set(refusals)) == 1
    assert "model.num_attention_heads = 1: must be a multiple of parallel.tp_size = 2" in refusals[0]


def _load(path: str) -> str:
    from lmscale.evaluate.inference import load

    try:
        load(path)
    except LmscaleError as error:
        return str(error)
    return "loaded"
