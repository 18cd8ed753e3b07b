"""Methods of one task side by side: means and deviations over seeds, differences from full fine-tuning, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmscale.errors import DataError
from lmscale.report.adaptations import Comparison, Spread, compare, markdown, plot, read_results, table


def results(dev: float, far: float, *, trainable: int = 10, metric: str = "accuracy", far_domain: str = "out") -> Any:
    """Make a run's results."""
    return {
        "metric": metric,
        "trainable_parameters": trainable,
        "total_parameters": 1000,
        "peak_bytes": 2**20 * trainable,
        "seconds": 2.0,
        "splits": {
            "dev": {"domain": "in", "examples": 9, "loss": 1.0, metric: dev},
            "far": {"domain": far_domain, "examples": 9, "loss": 1.0, metric: far},
        },
    }


@pytest.fixture
def comparison() -> Comparison:
    return compare(
        [
            ("lora", results(0.5, 0.4)),
            ("full", results(0.9, 0.3, trainable=1000)),
            ("lora", results(0.7, 0.6)),
            ("full", results(0.9, 0.5, trainable=1000)),
        ]
    )


def test_seeds_are_averaged_and_spread_as_samples(comparison: Comparison) -> None:
    rows = {row.name: row for row in comparison.rows}
    assert rows["lora"].sets["dev"].mean == pytest.approx(0.6)
    assert rows["lora"].sets["dev"].deviation == pytest.approx(0.1 * 2**0.5)
    assert rows["lora"].seeds == 2
    assert Spread.of([0.25]) == Spread(0.25, 0.0)


def test_the_best_on_the_first_set_stands_first(comparison: Comparison) -> None:
    assert [row.name for row in comparison.rows] == ["full", "lora"]


def test_out_of_domain_stands_the_difference_from_full_fine_tuning(comparison: Comparison) -> None:
    columns, rows = table(comparison)
    place = columns.index("less full")
    assert columns[place - 1] == "far (out)"
    assert [row[place] for row in rows] == ["+0.000", "+0.100"]
    assert [row[columns.index("share")] for row in rows] == ["100.000%", "1.000%"]
    assert "less full" not in table(compare([("lora", results(0.5, 0.4))]))[0]


def test_markdown_has_a_line_for_each_method(comparison: Comparison) -> None:
    lines = markdown(comparison).splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {len(table(comparison)[0]) + 1}


def test_the_picture_and_the_json_are_written(comparison: Comparison, tmp_path: Path) -> None:
    plot(comparison, tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    again = json.loads(json.dumps(comparison.to_json()))
    assert again["methods"]["lora"]["sets"]["far"]["mean"] == pytest.approx(0.5)


@pytest.mark.parametrize("other", [{"metric": "f1"}, {"far_domain": "in"}])
def test_another_task_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="bitfit: is of another task"):
        compare([("lora", results(0.5, 0.4)), ("bitfit", results(0.5, 0.4, **other))])


def test_a_file_without_results_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(DataError, match="holds no results of a task"):
        read_results(tmp_path / "results.json")
    with pytest.raises(DataError, match="holds no results of a task"):
        read_results(tmp_path / "absent.json")
