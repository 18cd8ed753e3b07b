"""Where two runs first differ."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lmscale.cli.main import main
from lmscale.report.compare_page import names_of, tables
from lmscale.report.run_compare import Pair, compare_runs
from lmscale.report.run_files import read_run
from tests.report.runs import plain_records, record, write_run
from tests.report.test_run_report import charts


def two_runs(tmp_path: Path, changes: dict[int, float]) -> tuple[Path, Path]:
    """Write two runs; of the second, the losses of some steps are multiplied."""
    records = plain_records(range(1, 21))
    changed = [
        {**each, "train/lm_loss": each["train/lm_loss"] * changes.get(each["step"], 1.0), "perf/step_time_s": 0.5}
        for each in records
    ]
    one = write_run(tmp_path / "a", records)
    return one, write_run(tmp_path / "b", changed, {"git": {"lmscale": "def456"}}, optim__lr=2.0e-3)


def test_first_difference_is_found_exactly_and_beyond_the_tolerance(tmp_path: Path) -> None:
    one, other = two_runs(tmp_path, {7: 1 + 1e-9, 11: 1.0005, 15: 1.1})
    found = compare_runs(read_run(one), read_run(other), tolerance=1e-3)
    first, beyond = found.first, found.first_beyond
    assert first is not None
    assert beyond is not None
    assert first.tag == beyond.tag == "train/lm_loss"
    assert first.first is not None
    assert first.first.step == 7
    assert beyond.first_beyond is not None
    assert beyond.first_beyond.step == 15
    assert beyond.largest is not None
    assert beyond.largest.difference == pytest.approx(1 - 1 / 1.1)
    assert [each.tag for each in found.metrics if each.first] == ["train/lm_loss"]
    assert [(each.key, each.one, each.other) for each in found.config] == [("optim.lr", "0.001", "0.002")]
    assert [(each.key, each.one, each.other) for each in found.environment] == [("git.lmscale", "abc123", "def456")]
    assert ("perf/step_time_s", 0.25, 0.5) in [(each.tag, each.one, each.other) for each in found.measured]


def test_values_that_are_not_finite_are_equal_to_each_other_alone() -> None:
    assert Pair(1, math.nan, math.nan).difference == 0
    assert Pair(1, math.nan, 1.0).difference == math.inf
    assert Pair(1, 0.0, 0.0).difference == 0
    assert Pair(1, -1.0, 1.0).difference == 2


def test_the_console_and_the_page_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = two_runs(tmp_path, {15: 1.1})
    page = tmp_path / "compare.html"
    assert main(["compare", str(one), str(other), "--output", str(page)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "First difference: step 15, train/lm_loss: 5.85 and 6.435" in out
    assert "optim.lr" in out
    assert "output_dir" not in out
    html = page.read_text()
    assert "First beyond 0.001 (relative): step 15" in html
    losses = charts(html)["loss-by-steps"]
    assert [line["name"] for line in losses["series"]] == ["a", "b"]
    assert losses["series"][1]["y"][14] == pytest.approx(6.435)
    assert [text for _, text in losses["marks"]] == ["train/lm_loss is first beyond 0.001"]


def test_equal_runs_are_said_to_be_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / name / "run", plain_records(range(1, 6))) for name in "ab"]
    assert main(["compare", *map(str, runs)]) == 0
    out = capsys.readouterr().out
    assert "No metric differs, bit for bit, at the 5 steps" in out
    assert "Config" not in out


def test_runs_without_a_common_step_are_said_to_have_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_run(tmp_path / "a", [record(1, train__lm_loss=1.0)])
    other = write_run(tmp_path / "b", [record(2, train__lm_loss=1.0, valid__wiki__lm_loss=2.0)])
    assert main(["compare", str(one), str(other)]) == 0
    out = capsys.readouterr().out
    assert "no metric of a step in common" in " ".join(out.split())
    assert "valid/wiki/lm_loss" in out


def test_values_are_shown_whole_in_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = ["x" * 90, "y" * 90]
    records = [plain_records(range(1, 6)), [record(1, train__lm_loss=1.0)]]
    runs = [
        write_run(tmp_path / name / "run", found, {"git": {"lmscale": value}})
        for name, found, value in zip("ab", records, values, strict=True)
    ]
    assert main(["compare", *map(str, runs)]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert [out.count(value[0]) >= 90 for value in values] == [True, True]
    assert "\u2026" not in out


def test_a_metric_of_one_run_is_told_with_the_runs_directory(tmp_path: Path) -> None:
    one, other = (
        read_run(write_run(tmp_path / name / "run", [record(1, **tags)]))
        for name, tags in (("a", {"train__lr": 1.0}), ("b", {"train__lr": 1.0, "train__grad_norm": 2.0}))
    )
    found = compare_runs(one, other)
    assert found.only == [("train/grad_norm", 1)]
    only = {title: rows for title, _, rows in tables(found, names_of(one, other))}["In one run alone"]
    assert only == [["train/grad_norm", str(tmp_path / "b" / "run")]]


def test_wrong_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", plain_records(range(1, 4)))
    assert main(["compare", str(run), str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("error: run = ")
    assert main(["compare", str(run), str(run), "--tolerance", "-1"]) == 2
    assert "--tolerance" in capsys.readouterr().err
