"""Classifiers on features that are made up, so that what can be learned of them is known."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from lmscale.config.io import parse_run
from lmscale.config.run import RunConfig
from lmscale.errors import CheckpointError
from lmscale.plan.adaptation import adaptation_of
from lmscale.plan.groups import num_trainable
from lmscale.probe import load_probe
from lmscale.probe.control import ControlTask
from lmscale.probe.fit import Problem, fit
from lmscale.probe.heads import ProbeHead
from lmscale.probe.units import Units
from lmscale.tasks.resolve import resolve_task
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Keys
from tests.probe.runs import features_of, probe_on_ranks, probing_keys

Base = Callable[[str], str]
CPU = torch.device("cpu")
HIDDEN, CLASSES = 16, 3
ACCURACY_TOLERANCE = 0.01
"""Of 600 noisy points: the two optimizers stop near one optimum, and points on the border fall on either side."""
LONG: Keys = {"train__epochs": 40, "optim__lr": 3.0e-2, "optim__weight_decay": 0.0, "train__eval_interval": 10}


def _units(targets: np.ndarray[Any, Any], words: list[str] | None = None) -> Units:
    """Units that are rows of one token."""
    count = len(targets)
    return Units(np.arange(count + 1), None, targets, words or [""] * count, np.ones((count, 1), np.bool_), "")


def _accuracy(targets: dict[str, np.ndarray[Any, Any]]) -> Callable[[str, Any], dict[str, float]]:
    return lambda split, outputs: {"accuracy": float((outputs.argmax(axis=1) == targets[split]).mean())}


def _problem(
    features: dict[str, torch.Tensor], targets: dict[str, np.ndarray[Any, Any]], **words: list[str]
) -> Problem:
    units = {name: _units(values, words.get(name)) for name, values in targets.items()}
    return Problem(features, units, targets, _accuracy(targets), "accuracy")


@pytest.fixture(scope="module")
def config(base: Base, tasks: Path) -> RunConfig:
    changes = {"train__epochs": None, "train__train_tokens": 32 * 64 * 400, "batch__global_batch_size": 64}
    keys = probing_keys("classes", base("bert"), tasks, tasks / "unused", **{**LONG, **changes})
    del keys["train"]["epochs"]
    return resolve_task(parse_run(keys))


def _linear(seed: int = 0, outputs: int = CLASSES) -> ProbeHead:
    return ProbeHead({"probe.classifier.weight": (outputs, HIDDEN), "probe.classifier.bias": (outputs,)}, seed)


def _clouds(rng: np.random.Generator, count: int) -> tuple[torch.Tensor, np.ndarray[Any, Any]]:
    """Three classes around three centres, so near to one another that about a quarter cannot be told."""
    centres = np.random.default_rng(1).normal(size=(CLASSES, HIDDEN)) * 0.45
    targets = rng.integers(0, CLASSES, count)
    points = centres[targets] + rng.normal(size=(count, HIDDEN))
    return torch.from_numpy(points.astype(np.float32)), targets


def test_a_linear_probe_is_as_accurate_as_logistic_regression(config: RunConfig) -> None:
    rng = np.random.default_rng(0)
    made = {"train": _clouds(rng, 600), "far": _clouds(rng, 600)}
    features, targets = ({name: pair[i] for name, pair in made.items()} for i in (0, 1))
    found = fit(_problem(features, targets), _linear(), config, CPU)
    reference = LogisticRegression(C=1e6, max_iter=1000).fit(features["train"].numpy(), targets["train"])
    expected = reference.score(features["far"].numpy(), targets["far"])
    assert 0.55 < expected < 0.9
    assert abs(found.splits["far"]["accuracy"] - expected) <= ACCURACY_TOLERANCE


def test_the_same_seed_gives_the_same_classifier_bit_for_bit(config: RunConfig) -> None:
    features, targets = _clouds(np.random.default_rng(0), 100)
    problem = _problem({"train": features}, {"train": targets})
    config = config.model_copy(update={"train": config.train.model_copy(update={"stop_at_step": 5})})
    first, again, other = (fit(problem, _linear(seed), config, CPU) for seed in (3, 3, 4))
    assert first.steps == 5
    assert torch.equal(first.head.classifier.weight, again.head.classifier.weight)
    assert not torch.equal(first.head.classifier.weight, other.head.classifier.weight)


def test_training_stops_and_goes_back_to_the_best_step(config: RunConfig) -> None:
    features, targets = _clouds(np.random.default_rng(0), 300)
    wrong = (targets + 1) % CLASSES  # the more is learned, the worse is dev
    problem = _problem({"train": features, "dev": features}, {"train": targets, "dev": wrong})
    assert config.task is not None
    patient = config.model_copy(update={"task": config.task.model_copy(update={"patience": 2})})
    found = fit(problem, _linear(), patient, CPU)
    assert found.steps < 400
    assert found.steps - found.best_step == 2 * config.train.eval_interval
    long = fit(problem, _linear(), config, CPU)
    assert long.steps == 400
    assert long.splits["dev"]["accuracy"] >= found.splits["dev"]["accuracy"]


@pytest.mark.parametrize("knows_words", [False, True])
def test_selectivity_tells_a_probe_that_reads_from_one_that_learns_by_heart(
    config: RunConfig, knows_words: bool
) -> None:
    rng = np.random.default_rng(0)
    tags = {name: rng.integers(0, 2, 400) for name in ("train", "far")}
    numbers = {name: rng.integers(0, 12, 400) for name in tags}
    words = {name: [f"word{number}" for number in found] for name, found in numbers.items()}
    features = {}
    for name in tags:
        shown = torch.zeros(400, HIDDEN)
        shown[np.arange(400), tags[name]] = 1.0
        if knows_words:
            shown[np.arange(400), 2 + numbers[name]] = 1.0
        features[name] = shown + 0.01 * torch.from_numpy(rng.normal(size=(400, HIDDEN)).astype(np.float32))
    problem = _problem(features, tags, **words)
    control = ControlTask(problem.units["train"], 2, seed=5)
    labels = {name: control.labels(units) for name, units in problem.units.items()}
    random = dataclasses.replace(problem, targets=labels, measure=_accuracy(labels))
    accuracy, by_heart = (
        fit(each, _linear(outputs=2), config, CPU).splits["far"]["accuracy"] for each in (problem, random)
    )
    assert accuracy == 1.0
    assert by_heart == 1.0 if knows_words else by_heart < 0.8


def test_a_word_has_one_control_label_in_all_sets_and_labels_are_as_frequent_as_in_training() -> None:
    targets = np.repeat([0, 1, 2], [700, 200, 100])
    train = _units(targets, [f"w{number}" for number in range(1000)])
    control = ControlTask(train, 3, seed=1)
    labels = control.labels(train)
    shares = np.bincount(labels, minlength=3) / 1000
    np.testing.assert_allclose(shares, [0.7, 0.2, 0.1], atol=0.05)  # three deviations of 1,000 draws
    other = _units(np.zeros(3, np.int64), ["w7", "w999", "w7"])
    assert control.labels(other).tolist() == [labels[7], labels[999], labels[7]]
    assert not np.array_equal(ControlTask(train, 3, seed=2).labels(train), labels)


def test_a_mix_learns_which_layer_to_read(config: RunConfig) -> None:
    rng = np.random.default_rng(0)
    told, targets = _clouds(rng, 400)
    noise = torch.from_numpy(rng.normal(size=(400, 4, HIDDEN)).astype(np.float32))
    noise[:, 2] = told
    shapes = {"probe.mix_weights": (4,), "probe.mix_scale": (1,)}
    head = ProbeHead({**shapes, "probe.classifier.weight": (CLASSES, HIDDEN), "probe.classifier.bias": (CLASSES,)})
    found = fit(_problem({"train": noise, "far": noise}, {"train": targets, "far": targets}), head, config, CPU)
    assert found.head.mix_weights.detach().softmax(dim=0)[2] > 0.8


def test_attention_pooling_reads_tokens_alone_and_finds_the_one_that_tells() -> None:
    head = ProbeHead(
        {"probe.query": (HIDDEN,), "probe.classifier.weight": (2, HIDDEN), "probe.classifier.bias": (2,)}, seed=1
    )
    features = torch.randn(3, 5, HIDDEN, generator=torch.Generator().manual_seed(0))
    is_token = torch.arange(5) < torch.tensor([[5], [2], [1]])
    outputs = head(features, is_token)
    torch.testing.assert_close(outputs[2], head.classifier(features[2, 0]))
    changed = features.clone()
    changed[~is_token] = 100.0
    torch.testing.assert_close(head(changed, is_token), outputs)
    with torch.no_grad():
        head.query.copy_(100 * features[0, 3])
    torch.testing.assert_close(head(features)[0], head.classifier(features[0, 3]))


@pytest.mark.parametrize(
    ("adapt", "count"),
    [
        ({}, 32 * 3 + 3),
        ({"head": "mlp"}, 32 * 32 + 32 + 32 * 3 + 3),
        ({"head": "attention"}, 32 + 32 * 3 + 3),
        ({"layers": "mix"}, 5 + 1 + 32 * 3 + 3),
        ({"layers": "all"}, 32 * 3 + 3),
    ],
)
def test_a_classifier_has_as_many_parameters_as_its_formula_says(
    adapt: Keys, count: int, base: Base, tasks: Path
) -> None:
    run = resolve_task(parse_run(probing_keys("classes", base("bert"), tasks, tasks / "unused", adapt)))
    assert num_trainable(run.model, run.optim, adaptation_of(run))[0] == count


def probe_made_up(keys: Keys) -> int:
    """Probe on this rank a model that knows the class behind its second layer, and nothing elsewhere."""
    import lmscale.probe.run as run
    from tests.finetune_runs import finetune_in_rank

    original = run.FeaturePass.features

    def features(self: Any, layers: list[int]) -> Any:
        rng = np.random.default_rng(0)
        for layer, found in original(self, layers):
            made = torch.from_numpy(rng.normal(size=found.shape).astype(np.float32))
            if layer == 2:
                made[torch.arange(len(made)), torch.from_numpy(self._units.targets)] += 5.0
            yield layer, made

    run.FeaturePass.features = features
    try:
        return finetune_in_rank(keys)
    finally:
        run.FeaturePass.features = original


@pytest.mark.distributed
def test_a_sweep_finds_the_layer_that_knows_and_its_probe_can_be_used(base: Base, tasks: Path, tmp_path: Path) -> None:
    keys = probing_keys("tags", base("bert"), tasks, tmp_path, {"layers": "all", "control": True}, **LONG)
    assert run_ranks(1, probe_made_up, keys) == [0]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["layer"] == 2
    assert results["splits"]["dev"]["token_accuracy"] > 0.95
    others = [results["layers"][layer]["splits"]["dev"]["token_accuracy"] for layer in "0134"]
    assert max(others) < 0.9
    assert results["splits"]["far"]["domain"] == "out"
    for values in results["layers"]["2"]["splits"].values():
        assert values["selectivity"] == values["token_accuracy"] - values["control_accuracy"]
    assert results["splits"]["dev"]["selectivity"] > 0.1
    assert results["trainable_parameters"] == 32 * 2 + 2
    assert (tmp_path / "probing.png").read_bytes().startswith(b"\x89PNG")

    probe = load_probe(tmp_path / "probes" / "layer-02.safetensors")
    assert (probe.info.layers, probe.info.pooling, probe.info.labels) == ([2], "words", ["B-X", "O"])
    scores = probe.predict(features_of(keys)["dev-layer-02-words"])
    gold = [tag for line in (tasks / "tags-dev.jsonl").read_text().splitlines() for tag in json.loads(line)["tags"]]
    right = [probe.info.labels[number] == tag for number, tag in zip(scores.argmax(dim=1), gold, strict=True)]
    assert sum(right) / len(right) == pytest.approx(results["splits"]["dev"]["token_accuracy"])


@pytest.mark.distributed
def test_results_do_not_depend_on_the_layout(base: Base, tasks: Path, tmp_path: Path) -> None:
    adapt = {"layers": "mix", "head": "attention"}
    one = probe_on_ranks(1, probing_keys("classes", base("bert"), tasks, tmp_path / "one", adapt))
    layout = {"parallel__pp_size": 2}
    two = probe_on_ranks(2, probing_keys("classes", base("bert"), tasks, tmp_path / "two", adapt, **layout))
    ours, theirs = (each["layers"]["mix"]["splits"]["dev"] for each in (one, two))
    assert ours == pytest.approx(theirs, rel=1.0e-5)
    assert one["layers"]["mix"]["mix_weights"] == pytest.approx(two["layers"]["mix"]["mix_weights"], rel=1.0e-5)
    assert sum(one["layers"]["mix"]["mix_weights"]) == pytest.approx(1.0)


def test_a_damaged_probe_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no whole probe"):
        load_probe(tmp_path / "layer-01.safetensors")
    (tmp_path / "layer-01.json").write_text("{}")
    (tmp_path / "layer-01.safetensors").write_bytes(b"\x00" * 4)
    with pytest.raises(CheckpointError, match="is no whole probe"):
        load_probe(tmp_path / "layer-01.safetensors")
