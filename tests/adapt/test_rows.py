"""Rows of a batch that name adaptations of their own compute what each does alone, and train theirs alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapt.bases import Bases
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Keys

pytestmark = pytest.mark.distributed

TOLERANCE = 1.0e-6
"""Absolute, of logits below 1: batched products sum in another order."""
ADAPTS: dict[str, Keys] = {
    "lora": {"method": "lora", "rank": 3, "targets": ["query", "value", "fc2", "embedding"]},
    "houlsby": {"method": "adapter", "width": 5, "init": "normal", "init_std": 0.1, "norms": False},
    "pfeiffer": {"method": "adapter", "variant": "pfeiffer", "width": 5, "activation": "gelu", "init_std": 0.1},
    "bitfit": {"method": "bitfit"},
    "parallel": {"method": "adapter", "variant": "parallel", "width": 5, "activation": "gelu", "init": "zero_up"},
}
SPLIT: Keys = {"parallel__tp_size": 2, "parallel__sequence_parallel": True}


def rows_and_singles(keys: Keys) -> dict[str, Any]:
    """Compute logits of a batch by rows, then each row's with its adaptation alone; and which entries get gradients."""
    from lmscale.config.io import parse_run
    from lmscale.config.run import ZeroChoice
    from lmscale.models.build import logical_name
    from lmscale.parallel.topology import init_topology
    from lmscale.plan.adaptation import adaptation_of, base_bias_of
    from lmscale.pretrain import build_engine
    from lmscale.train.start import begin

    def build(entries: int) -> Any:
        config = parse_run({**keys, "adapt": {**keys["adapt"], "entries": entries}})
        topology = init_topology(config.parallel.tp_size, 1)
        engine = build_engine(config, topology, ZeroChoice())
        begin(engine, config, adaptation_of(config))
        return engine.model.eval()

    tokens = torch.randint(1, 400, (4, 16), generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([2, 0, 2, 3])
    several, single = build(5), build(1)
    mine = {logical_name(several, name): p for name, p in several.named_parameters() if p.requires_grad}
    own = {base_bias_of(name) or name: p for name, p in mine.items()}
    with torch.no_grad():
        for number, parameter in enumerate(mine.values()):
            parameter.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(number))
    logits = several((tokens, ids))
    logits.square().sum().backward()
    alone = []
    for row, entry in enumerate(ids.tolist()):
        with torch.no_grad():
            for name, parameter in single.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(own[logical_name(single, name)][entry])
            alone.append(single(tokens[row : row + 1]))
    touched = [
        {entry for entry in range(5) if parameter.grad is not None and parameter.grad[entry].any()}
        for parameter in mine.values()
    ]
    return {"rows": logits.detach(), "alone": torch.cat(alone), "touched": touched}


@pytest.mark.parametrize("is_split", [False, True], ids=["one rank", "tp2-sp"])
@pytest.mark.parametrize("method", ADAPTS)
def test_rows_compute_what_each_does_alone_and_train_their_own(
    method: str, is_split: bool, bases: Bases, tmp_path: Path
) -> None:
    changes = SPLIT if is_split else {}
    keys = bases.keys("gpt", tmp_path, ADAPTS[method], deepspeed__zero_optimization__stage=0, **changes)
    for found in run_ranks(2 if is_split else 1, rows_and_singles, keys):
        torch.testing.assert_close(found["rows"], found["alone"], rtol=1.0e-5, atol=TOLERANCE)
        assert not torch.allclose(found["rows"][0], found["rows"][1])
        assert all(entries == {0, 2, 3} for entries in found["touched"])
