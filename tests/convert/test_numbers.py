"""Imported models compute what transformers computes, and exported ones what lmscale computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmscale.config.checkpoint_paths import find_checkpoint
from lmscale.convert.exporting import export_hf
from lmscale.convert.importing import import_hf
from tests.convert.models import CASES, VOCAB_SIZE, build, reload, save
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import GPT, LLAMA, losses, pretrain_on_ranks, run_keys

pytestmark = pytest.mark.distributed

TOLERANCE = 1.0e-5
"""max |a - b| / max |b| in fp32: the same sums in another order."""
DECODERS = [case for case in CASES if case.startswith(("gpt2", "llama"))]
LAYOUTS = {
    "tp2": (2, {"parallel__tp_size": 2, "deepspeed__zero_optimization__stage": 1}),
    "zero3": (2, {"deepspeed__zero_optimization__stage": 3}),
    "tp2 x pp2": (4, {"parallel__tp_size": 2, "parallel__pp_size": 2}),
}


def largest_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def some_tokens(vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    return torch.randint(vocab_size, (2, 20), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("case", DECODERS)
def test_logits_and_greedy_tokens_of_an_import_equal_those_of_transformers(tmp_path, case):
    model = build(case)
    import_hf(save(model, tmp_path / "source"), tmp_path / "checkpoint")
    logits, written = run_ranks(1, _compute, str(tmp_path / "checkpoint"))[0]
    tokens = some_tokens()
    with torch.no_grad():
        assert largest_error(logits, model(tokens).logits) <= TOLERANCE
        theirs = model.generate(tokens, do_sample=False, max_new_tokens=8, pad_token_id=0)
    assert written == theirs[:, tokens.size(1) :].tolist()


def _compute(checkpoint: str, vocab_size: int = VOCAB_SIZE) -> tuple[torch.Tensor, list[list[int]]]:
    from lmscale.evaluate.inference import load
    from lmscale.evaluate.sampling import Sampling

    model, tokens = load(checkpoint), some_tokens(vocab_size)
    with torch.no_grad():
        return model.logits(tokens), model.generate_ids(tokens.tolist(), 8, Sampling(temperature=0.0))


@pytest.mark.parametrize(
    ("model", "architecture", "layout"),
    [
        (GPT, "GPT2LMHeadModel", "tp2 x pp2"),
        (LLAMA, "LlamaForCausalLM", "tp2"),
        (LLAMA, "LlamaForCausalLM", "zero3"),
    ],
)
def test_a_checkpoint_of_any_layout_is_exported(tmp_path, corpus, model, architecture, layout):
    num_ranks, changes = LAYOUTS[layout]
    keys = run_keys(corpus, tmp_path / "run", model=model, train__train_tokens=8 * 32 * 3, **changes)
    pretrain_on_ranks(num_ranks, keys)
    export_hf(tmp_path / "run", tmp_path / "exported")
    loaded = reload(architecture, tmp_path / "exported")
    logits, _ = run_ranks(1, _compute, str(tmp_path / "run"), 500)[0]
    with torch.no_grad():
        assert largest_error(logits, loaded(some_tokens(500)).logits) <= TOLERANCE


def test_a_run_starts_from_an_import_on_another_layout_and_resumes_from_it(tmp_path, corpus):
    source = save(build("llama", vocab_size=500), tmp_path / "source")
    import_hf(source, tmp_path / "imported")
    shape = {
        **LLAMA,
        "num_layers": 3,
        "hidden_size": 48,
        "num_attention_heads": 6,
        "ffn_hidden_size": 80,
        "norm_eps": 1e-6,
        "rope_theta": 5e5,
    }
    starts = []
    for name, key in (("init", "model__init_from"), ("resume", "checkpoint__resume")):
        changes = {key: str(tmp_path / "imported"), "parallel__tp_size": 2, "train__train_tokens": 8 * 32 * 3}
        keys = run_keys(corpus, tmp_path / name, model=dict(shape), **changes)
        starts.append(losses(pretrain_on_ranks(2, keys)))
        assert find_checkpoint(Path(keys["output_dir"]) / "checkpoints") is not None
    fresh = run_keys(corpus, tmp_path / "fresh", model=shape, parallel__tp_size=2, train__train_tokens=8 * 32 * 3)
    assert starts[0] == starts[1]
    assert abs(starts[0][0] - losses(pretrain_on_ranks(2, fresh))[0]) > 0.1
