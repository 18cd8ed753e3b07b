"""BERT and RoBERTa fill masks as transformers' models with the same weights would."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmscale.evaluate.masked import MaskedModel
from tests.distributed.ranks import run_ranks
from tests.evaluate.reference import largest_error, some_tokens
from tests.evaluate.stacks import BOS, CLS, EOS, MASK, MASKED, PAD, SEP, load_pair

pytestmark = pytest.mark.distributed

TOLERANCE = 1.0e-5
"""max |a - b| / max |b| in fp32: the same sums in another order."""
PROMPTS = ["20 <mask> 30 40", "<mask>", "50 60 70 <mask><mask> 80 90 <mask>"]
READ = [[20, MASK, 30, 40], [MASK], [50, 60, 70, MASK, MASK, 80, 90, MASK]]


@pytest.mark.parametrize("family", MASKED)
def test_logits_equal_those_of_transformers(tmp_path, family):
    assert max(run_ranks(1, _logits_errors, str(tmp_path), family)[0]) <= TOLERANCE


def _logits_errors(directory: str, family: str) -> list[float]:
    ours, reference = load_pair(directory, family)
    assert isinstance(ours, MaskedModel)
    tokens = some_tokens(2, 30).clamp(min=SEP + 1)
    tokens[1, 20:] = PAD
    ids = -(tokens == PAD).long()
    types = (torch.arange(30) > 11).long().expand(2, 30) if family == "bert" else torch.zeros_like(tokens)
    places = torch.tensor([[0, 7, 29], [3, 19, 0]])
    with torch.no_grad():
        truth = reference(tokens, attention_mask=1 + ids, token_type_ids=types)
    logits = truth.prediction_logits if family == "bert" else truth.logits
    wanted = logits.gather(1, places[..., None].expand(-1, -1, logits.size(2)))
    return [
        largest_error(ours.logits(tokens, places, ids, types), wanted),
        largest_error(ours.logits(tokens[:1], places[:1]), _alone(reference, tokens[:1], family)[:, places[0]]),
    ]


@torch.no_grad()
def _alone(reference: Any, tokens: torch.Tensor, family: str) -> torch.Tensor:
    out = reference(tokens)
    logits: torch.Tensor = out.prediction_logits if family == "bert" else out.logits
    return logits


@pytest.mark.parametrize("family", MASKED)
def test_masks_are_filled_with_the_likeliest_tokens(tmp_path, family):
    found, expected = run_ranks(1, _fill, str(tmp_path), family)[0]
    for mine, truth in zip(found["candidates"], expected["candidates"], strict=True):
        assert [(c.token_id, c.text) for c in mine] == [(token, text) for token, text, _ in truth]
        assert [c.probability for c in mine] == pytest.approx([share for _, _, share in truth], rel=1e-4)
    assert found["filled"] == expected["filled"]
    assert found["alone"] == expected["filled"], "padding shows"
    assert found["top_k 1"] == found["filled"]
    assert found["seed 1"] == found["seed 1 again"] != found["seed 2"]


def _fill(directory: str, family: str) -> tuple[dict[str, Any], dict[str, Any]]:
    ours, reference = load_pair(directory, family)
    first, last = (CLS, SEP) if family == "bert" else (BOS, EOS)
    candidates, filled = [], []
    for ids in READ:
        logits = _alone(reference, torch.tensor([[first, *ids, last]]), family)[0, 1:-1]
        gaps = [place for place, token in enumerate(ids) if token == MASK]
        best = logits.softmax(-1).topk(3, dim=-1)
        rows = zip(best.indices[gaps].tolist(), best.values[gaps].tolist(), strict=True)
        tops = [[(t, ours.tokenizer.decode([t]), p) for t, p in zip(*row, strict=True)] for row in rows]
        candidates.append(tops)
        chosen = iter(top[0][0] for top in tops)
        filled.append(ours.tokenizer.decode([next(chosen) if token == MASK else token for token in ids]))
    mine = {
        "candidates": ours.fill(PROMPTS[2], 3),
        "filled": ours.generate(PROMPTS),
        "alone": [ours.generate(prompt)[0] for prompt in PROMPTS],
        "top_k 1": ours.generate(PROMPTS, temperature=1.0, top_k=1),
        "seed 1": ours.generate(PROMPTS * 3, temperature=1.0, seed=1),
        "seed 1 again": ours.generate(PROMPTS * 3, temperature=1.0, seed=1),
        "seed 2": ours.generate(PROMPTS * 3, temperature=1.0, seed=2),
    }
    return mine, {"candidates": candidates[2], "filled": filled}


@pytest.mark.parametrize("family", MASKED)
def test_two_ranks_fill_as_one(tmp_path, family):
    (one,) = run_ranks(1, _on_ranks, str(tmp_path), family)
    for rank in run_ranks(2, _on_ranks, str(tmp_path), family):
        assert rank["filled"] == one["filled"]
        assert largest_error(rank["logits"], one["logits"]) <= TOLERANCE


def _on_ranks(directory: str, family: str) -> dict[str, Any]:
    import torch.distributed as dist

    ours, _ = load_pair(f"{directory}/{dist.get_world_size()}-{dist.get_rank()}", family)
    tokens = torch.tensor([[CLS, *READ[2], SEP]])
    return {"filled": ours.generate(PROMPTS), "logits": ours.logits(tokens, torch.tensor([[4, 5, 8]]))}
