"""Imported encoders and encoder-decoders compute the logits of transformers, on one rank and on two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmscale.convert.importing import import_hf
from tests.convert.models import VOCAB_SIZE, build, save
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed

TOLERANCE = 1.0e-5
"""max |a - b| / max |b| in fp32: the same sums in another order."""
ENCODERS = ["bert", "roberta"]
STACKS = ["bart", "t5", "t5 v1.1"]


def tokens_of(rows: int, length: int, seed: int) -> torch.Tensor:
    """Draw ids from 4 on: those below are padding to one family or another."""
    return torch.randint(4, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits_in_rank(checkpoint: str) -> torch.Tensor:
    """Compute a checkpoint's logits on this rank's share of the model."""
    from lmscale.evaluate.inference import load

    model = load(checkpoint)
    with torch.no_grad():
        if model.config.model.has_decoder_stack:
            return model.logits(tokens_of(3, 14, 1), tokens_of(3, 9, 2))
        tokens = tokens_of(3, 14, 1)
        return model.logits(tokens, torch.arange(14).expand_as(tokens))


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("case", ENCODERS + STACKS)
def test_logits_of_an_import_equal_those_of_transformers(case: str, num_ranks: int, tmp_path: Path) -> None:
    model = build(case)
    import_hf(save(model, tmp_path / "source"), tmp_path / "checkpoint")
    tokens, written = tokens_of(3, 14, 1), tokens_of(3, 9, 2)
    with torch.no_grad():
        if case in STACKS:
            theirs = model(input_ids=tokens, decoder_input_ids=written).logits
        elif case == "bert":
            theirs = model(input_ids=tokens).prediction_logits
        else:
            theirs = model(input_ids=tokens, position_ids=torch.arange(2, 16).expand_as(tokens)).logits
    for ours in run_ranks(num_ranks, logits_in_rank, str(tmp_path / "checkpoint")):
        assert float((ours - theirs).abs().max() / theirs.abs().max()) <= TOLERANCE
