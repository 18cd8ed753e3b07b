"""The report page: parsed as HTML, its data compared with the records."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lmscale.cli.main import main
from lmscale.report.thinning import MOST_POINTS
from tests.report.runs import plain_records, record, write_run


def charts(html: str) -> dict[str, dict[str, Any]]:
    """The data of each chart, by the chart's id."""
    found = re.findall(
        r'<figure class="chart" id="([^"]+)">.*?<script type="application/json">(.*?)</script>', html, re.S
    )
    return {key: json.loads(data) for key, data in found}


def report(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["report", str(run)]) == 0
    assert f"wrote {run / 'report.html'}" in capsys.readouterr().out
    return (run / "report.html").read_text()


def test_the_page_holds_the_curves_of_the_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = plain_records(range(1, 41))
    html = report(write_run(tmp_path / "run", records), capsys)
    found = charts(html)
    assert {"loss-by-steps", "loss-by-tokens", "train-lr", "train-global_batch_size", "train-grad_norm"} <= set(found)
    assert {"perf-tokens_per_second", "memory-peak_bytes", "valid-lm_loss"} <= set(found)
    assert "train-loss_scale" not in found  # not of an fp32 run
    (losses,) = found["loss-by-steps"]["series"]
    assert losses["x"] == list(range(1, 41))
    assert losses["y"] == pytest.approx([each["train/lm_loss"] for each in records], rel=1e-5)
    assert losses["at"] == sorted(losses["at"])
    assert found["loss-by-tokens"]["series"][0]["x"] == [each["consumed_tokens"] for each in records]
    assert found["memory-peak_bytes"]["series"][0]["y"] == [1] * 40  # GiB
    for key in found:
        assert f'id="curve-{key}-0"' in html


def test_the_page_needs_no_network_and_reads_at_night(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html = report(write_run(tmp_path / "run", plain_records(range(1, 11))), capsys)
    links = set(re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')\s>]+)', html))
    assert all(link.startswith("#") for link in links)
    assert "prefers-color-scheme: dark" in html
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, re.S))
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) <= {"#ffffff"}  # every other colour is the page's
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(set(ids)) == len(ids)


def test_sections_tell_what_happened_and_what_was_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = {"started_at": "B", "resume_step": 10, "earlier_starts": [{"started_at": "A", "resume_step": 0}]}
    records = [*plain_records(range(1, 21)), record(21, train__lm_loss=None, train__skipped_steps=1)]
    records[10] |= {"memory/parameter_bytes": 200_000, "memory/gradient_bytes": 200_000, "memory/optimizer_bytes": 1}
    run = write_run(tmp_path / "run", records, manifest)
    html = report(run, capsys)
    assert "started again at B" in html
    assert "1 step without an update" in html
    assert "warm-up ends" in html
    assert re.search(r'<td>step time, s</td><td class="number">[0-9.e-]+</td><td class="number">0.25</td>', html)
    assert "195 KiB" in html or "0.191 MiB" in html
    assert "node-a, node-b" in html
    assert "abc123" in html
    kinds = {text for _, text in charts(html)["loss-by-steps"]["marks"]}
    assert "warm-up ends" in kinds
    assert "started again at B" in kinds


def cells(html: str, what: str) -> list[str]:
    """The row of a table by its first cell."""
    (row,) = re.findall(rf"<tr><td>{re.escape(what)}</td>(.*?)</tr>", html)
    return re.findall(r"<td[^>]*>(.*?)</td>", row)


