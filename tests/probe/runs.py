"""Runs of probing on ranks, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Keys
from tests.finetune_runs import finetune_in_rank, task_keys


def probing_keys(task: str, base: str, home: Path, output_dir: Path, adapt: Keys | None = None, **changes: Any) -> Keys:
    """Make the config of a run that probes a base with one of the tasks in `home`."""
    return task_keys(task, base, home, output_dir, {"method": "probing", **(adapt or {})}, **changes)


def probe_on_ranks(world_size: int, keys: Keys) -> Keys:
    """Probe on forked ranks and return results.json."""
    assert run_ranks(world_size, finetune_in_rank, keys) == [0] * world_size
    return json.loads(Path(keys["output_dir"], "results.json").read_text())


def features_of(keys: Keys) -> dict[str, torch.Tensor]:
    """Read the features that a run keeps, by the name of the file."""
    files = sorted(Path(keys["output_dir"], "features").glob("*.safetensors"))
    return {file.stem: load_file(file)["features"] for file in files}


def probe_without_model(keys: Keys) -> int:
    """Probe on this rank, where to build a model is an error."""
    import lmscale.probe.run as run

    build = run.build_engine

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was built")

    run.build_engine = refuse
    try:
        return finetune_in_rank(keys)
    finally:
        run.build_engine = build


def changed_weights(keys: Keys) -> list[str]:
    """Probe on this rank, and name the weights of the engine that are not the base's, bit for bit."""
    import lmscale.probe.run as run
    from lmscale.models.build import logical_name
    from lmscale.train.checkpoint_reader import PARAMETER, CheckpointReader

    engines = []
    build = run.build_engine

    def keep(*args: Any, **kwargs: Any) -> Any:
        engines.append(build(*args, **kwargs))
        return engines[-1]

    run.build_engine = keep
    try:
        assert finetune_in_rank(keys) == 0
    finally:
        run.build_engine = build
    reader = CheckpointReader(Path(keys["model"]["init_from"]))
    stored, model = reader.shapes(), engines[0].model
    weights = {logical_name(model, name): parameter.detach() for name, parameter in model.named_parameters()}
    common = stored.keys() & weights.keys()
    assert len(common) > 20
    return [name for name in common if not torch.equal(reader.logical(PARAMETER, name), weights[name])]
