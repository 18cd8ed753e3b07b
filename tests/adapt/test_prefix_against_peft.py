"""Prefixes and prompts compute what PEFT computes of the same weights, and get the same gradients."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lmscale.convert.importing import import_hf
from lmscale.evaluate.loading import read_config
from lmscale.feed.prompt import with_prompt
from lmscale.plan.adaptation import attentions
from tests.adapt.text_bases import compute
from tests.convert.models import VOCAB_SIZE, build, save

pytestmark = pytest.mark.distributed

TOLERANCE = 1.0e-5
"""max |a - b| / max |b| in fp32: the same sums in another order."""
LENGTH, SIZE, PAD = 4, 9, 1
ENCODERS = {"bert": "bert", "roberta": "roberta"}


def _adapted(case: str, model: Any, method: str) -> Any:
    """Let PEFT adapt a model of transformers, of an encoder the part below its head."""
    task = "FEATURE_EXTRACTION" if case in ENCODERS else "CAUSAL_LM"
    below = getattr(model, ENCODERS[case]) if case in ENCODERS else model
    torch.manual_seed(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT calls of transformers is deprecated there
        import peft

        config = getattr(peft, method)(task_type=task, num_virtual_tokens=LENGTH)
        return peft.get_peft_model(below, config).eval()


def _inputs(case: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Draw tokens, the second row of an encoder's padded, and say where there is a token, int64 [b, s]."""
    tokens = torch.randint(5, VOCAB_SIZE, (2, SIZE), generator=torch.Generator().manual_seed(6))
    is_token = torch.ones_like(tokens)
    if case not in ENCODERS:
        return {"tokens": tokens}, is_token
    is_token[1, 6:] = 0
    tokens[1, 6:] = PAD
    zeros = torch.zeros_like(tokens)
    return {
        "tokens": tokens,
        "document_ids": is_token - 1,
        "token_types": zeros,
        "masked_positions": zeros[:, :2],
    }, is_token


def _theirs(case: str, adapted: Any, inputs: dict[str, torch.Tensor], is_token: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = adapted(input_ids=inputs["tokens"], attention_mask=is_token)
    return out.last_hidden_state if case in ENCODERS else out.logits


def _gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _compare(
    base: Path, adapt: dict[str, Any], tensors: dict[str, torch.Tensor], inputs: Any, theirs: Any, is_compared: Any
) -> dict[str, torch.Tensor]:
    """Compare outputs where there are tokens, run their backward, and return our gradients."""
    cotangent = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(7)) * is_compared[..., None]
    (theirs * cotangent).sum().backward()
    ours, grads = compute(str(base), adapt, tensors, inputs, cotangent)
    assert ours.shape == theirs.shape
    where = is_compared.bool()
    assert _gap(ours[where], theirs.detach()[where]) < TOLERANCE
    return grads


@pytest.mark.parametrize("case", ["gpt2", "llama", "bert", "roberta"])
def test_a_prefix_is_pefts(case: str, tmp_path: Path) -> None:
    model = build(case)
    import_hf(save(model, tmp_path / "source"), tmp_path / "base")
    adapted = _adapted(case, model, "PrefixTuningConfig")
    flat = adapted.prompt_encoder["default"].embedding.weight
    shape = read_config(tmp_path / "base").model
    by_layer = (LENGTH, shape.num_layers, 2, shape.query_groups, shape.head_size)
    names = {f"{name}.prefix.table": layer for name, _, layer in attentions(shape)}
    tensors = {name: flat.detach().view(by_layer)[:, layer].clone() for name, layer in names.items()}
    inputs, is_token = _inputs(case)
    adapt = {"method": "prefix_tuning", "length": LENGTH, "projection": None}
    theirs = _theirs(case, adapted, inputs, is_token)
    grads = _compare(tmp_path / "base", adapt, tensors, inputs, theirs, is_token)
    for name, layer in names.items():
        assert _gap(grads[name], flat.grad.view(by_layer)[:, layer]) < TOLERANCE


@pytest.mark.parametrize("case", ["gpt2", "llama", "bert"])
def test_a_prompt_is_pefts(case: str, tmp_path: Path) -> None:
    model = build(case)
    import_hf(save(model, tmp_path / "source"), tmp_path / "base")
    adapted = _adapted(case, model, "PromptTuningConfig")
    table = adapted.prompt_encoder["default"].embedding.weight
    inputs, is_token = _inputs(case)
    arrays = with_prompt({name: tensor.numpy() for name, tensor in inputs.items()}, LENGTH)
    ours = {name: torch.from_numpy(array) for name, array in arrays.items()}
    name = "input_embedding.prompt.table"
    adapt = {"method": "prompt_tuning", "length": LENGTH}
    theirs = _theirs(case, adapted, inputs, is_token)
    whole = torch.cat((torch.ones(2, LENGTH, dtype=torch.int64), is_token), dim=1)
    grads = _compare(tmp_path / "base", adapt, {name: table.detach().clone()}, ours, theirs, whole)
    assert _gap(grads[name], table.grad) < TOLERANCE