def test_the_plan_is_measured_by_its_own_start_at_full_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = plain_records(range(1, 31))  # of eight ranks, then of two
    for each in records[20:]:
        each["perf/step_time_s"] = 0.5
    for each, seconds in ((records[20], 7.0), (records[21], 0.1), (records[22], 0.2)):
        each["perf/step_time_s"] = seconds  # warms up; half the length; half the batch
    records[0]["memory/parameter_bytes"] = 7 * 2**30
    lost = 0
    for number, each in enumerate(records[21:]):
        lost = (128, 256)[number] if number < 2 else 256
        each["consumed_tokens"] -= lost
        each["consumed_samples"] -= 4 if number else 0
    manifest = {"resume_step": 20, "earlier_starts": [{"resume_step": 0}]}
    html = report(write_run(tmp_path / "run", records, manifest), capsys)
    assert cells(html, "step time, s")[1] == "0.5"
    assert cells(html, "parameters, of the rank with most")[1] == "not measured"


@pytest.mark.parametrize(
    "manifest",
    [
        {"layout": {"world_size": 2}, "device": {"type": "cuda", "name": "A card"}},
        {"device": {"type": "cuda", "name": "A card"}},
        dict.fromkeys(("git", "hosts", "data", "versions", "command", "layout", "restarts", "earlier_starts")),
    ],
    ids=["layout", "device", "nulls"],
)
def test_a_manifest_that_is_not_whole_is_reported_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], manifest: dict[str, Any]
) -> None:
    run = write_run(tmp_path / "run", plain_records(range(1, 4)), manifest)
    (run / "step_times.json").write_text('{"step": 3, "steps": 3}')
    html = report(run, capsys)
    assert ("has no layout with dp_size and zero_stage" in html) == ("layout" in manifest)
    assert "Step time by rank" not in html
    assert "<td>hosts</td>" in html


def test_a_command_is_shown_as_a_shell_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = {"command": ["pretrain.py", "--config", "my run.yaml"]}
    html = report(write_run(tmp_path / "run", plain_records(range(1, 4)), manifest), capsys)
    assert cells(html, "command") == ["pretrain.py --config &#x27;my run.yaml&#x27;"]


def test_a_run_of_many_skips_has_as_many_marks_as_can_be_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [record(step, train__lm_loss=1.0, train__skipped_steps=step) for step in range(1, 20_001)]
    html = report(write_run(tmp_path / "run", records, train__train_tokens=256 * 40_000), capsys)
    marks = charts(html)["loss-by-steps"]["marks"]
    skips = [(at, text) for at, text in marks if "without an update" in text]
    assert 1000 < len(skips) <= MOST_POINTS + 1
    assert skips[0][1].endswith("1 step without an update; and 13 more")
    assert html.count('id="mark-loss-by-steps-skip"') == 1
    picture = html[html.index('id="mark-loss-by-steps-skip"') :]
    assert picture[: picture.index("</g>")].count("<path") <= len(skips) + 1


def test_texts_of_the_run_are_text_in_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "</script><script>alert(1)</script>"
    records = [record(step, **{"train__lm_loss": 1.0, f"valid__{evil}__lm_loss": 1.0}) for step in (1, 2)]
    html = report(write_run(tmp_path / "run", records, {"hosts": [evil]}), capsys)
    assert "<script>alert" not in html


def test_a_step_time_table_is_shown_where_there_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", plain_records(range(1, 4)))
    ranks = [{"rank": 1, "host": "node-b", "step_s": 0.5, "own_s": 0.4, "waiting_s": 0.1, "bubble_fraction": None}]
    times = {"step": 3, "steps": 3, "bubble_fraction": None, "ranks": ranks}
    (run / "step_times.json").write_text(json.dumps(times))
    html = report(run, capsys)
    assert "Step time by rank" in html
    assert "node-b" in html


def test_a_run_without_its_config_is_reported_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", plain_records(range(1, 4)))
    (run / "config.yaml").unlink()
    (run / "manifest.json").unlink()
    html = report(run, capsys)
    assert "loss-by-steps" in charts(html)
    assert html.count("Not known: ") == 2


def test_wrong_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nothing")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: run = ")
    assert error.count("\n") == 1
    run = write_run(tmp_path / "run", plain_records(range(1, 4)))
    assert main(["report", str(run), "--output", str(tmp_path / "no" / "where.html")]) == 2
    assert "--output" in capsys.readouterr().err
