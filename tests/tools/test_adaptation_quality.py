"""The page of the comparison of adaptations: floors, verdicts, and failures, which are shown."""

from __future__ import annotations

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lmscale.probe.heads import ProbeHead
from lmscale.probe.saved import ProbeInfo, save_probe

TOOLS = Path(__file__).resolve().parents[2] / "tools"
MODULES = ("adaptation_runs", "adaptation_page", "adaptation_quality")


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    loaded = {name: importlib.import_module(name) for name in MODULES}
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    lines = {"train": ["a", "a", "b"], "dev": ["a", "b"], "test": ["a", "b", "b", "b"], "ood": ["b"]}
    folder = Path("adaptation_quality/tasks/nli")
    folder.mkdir(parents=True)
    for split, labels in lines.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"label": label}) + "\n" for label in labels))
    yield loaded
    for name in MODULES:
        del sys.modules[name]


def results(test: float, ood: float, trainable: int = 10) -> dict[str, Any]:
    splits = {
        name: {"domain": domain, "accuracy": value}
        for name, domain, value in (("dev", "in", test), ("test", "in", test), ("ood", "out", ood))
    }
    sizes = {"trainable_parameters": trainable, "total_parameters": 100, "peak_bytes": 2**20, "seconds": 1.0}
    return {"metric": "accuracy", "splits": splits, **sizes}


def found(tools: Any, **methods: tuple[float, float]) -> Any:
    """A case whose methods have an accuracy and a training loss."""
    page, runs = tools["adaptation_page"], tools["adaptation_runs"]
    case = page.Found("nli", runs.CASES["nli"], untrained=[results(0.3, 0.3)] * 3)
    for name, (accuracy, loss) in methods.items():
        case.methods[name] = 1e-3, [page.Trained(results(accuracy, accuracy - 0.1), loss)] * 3
        case.search[name] = {1e-3: accuracy, 1e-2: 0.1}
    return case


def test_a_method_that_has_the_margin_and_one_that_misses_it_are_told_apart(tools):
    judged = tools["adaptation_page"].judge(found(tools, full=(0.9, 0.1), lora=(0.45, 0.5), bitfit=(0.35, 0.6)))
    assert judged.floor == pytest.approx(0.3)  # the untrained model; the most frequent answer, a, has 0.25
    assert judged.missed == {"bitfit": pytest.approx(0.05)}
    assert judged.lower == []


def test_the_most_frequent_answer_is_that_of_training(tools):
    case = found(tools, full=(0.9, 0.1))
    assert tools["adaptation_page"].constant(case, "test") == 0.25
    assert tools["adaptation_page"].constant(case, "dev") == 0.5


def test_a_lower_training_loss_than_full_fine_tunings_is_named(tools):
    page = tools["adaptation_page"]
    case = found(tools, full=(0.9, 0.3), adapter=(0.9, 0.2))
    assert page.judge(case).lower == ["adapter"]
    assert page.write_page([case]) is False
    assert "lower training loss than full: adapter" in Path("docs/adaptation_results.md").read_text()


def test_the_page_shows_failures_and_says_that_all_has_come_only_where_it_has(tools):
    page = tools["adaptation_page"]
    good = found(tools, full=(0.9, 0.1), lora=(0.8, 0.2))
    assert page.write_page([good]) is True
    text = Path("docs/adaptation_results.md").read_text()
    assert "| lora | 0.001 | 0.200 ± 0.000 | 0.800 ± 0.000 | 0.800 ± 0.000 | +0.500 | 0.700 ± 0.000 | -0.100 |" in text
    assert "every method that was trained has the margin" in text
    assert ">lora<" in Path("docs/adaptation_results.svg").read_text()

    bad = found(tools, full=(0.9, 0.1), lora=(0.35, 0.2))
    bad.failures["bitfit"] = "refused: has no biases"
    assert page.write_page([bad]) is False
    text = Path("docs/adaptation_results.md").read_text()
    assert "missed by lora (+0.050)" in text
    assert "+0.050 missed" in text
    assert "bitfit: refused: has no biases" in text


def test_a_case_with_a_seed_left_is_not_all(tools):
    case = found(tools, full=(0.9, 0.1), lora=(0.8, 0.2))
    rate, runs = case.methods["lora"]
    case.methods["lora"] = rate, runs[:2]
    assert tools["adaptation_page"].write_page([case]) is False
    assert "(2 seeds)" in Path("docs/adaptation_results.md").read_text()


