"""The held-out loss of a checkpoint is the one that training logs for the same corpus."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import test_objectives
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import run_keys

pytestmark = pytest.mark.distributed

TOLERANCE = 1.0e-6
"""Relative, in fp32: batches of other sizes, summed in another order."""


@pytest.mark.parametrize("isolates", [False, True])
def test_the_loss_is_the_one_that_training_logs(tmp_path, corpus, isolates):
    keys = run_keys(
        corpus,
        tmp_path,
        data__reset_attention_mask=isolates,
        data__valid=[{"name": "held", "prefix": corpus}],
        data__split="100,0,0",
        train__eval_batches=10_000,
        model__init__std=0.3,
    )
    found = run_ranks(1, _measure, keys)[0]
    assert math.isclose(found["logged"], found["measured"].loss, rel_tol=TOLERANCE)
    assert math.isclose(found["measured"].loss, found["in other batches"].loss, rel_tol=TOLERANCE)
    assert math.isclose(found["measured"].perplexity, math.exp(found["logged"]), rel_tol=1e-4)
    windows, length = found["measured"].num_windows, 32
    assert windows == (found["corpus tokens"] - 1) // length
    if isolates:
        assert windows * length - found["documents"] <= found["measured"].num_tokens < windows * length
    else:
        assert found["measured"].num_tokens == windows * length


prepared = test_objectives.prepared


@pytest.mark.parametrize("objective", test_objectives.OBJECTIVES)
def test_the_loss_of_every_objective_is_the_one_that_training_logs(tmp_path, prepared, objective):
    keys = test_objectives.keys_of(objective, prepared, tmp_path, data__split="100,0,0", train__eval_batches=10_000)
    # The corpus of the objective's own kind, which text-to-text takes of pairs.
    keys["data"]["valid"] = [{"name": "held", "prefix": keys["data"]["train"][0]["prefix"]}]
    found = run_ranks(1, _measure, keys)[0]
    assert math.isclose(found["logged"], found["measured"].loss, rel_tol=TOLERANCE)
    assert math.isclose(found["measured"].loss, found["in other batches"].loss, rel_tol=TOLERANCE)
    assert found["measured"].num_windows > 10
    assert found["measured"].num_tokens > 100


def _measure(keys: dict[str, Any]) -> dict[str, Any]:
    from lmscale.config.io import parse_run, show
    from lmscale.data.indexed import IndexedCorpus
    from lmscale.evaluate.inference import load
    from lmscale.evaluate.perplexity import measure_corpus
    from lmscale.feed.loader import build_valid_loaders
    from lmscale.launcher.validate import validate_run
    from lmscale.parallel.topology import init_topology
    from lmscale.pretrain import build_engine
    from lmscale.train.progress import Progress
    from lmscale.train.saving import save_checkpoint
    from lmscale.train.validate import validate

    plan = validate_run(parse_run(keys), 1)
    config = plan.config
    engine = build_engine(config, init_topology(1, 1), plan.zero)
    logged = validate(engine, build_valid_loaders(config, 0, 1))
    path = save_checkpoint(engine, Path(config.output_dir) / "checkpoints", Progress(), show(config))
    model, prefix = load(path), config.data.valid[0].prefix
    corpus = IndexedCorpus(prefix)
    return {
        "logged": logged["valid/held/lm_loss"],
        "measured": measure_corpus(model, prefix),
        "in other batches": measure_corpus(model, prefix, batch_size=37),
        "corpus tokens": corpus.num_tokens,
        "documents": corpus.num_documents,
    }
