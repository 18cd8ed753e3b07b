"""A change of the blend in mid-run is a stage that every later manifest names, and samples go on at the count reached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmscale.config.checkpoint_paths import find_checkpoint
from lmscale.config.io import parse_run, show
from lmscale.errors import ConfigError
from lmscale.feed.loader import build_blend
from lmscale.launcher.validate import validate_run
from lmscale.train.progress import Progress
from lmscale.train.stages import stages_from_here, stages_of
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Keys, final_state, pretrain_in_rank, pretrain_on_ranks, run_keys, write_corpus

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    prefix = tmp_path_factory.mktemp("other") / "tokens"
    write_corpus(prefix, np.random.default_rng(8), num_tokens=10_000)
    return str(prefix)


def manifest_of(keys: Keys) -> dict[str, Any]:
    path = find_checkpoint(Path(keys["output_dir"], "checkpoints"))
    assert path is not None
    return json.loads((path / "manifest.json").read_text())


def _samples_read(keys: Keys) -> list[list[int]]:
    """Train, and return where each step's samples came from: source, epoch, number."""
    from lmscale.data.blend import Blend

    read, found = Blend.read, []

    def note_and_read(self: Blend, located: Any) -> Any:
        found.append(np.stack([located.source, located.epoch, located.number]).T.tolist())
        return read(self, located)

    Blend.read = note_and_read  # type: ignore[method-assign]
    try:
        pretrain_in_rank(keys)
    finally:
        Blend.read = read  # type: ignore[method-assign]
    return [sample for samples in found for sample in samples]


def test_run_goes_on_with_another_blend_as_a_stage(corpus: str, other: str, tmp_path: Path) -> None:
    first = [{"prefix": corpus, "weight": 1.0}]
    second = [*first, {"prefix": other, "weight": 3.0}]
    split = {"data__split": "1,0,0"}
    keys = run_keys(corpus, tmp_path, data__train=first, train__stop_at_step=3, **split)
    pretrain_on_ranks(1, keys)
    changed = run_keys(corpus, tmp_path, data__train=second, train__stop_at_step=5, **split)
    with pytest.raises(ConfigError, match=r"checkpoint.allow_change = \['data'\]"):
        validate_run(parse_run(changed), 1)

    changed["checkpoint"]["allow_change"] = ["data"]
    (samples,) = run_ranks(1, _samples_read, changed)
    located = build_blend(parse_run(changed)).locate(np.arange(24, 40))
    assert samples[:16] == np.stack([located.source, located.epoch, located.number]).T.tolist()
    stages = manifest_of(changed)["stages"]
    assert [(stage["from_step"], stage["from_samples"], stage["from_tokens"]) for stage in stages] == [
        (0, 0, 0),
        (3, 24, 24 * 32),
    ]
    assert [[source["weight"] for source in stage["train"]] for stage in stages] == [[1.0], [1.0, 3.0]]
    assert [source["prefix"] for source in stages[1]["train"]] == [corpus, other]

    ends = run_keys(corpus, tmp_path, data__train=second, **split)  # no leave to change is needed any more
    run = pretrain_on_ranks(1, ends)
    assert [record["consumed_samples"] for record in run] == [8, 16, 24, 32, 40, 48]
    assert manifest_of(ends)["stages"] == stages

    whole = run_keys(corpus, tmp_path / "whole", data__train=second, **split)
    whole["checkpoint"] |= {
        "allow_change": ["data"],
        "resume": str(tmp_path / "checkpoints" / "step-00000003"),
    }
    pretrain_on_ranks(1, whole)
    assert final_state(whole) == final_state(ends)
    assert manifest_of(whole)["stages"] == stages


def test_stages_are_those_before_the_checkpoint_and_what_is_read_now(corpus: str, other: str, tmp_path: Path) -> None:
    one, both = (
        parse_run(run_keys(corpus, tmp_path, data__train=[{"prefix": prefix} for prefix in prefixes]))
        for prefixes in ([corpus], [corpus, other])
    )
    begun = stages_from_here(one, Progress(), [])
    assert [stage["from_step"] for stage in begun] == [0]
    assert stages_from_here(one, Progress(5, 40, 1280), begun) == begun
    changed = stages_from_here(both, Progress(5, 40, 1280), begun)
    assert [stage["from_samples"] for stage in changed] == [0, 40]
    # A run that begins anew from before the change, or from the very checkpoint, has changed once.
    assert stages_from_here(both, Progress(5, 40, 1280), changed) == changed
    assert stages_from_here(one, Progress(5, 40, 1280), changed) == begun
    assert [s["from_step"] for s in stages_from_here(both, Progress(2, 16, 512), changed)] == [0, 2]
    reseeded = one.model_copy(update={"train": one.train.model_copy(update={"seed": 5})})
    assert [stage["seed"] for stage in stages_from_here(reseeded, Progress(5, 40, 1280), begun)] == [1234, 5]


def test_checkpoint_without_stages_has_that_of_its_config(corpus: str, tmp_path: Path) -> None:
    config = parse_run(run_keys(corpus, tmp_path / "run"))
    (tmp_path / "config.yaml").write_text(show(config))
    (stage,) = stages_of(tmp_path, {})
    assert stage["from_step"] == 0
    assert stage["train"] == [{"prefix": corpus, "weight": 1.0, "content_hash": None}]
    assert stages_from_here(config, Progress(5, 40, 1280), [stage]) == [stage]