def test_a_method_without_a_run_is_not_all_but_one_that_is_refused_is(tools):
    page = tools["adaptation_page"]
    case = found(tools, full=(0.9, 0.1))
    case.failures["bitfit"] = f"{page.REFUSED}has no biases"
    assert page.write_page([case]) is True
    case.failures["lora"] = "0 of 3 seeds"
    assert page.write_page([case]) is False


def test_a_case_without_results_is_said_to_lack_them(tools):
    page, runs = tools["adaptation_page"], tools["adaptation_runs"]
    ready, missing = found(tools, full=(0.9, 0.1)), page.Found("qa", runs.CASES["qa"])
    assert page.write_page([ready, missing]) is False
    text = Path("docs/adaptation_results.md").read_text()
    assert f"- qa ({runs.CASES['qa'].shown}): not measured." in text
    assert "## qa" not in text


def test_every_method_is_compared_at_a_few_rates(tools):
    from lmscale.config.adapt import METHODS

    methods = tools["adaptation_runs"].METHODS
    assert set(methods) == set(METHODS)
    assert all(len(rates) > 1 for rates, _ in methods.values())
    specs = tools["adaptation_quality"]._specs("prompt_tuning", 36)
    assert all("data.seq_length=48" in spec for _, spec in specs)


def test_what_the_page_has_of_other_cases_stays_on_it_and_in_the_picture(tools):
    page, runs = tools["adaptation_page"], tools["adaptation_runs"]
    assert page.write_page([found(tools, full=(0.9, 0.1), lora=(0.8, 0.2))]) is True
    before = page.read_parts(Path("docs/adaptation_results.md").read_text())
    assert set(before) == {"nli"}
    topic = found(tools, full=(0.7, 0.1), bitfit=(0.6, 0.2))
    topic.name, topic.case = "topic", replace(runs.CASES["topic"], folder="nli")
    assert page.write_page([topic]) is True
    after = page.read_parts(Path("docs/adaptation_results.md").read_text())
    assert set(after) == {"topic", "nli"}
    assert after["nli"] == before["nli"]
    picture = Path("docs/adaptation_results.svg").read_text()
    assert all(f">{name}<" in picture for name in ("topic", "nli", "lora", "bitfit"))


def test_the_picture_has_the_points_of_the_table(tools):
    page = tools["adaptation_page"]
    page.write_page([found(tools, full=(0.9, 0.1), lora=(0.8, 0.2))])
    _, section = page.read_parts(Path("docs/adaptation_results.md").read_text())["nli"]
    points = {point.method: point for point in page.read_points(section)}
    assert set(points) == {"full", "lora"}
    assert points["lora"].sets == {"test": (0.8, 0.0), "ood": (0.7, 0.0)}
    assert points["lora"].share == pytest.approx(0.1)


def test_a_model_that_was_never_pretrained_stands_below_the_methods_and_is_not_judged(tools):
    page, runs = tools["adaptation_page"], tools["adaptation_runs"]
    case = found(tools, full=(0.9, 0.3))
    case.case = replace(runs.CASES["nli"], scratch_rate=2e-3)
    case.scratch = [page.Trained(results(0.31, 0.3), 0.1)] * 3
    assert page.write_page([case]) is True
    assert "| from scratch | 0.002 | 0.100 ± 0.000 | 0.310" in Path("docs/adaptation_results.md").read_text()


def test_the_loss_of_a_probe_is_that_over_the_training_set(tools, tmp_path):
    labels = ["a", "a", "b"]
    features = torch.eye(3)
    head = ProbeHead({"classifier.weight": (2, 3), "classifier.bias": (2,)})
    with torch.no_grad():
        head.classifier.weight.copy_(torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
        head.classifier.bias.zero_()
    save_probe(
        tmp_path / "probes" / "layer-03", ProbeInfo([3], "mean", "linear", "classification", ["a", "b"], "0"), head
    )
    (tmp_path / "features").mkdir()
    save_file({"features": features}, tmp_path / "features" / "train-layer-03-mean.safetensors")
    train = Path("adaptation_quality/tasks/nli/train.jsonl")
    assert [json.loads(line)["label"] for line in train.read_text().splitlines()] == labels
    config = SimpleNamespace(output_dir=str(tmp_path), task=SimpleNamespace(train=str(train)))
    expected = (math.log(1 + math.exp(-2.0)) + 2 * math.log(2.0)) / 3
    assert tools["adaptation_quality"]._probe_loss(config) == pytest.approx(expected)
