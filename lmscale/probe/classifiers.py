"""The classifiers of a run of probing: what each learns, trained, measured, beside its control, and kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmscale.config.adapt import ProbingConfig
from lmscale.config.run import RunConfig
from lmscale.plan.probing import Pooling, probe_shapes
from lmscale.probe.cache import FeatureCache
from lmscale.probe.control import ControlTask
from lmscale.probe.fit import TRAIN, Fitted, Problem, Values, fit
from lmscale.probe.heads import ProbeHead
from lmscale.probe.saved import ProbeInfo, save_probe
from lmscale.probe.units import Units
from lmscale.probe.watch import Watch
from lmscale.tasks.base import Task

MIX = "mix"
_ACCURACY = {"classification": "accuracy", "token_classification": "token_accuracy"}


@dataclass(frozen=True)
class Probing:
    """What a run of probing works with, on every rank.

    Attributes:
        config: of the run.
        adapt: its method.
        task: what is learned.
        units: of each split.
        layers: that are read.
        pooling: what is kept of a row.
        cache: of the features.
        base: hash of the base's weights.
    """

    config: RunConfig
    adapt: ProbingConfig
    task: Task
    units: dict[str, Units]
    layers: list[int]
    pooling: Pooling
    cache: FeatureCache
    base: str


def train_classifiers(probing: Probing, device: torch.device, watch: Watch) -> dict[str, dict[str, Any]]:
    """Train a classifier for each layer, or one on their mix, and keep them in files: what was found, by layer.

    Raises:
        Stopped: if the watch says so.
    """
    found: dict[str, dict[str, Any]] = {}
    is_mix = probing.adapt.layers == MIX
    for layers in [probing.layers] if is_mix else [[layer] for layer in probing.layers]:
        problem = _problem(probing, layers)
        file = MIX if is_mix else f"layer-{layers[0]:02d}"
        own = watch.of("" if is_mix or len(probing.layers) == 1 else file)
        fitted = fit(problem, _head(probing), probing.config, device, own)
        splits = {name: dict(values) for name, values in fitted.splits.items()}
        if probing.adapt.control:
            _add_control(probing, problem, splits, device, own.of("control"))
        name = MIX if is_mix else str(layers[0])
        found[name] = {"steps": fitted.steps, "best_step": fitted.best_step, "splits": splits, **_mix_of(fitted)}
        _save(probing, fitted, layers, Path(probing.config.output_dir) / "probes" / file)
    return found


def _problem(probing: Probing, layers: list[int]) -> Problem:
    def features_of(split: str) -> torch.Tensor:
        parts = [probing.cache.read(split, layer) for layer in layers]
        return torch.stack(parts, dim=1) if probing.adapt.layers == MIX else parts[0]

    def measure(split: str, outputs: np.ndarray[Any, Any]) -> Values:
        return probing.task.metrics(split, probing.units[split].predictions(outputs))

    return Problem(
        features={name: features_of(name) for name in probing.units},
        units=probing.units,
        targets={name: units.targets for name, units in probing.units.items()},
        measure=measure,
        metric=probing.task.metric,
    )


def _head(probing: Probing) -> ProbeHead:
    shapes = probe_shapes(probing.config.model, probing.adapt, probing.task.num_outputs)
    return ProbeHead(shapes, probing.config.train.seed)


def _add_control(
    probing: Probing, problem: Problem, splits: dict[str, Values], device: torch.device, watch: Watch
) -> None:
    """Train the same classifier on random labels of word types; add its accuracy and the selectivity to each split."""
    assert probing.config.task is not None
    control = ControlTask(probing.units[TRAIN], probing.task.num_outputs, probing.config.train.seed)
    labels = {name: control.labels(units) for name, units in probing.units.items()}
    random = Problem(
        features=problem.features,
        units=problem.units,
        targets=labels,
        measure=lambda split, outputs: {"accuracy": float((outputs.argmax(axis=1) == labels[split]).mean())},
        metric="accuracy",
    )
    fitted = fit(random, _head(probing), probing.config, device, watch)
    accuracy = _ACCURACY[probing.config.task.kind]
    for name, values in splits.items():
        values["control_accuracy"] = fitted.splits[name]["accuracy"]
        values["selectivity"] = values[accuracy] - values["control_accuracy"]


def _mix_of(fitted: Fitted) -> dict[str, Any]:
    if fitted.head.mix_weights is None:
        return {}
    weights = fitted.head.mix_weights.detach().softmax(dim=0).tolist()
    return {"mix_weights": weights, "mix_scale": float(fitted.head.mix_scale)}


def _save(probing: Probing, fitted: Fitted, layers: list[int], path: Path) -> None:
    assert probing.config.task is not None
    info = ProbeInfo(
        layers=layers,
        pooling=probing.pooling,
        head=probing.adapt.head,
        kind=probing.config.task.kind,
        labels=list(probing.task.labels),
        base=probing.base,
    )
    save_probe(path, info, fitted.head)
