"""Packed documents under data.reset_attention_mask: each is read as if it stood alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lmscale.objectives.causal_lm import restarting_positions
from tests.distributed.ranks import run_ranks
from tests.evaluate.reference import FAMILIES, largest_error, load_pair, some_tokens

pytestmark = pytest.mark.distributed

TOLERANCE = 1.0e-5
LENGTHS = (9, 1, 17, 13)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_packed_document_equal_those_of_the_document_alone(tmp_path, family):
    isolated, crossing = run_ranks(1, _errors, str(tmp_path), family)[0]
    assert max(isolated) <= TOLERANCE
    assert min(crossing[1:]) > 0.01, "without document ids the later documents would see the earlier ones"


def _errors(directory: str, family: str) -> tuple[list[float], list[float]]:
    model, _ = load_pair(directory, family)
    documents = [some_tokens(1, length, seed=length) for length in LENGTHS]
    packed = torch.cat(documents, dim=1)
    ids = np.repeat(np.arange(len(LENGTHS)), LENGTHS)[None]
    positions = torch.from_numpy(restarting_positions(ids))
    isolated = model.logits(packed, positions, torch.from_numpy(ids)).split(LENGTHS, dim=1)
    crossing = model.logits(packed).split(LENGTHS, dim=1)
    alone = [model.logits(document) for document in documents]
    return (
        [largest_error(part, truth) for part, truth in zip(isolated, alone, strict=True)],
        [largest_error(part, truth) for part, truth in zip(crossing, alone, strict=True)],
    )
