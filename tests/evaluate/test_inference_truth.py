"""Our models against transformers' GPT-2 and Llama: the same weights, the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lmscale.evaluate.inference import load
from lmscale.evaluate.loading import DTYPES
from lmscale.models.build import logical_name
from lmscale.models.loss import LanguageModelLoss
from tests.distributed.ranks import run_ranks
from tests.evaluate.reference import FAMILIES, largest_error, load_pair, some_tokens, to_logical

pytestmark = pytest.mark.distributed

TOLERANCE = 1.0e-5
"""max |a - b| / max |b| in fp32: the same sums in another order."""
HALF_RATIO = 1.5
"""Our rounding error over that of transformers in the same precision: both round after each operation, at places that
differ a little. How large the error itself is depends on the model, and these have unusually large weights."""


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(tmp_path, family):
    assert run_ranks(1, _logits_error, str(tmp_path), family)[0] <= TOLERANCE


def _logits_error(directory: str, family: str) -> float:
    ours, reference = load_pair(directory, family)
    tokens = some_tokens(2, 40)
    with torch.no_grad():
        return largest_error(ours.logits(tokens), reference(tokens).logits)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_rounds_no_worse_than_transformers(tmp_path, family, precision):
    ours, theirs, dtypes = run_ranks(1, _half_errors, str(tmp_path), family, precision)[0]
    assert dtypes == {DTYPES[precision]}
    assert 0 < ours <= HALF_RATIO * theirs


def _half_errors(directory: str, family: str, precision: str) -> tuple[float, float, set[torch.dtype]]:
    """Compute the root mean square errors of (ours, transformers) in half precision against transformers in fp32."""
    _, reference = load_pair(directory, family)
    half = load(Path(directory) / family, precision=precision)
    tokens = some_tokens(4, 60)
    with torch.no_grad():
        truth = reference(tokens).logits
        theirs = reference.to(DTYPES[precision])(tokens).logits.float()
    ours, dtypes = half.logits(tokens), {parameter.dtype for parameter in half.module.parameters()}
    return float((ours - truth).square().mean().sqrt()), float((theirs - truth).square().mean().sqrt()), dtypes


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_the_loss_equal_those_of_transformers(tmp_path, family):
    errors = run_ranks(1, _gradient_errors, str(tmp_path), family)[0]
    assert len(errors) > 10
    assert {name: error for name, error in errors.items() if error > TOLERANCE} == {}


def _gradient_errors(directory: str, family: str) -> dict[str, float]:
    ours, reference = load_pair(directory, family)
    tokens = some_tokens(2, 41)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    logits = ours.module((inputs, torch.arange(40).expand(2, 40), torch.zeros_like(inputs)))
    weight = torch.tensor([1 / labels.numel()])
    LanguageModelLoss(ours.context)(logits, (labels, torch.ones(labels.shape), weight)).backward()
    F.cross_entropy(reference(inputs).logits.flatten(0, 1), labels.flatten()).backward()
    truth = to_logical(family, {name: p.grad for name, p in reference.named_parameters()}, padding=0.0)
    mine = {logical_name(ours.module, name): p.grad for name, p in ours.module.named_parameters()}
    assert mine.keys() == truth.keys()
    return {name: largest_error(mine[name], truth[name]) for name in truth}


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_hidden_states_equal_those_of_transformers(tmp_path, family):
    errors = run_ranks(1, _reading_errors, str(tmp_path), family)[0]
    assert {name: error for name, error in errors.items() if error > TOLERANCE} == {}


def _reading_errors(directory: str, family: str) -> dict[str, float]:
    ours, reference = load_pair(directory, family)
    texts = [some_tokens(length, seed=length).tolist() for length in (17, 30, 1, 2)]
    errors = {}
    # Two at a time: batches of unequal lengths, and more than one.
    for ids, score in zip(texts, ours.score(texts, batch_size=2), strict=True):
        assert score.token_ids == ids
        assert len(score.log_likelihoods) == len(ids) - 1
        if len(ids) > 1:
            with torch.no_grad():
                log_p = reference(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            truth = log_p.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
            errors[f"score {len(ids)}"] = largest_error(torch.tensor(score.log_likelihoods), truth)
            errors[f"total {len(ids)}"] = abs(score.total / float(truth.sum()) - 1)
    with torch.no_grad():
        states = reference(torch.tensor([texts[0]]), output_hidden_states=True).hidden_states
    errors["hidden states"] = largest_error(ours.hidden_states(texts[0]), torch.cat(states))
    return errors
