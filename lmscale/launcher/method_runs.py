"""The runs of a comparison: one task, several methods, several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lmscale.config.adapt import METHODS
from lmscale.config.io import load_run
from lmscale.config.run import RunConfig
from lmscale.config.validation import nearest
from lmscale.errors import ConfigError


@dataclass(frozen=True)
class MethodRun:
    """A run of a comparison.

    Attributes:
        name: of the method, as the user wrote it.
        seed: of the run.
        config: to train.
    """

    name: str
    seed: int
    config: RunConfig


def method_runs(
    run: str, methods: Sequence[str], seeds: Sequence[int], output: Path, overrides: Sequence[str] = ()
) -> list[MethodRun]:
    """Make the configs of a comparison.

    A method is METHOD, or NAME=METHOD, with keys behind commas that hold for it alone: "lora", "lora,optim.lr=1e-3",
    "thin=lora,adapt.rank=1". The file's own adapt section holds for its own method, and the defaults of `adapt` for others.

    Args:
        run: the YAML of a run with a task.
        methods: what to compare.
        seeds: each method is trained with each of them.
        output: directory; a run's is output/NAME/seed-SEED.
        overrides: keys for all runs.

    Raises:
        ConfigError: if a method is unknown or named twice, or a config is wrong.
    """
    own = load_run(run, overrides)
    if own.task is None:
        raise ConfigError("is required to compare methods", field="task", remedy="add the section")
    runs, names = [], set()
    for text in methods:
        first, *keys = text.split(",")
        name, _, method = first.rpartition("=")
        if method not in METHODS:
            raise ConfigError("is no method", field="--method", value=method, remedy=nearest(method, METHODS))
        name = name or method
        if name in names:
            raise ConfigError("is named twice", field="--method", value=name, remedy="give it a name: NAME=METHOD")
        names.add(name)
        kept = own.adapt is not None and own.adapt.method == method
        fresh = [] if kept else ["adapt=null", f"adapt.method={method}"]
        for seed in seeds:
            place = [f"train.seed={seed}", f"output_dir={output / name / f'seed-{seed}'}"]
            runs.append(MethodRun(name, seed, load_run(run, [*overrides, *fresh, *keys, *place])))
    return runs
