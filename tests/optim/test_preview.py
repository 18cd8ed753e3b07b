"""`lmscale preview`: what it says of a run is what walking the run's steps finds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lmscale.cli.main import main
from lmscale.config.io import load_run, parse_run
from lmscale.config.run import RunConfig
from lmscale.errors import ConfigError
from lmscale.optim.batch_ramp import sizes_of
from lmscale.optim.lr import lr_at, weight_decay_at
from lmscale.optim.preview import preview, short
from lmscale.optim.steps import Steps

RUNS = Path(__file__).resolve().parents[2] / "launch" / "runs"
EVERYTHING = (
    "optim.lr_decay_style=wsd",
    "optim.lr_warmup_tokens=2000",
    "optim.lr_cooldown_tokens=20000",
    "optim.lr_cooldown_style=one_minus_sqrt",
    "optim.lr_rewarmup={start_tokens: 40000, tokens: 5000, fraction: 0.1}",
    "optim.weight_decay_style=linear",
    "optim.weight_decay_end=0.2",
    "batch.stages=[{batch_size: 4, until_tokens: 3000}, {batch_size: 8, until_tokens: 9000}]",
    "data.seq_length_stages=[{seq_length: 8, until_tokens: 5000}, {seq_length: 16, until_tokens: 9000}]",
)


def small(*overrides: str) -> RunConfig:
    keys: dict[str, Any] = {
        "model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512},
        "data": {"train": [{"prefix": "unread"}], "seq_length": 32},
        "batch": {"micro_batch_size": 2, "global_batch_size": 16},
        "optim": {"lr": 1.0e-3},
        "train": {"train_tokens": 100_000},
        "output_dir": "unwritten",
    }
    return parse_run(keys, overrides)


def walk(config: RunConfig) -> list[tuple[int, int, float, float, int, int]]:
    """Step one by one: (samples, tokens, rate, weight decay, batch, length) of each step."""
    found = []
    for first, batch, length in Steps(sizes_of(config), 0, 0, config.train.train_tokens):
        tokens = batch * length + (found[-1][1] if found else 0)
        clock = (tokens, config.optim, config.train.train_tokens)
        found.append((first + batch, tokens, lr_at(*clock), weight_decay_at(*clock), batch, length))
    return found


@pytest.mark.parametrize(
    ("name", "warmup", "ramp_tokens"),
    [
        ("125m", 716, 4.0e9),
        ("1.3b", 358, 4.0e9),
        ("6.7b", 179, 10.0e9),
        ("175b", None, 12.0e9),
    ],
)
def test_published_warmups_and_ramps_end_where_they_should(name: str, warmup: int | None, ramp_tokens: float) -> None:
    path = RUNS / f"gpt3-{name}-paper.yaml"
    whole = dict(preview(load_run(path)).milestones)
    full = load_run(path).batch.global_batch_size
    end = whole[f"batch ramp ends: {full:,}"]
    assert end.batch_size == full
    # The first full step starts behind the border, which the last step of the ramp passes by less than its tokens.
    assert ramp_tokens * (1 - 1e-6) <= end.consumed_tokens - full * 2048 < ramp_tokens + full * 2048
    if warmup is not None:
        without = dict(preview(load_run(path, ["batch.ramp=null"])).milestones)
        assert without["warm-up ends"].step == warmup


def test_points_and_milestones_are_what_walking_finds() -> None:
    config = small(*EVERYTHING)
    walked, found = walk(config), preview(config)
    assert (found.steps, found.samples, found.tokens) == (len(walked), *walked[-1][:2])
    for point in (*found.points, *(point for _, point in found.milestones)):
        assert walked[point.step - 1] == (
            *(point.consumed_samples, point.consumed_tokens, point.lr),
            *(point.weight_decay, point.batch_size, point.seq_length),
        )


def test_milestones_are_the_first_steps_at_which_something_holds() -> None:
    config = small(*EVERYTHING)
    walked, milestones = walk(config), dict(preview(config).milestones)

    def first(holds: Any) -> int:
        return next(number for number, step in enumerate(walked, start=1) if holds(*step))

    expected = {
        "first step": 1,
        "warm-up ends": first(lambda s, tokens, lr, *_: lr == 1e-3),
        "length 16": first(lambda s, t, lr, wd, batch, length: length == 16),
        "length 32": first(lambda s, t, lr, wd, batch, length: length == 32),
        "batch: 8": first(lambda s, t, lr, wd, batch, length: batch == 8),
        "batch ramp ends: 16": first(lambda s, t, lr, wd, batch, length: batch == 16),
        "re-warm-up begins": first(lambda s, tokens, lr, *_: lr < 1e-3 and tokens > 2000),
        "re-warm-up ends": first(lambda s, tokens, lr, *_: lr == 1e-3 and tokens > 40_000),
        "cooldown begins": first(lambda s, tokens, lr, *_: lr < 1e-3 and tokens > 50_000),
        "last step": len(walked),
    }
    assert {what: point.step for what, point in milestones.items()} == expected
    assert [point.step for point in milestones.values()] == sorted(expected.values())


def test_preview_ends_where_the_run_is_stopped() -> None:
    found = preview(small("train.stop_at_step=7", "optim.lr_warmup_tokens=90000"))
    assert (found.steps, found.tokens) == (7, 7 * 512)
    assert [what for what, _ in found.milestones] == ["first step", "train.stop_at_step"]


def test_preview_of_every_recipe_takes_some_hundred_points() -> None:
    for path in RUNS.glob("[!a]*.yaml"):
        found = preview(load_run(path))
        assert found.tokens >= load_run(path).train.train_tokens or found.milestones[-1][0] == "train.stop_at_step"
        assert len(found.points) <= 450


def test_batch_that_no_micro_batch_divides_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch.stages.0.batch_size = 3: must be a multiple of"):
        preview(small("batch.stages=[{batch_size: 3, until_tokens: 100}]"))


@pytest.mark.parametrize(
    ("count", "text"), [(7, "7"), (32_768, "32.77K"), (375_062_528, "375.1M"), (12.0e9, "12.00B"), (1.5e12, "1.500T")]
)
def test_counts_are_shortened_to_four_digits(count: float, text: str) -> None:
    assert short(count) == text


class TestCommand:
    RUN = str(RUNS / "gpt3-125m-paper.yaml")

    def test_table_names_the_milestones(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["preview", self.RUN, "batch.ramp=null"]) == 0
        output = capsys.readouterr().out
        (line,) = [line for line in output.splitlines() if "warm-up ends" in line]
        assert line.split()[2:] == ["716", "375.4M", "0.0006", "256", "2,048", "0.1"]
        assert "572,205 optimizer steps" in output

    def test_json_holds_milestones_and_points(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["preview", self.RUN, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["steps"] == found["points"][-1]["step"] == found["milestones"][-1]["step"]
        assert set(found["milestones"][0]) == {"what", *found["points"][0]}

    @pytest.mark.parametrize("more", [(), ("optim.weight_decay_style=linear", "optim.weight_decay_end=0.2")], ids=str)
    def test_picture_is_a_png(self, tmp_path: Path, more: tuple[str, ...]) -> None:
        assert main(["preview", self.RUN, *more, "--plot", str(tmp_path / "run.png")]) == 0
        assert (tmp_path / "run.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    def test_picture_that_cannot_be_written_is_one_line(self, tmp_path: Path, capsys: Any) -> None:
        assert main(["preview", self.RUN, "--plot", str(tmp_path / "no" / "run.png")]) == 2
        assert capsys.readouterr().err.startswith("error: --plot = ")

    def test_neither_torch_nor_matplotlib_nor_numpy_is_imported_for_the_table(self) -> None:
        code = (
            "import sys; from lmscale.cli.main import main; "
            f"main(['preview', {self.RUN!r}]); "
            "assert not {'torch', 'matplotlib', 'numpy'} & set(sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
