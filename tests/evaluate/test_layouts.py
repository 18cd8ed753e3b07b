"""A checkpoint of any layout is read on one rank, and under tensor parallelism, as the same model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.distributed.runs import GPT, LLAMA, run_keys

pytestmark = pytest.mark.distributed

TOLERANCE = 1.0e-5
"""max |a - b| / max |b| in fp32: tensor parallelism adds up in another order."""
SHAPES = {"gpt": GPT, "llama": {**LLAMA, "num_query_groups": 2}}
LAYOUTS = {
    "one rank": (1, {}),
    "tp2 zero3": (2, {"parallel__tp_size": 2, "deepspeed__zero_optimization__stage": 3}),
    "pp2 zero1": (2, {"parallel__pp_size": 2, "deepspeed__zero_optimization__stage": 1}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_checkpoints_of_every_layout_load_on_one_rank_and_on_two(tmp_path, corpus, shape):
    truth = None
    for number, (ranks, changes) in enumerate(LAYOUTS.values()):
        keys = run_keys(corpus, tmp_path / str(number), model=SHAPES[shape], model__init__std=0.3, **changes)
        run_ranks(ranks, _save, keys)
        on_one, on_two = run_ranks(1, _read, keys["output_dir"])[0], run_ranks(2, _read, keys["output_dir"])
        # One seed gives the same initial weights on every layout.
        truth = truth or on_one
        assert torch.equal(on_one["logits"], truth["logits"])
        for rank in on_two:
            assert _error(rank["logits"], truth["logits"]) <= TOLERANCE
            assert _error(rank["scores"], truth["scores"]) <= TOLERANCE
            assert _error(rank["hidden states"], truth["hidden states"]) <= TOLERANCE
            assert rank["greedy"] == truth["greedy"]
            assert rank["sampled"] == on_two[0]["sampled"], "the ranks drew different tokens"
        assert math.isclose(on_two[0]["loss"], truth["loss"], rel_tol=TOLERANCE)


def _error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours - truth).abs().max() / truth.abs().max())


def _save(keys: dict[str, Any]) -> None:
    import torch.distributed as dist

    from lmscale.config.io import parse_run, show
    from lmscale.launcher.validate import validate_run
    from lmscale.parallel.topology import init_topology
    from lmscale.pretrain import build_engine
    from lmscale.train.progress import Progress
    from lmscale.train.saving import save_checkpoint

    plan = validate_run(parse_run(keys), dist.get_world_size())
    topology = init_topology(plan.config.parallel.tp_size, plan.config.parallel.pp_size)
    engine = build_engine(plan.config, topology, plan.zero)
    save_checkpoint(engine, Path(keys["output_dir"]) / "checkpoints", Progress(), show(plan.config))


def _read(run: str) -> dict[str, Any]:
    from lmscale.config.io import load_run
    from lmscale.evaluate.inference import load
    from lmscale.evaluate.perplexity import measure_corpus
    from lmscale.evaluate.sampling import Sampling

    model = load(run)
    tokens = torch.randint(0, 500, (3, 20), generator=torch.Generator().manual_seed(0))
    texts = [row[: 8 + number].tolist() for number, row in enumerate(tokens)]
    prefix = load_run(next(Path(run).glob("checkpoints/step-*")) / "config.yaml").data.train[0].prefix
    return {
        "logits": model.logits(tokens),
        "scores": torch.tensor([score.total for score in model.score(texts)]),
        "hidden states": model.hidden_states(texts[0]),
        "greedy": model.generate_ids(texts, 12, Sampling(temperature=0.0)),
        "sampled": model.generate_ids(texts, 12, Sampling()),
        "loss": measure_corpus(model, prefix, batch_size=64).loss,
    }
