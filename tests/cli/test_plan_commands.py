"""`lmscale plan`: the table, JSON, the formulas, the run that it writes, and wrong input."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from lmscale.cli.main import main
from lmscale.config.check import check_run
from lmscale.config.deepspeed_json import check_deepspeed, load_deepspeed
from lmscale.config.io import load_run
from tests.cli.test_main import HEAVY, imported_by

LATE_COOLDOWN = [
    "optim.lr_cooldown={start_tokens: 90, tokens: 10}",
    "optim.lr_decay_tokens=50",
    "train.train_tokens=100",
]
LATE_COOLDOWN += ["optim.min_lr=0", "optim.lr_warmup_tokens=10"]
PLAN = ["plan", "gpt3-1.3b", "--devices", "32", "--device-type", "A100-80"]


def test_the_table_fits_its_width_and_shows_the_best_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, "--top", "3"]) == 0
    shown = capsys.readouterr().out
    table = shown[: shown.index("device memory: p parameters")]
    assert max(map(len, table.splitlines())) <= 120
    assert "1.32B parameters, bf16, batch 512, on 32 A100-80" in table
    for column in ("TP", "PP", "DP", "ZeRO", "micro", "GiB", "step s", "bubble", "MFU", "days"):
        assert column in table
    assert "best: TP " in shown
    assert "checkpoints of 15 GiB" in shown


def test_json_has_every_figure_of_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, "--json", "--top", "2"]) == 0
    answer = json.loads(capsys.readouterr().out)
    hidden = 2048
    layers = 24 * (12 * hidden**2 + 13 * hidden)
    assert answer["num_parameters"] == layers + (50257 + 2048 + 2) * hidden
    assert len(answer["rows"]) == 2
    row = answer["rows"][0]
    layout = row["layout"]
    assert layout["tp_size"] * layout["pp_size"] * layout["dp_size"] == 32
    kinds = [row["device_bytes"][name] for name in row["device_bytes"] if name != "total"]
    assert sum(kinds) == row["device_bytes"]["total"]
    parts = [row["step_seconds"][name] for name in row["step_seconds"] if name != "total"]
    assert sum(parts) == pytest.approx(row["step_seconds"]["total"])
    assert set(row["communication_bytes"]) == {"tensor", "pipeline", "data"}
    assert row["device_hours"] == pytest.approx(24 * 32 * row["train_days"])


def test_explain_shows_formulas_with_numbers_and_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, "--explain"]) == 0
    shown = capsys.readouterr().out
    for part in ("Rajbhandari et al. 2020", "Korthikanti et al. 2022", "Narayanan et al. 2021", "0.77 x 312 TFLOP/s"):
        assert part in shown


@pytest.mark.parametrize("name", ["gpt3-13b", "t5-large", "bert-base"])
def test_the_written_run_loads_and_may_start(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "planned.yaml"
    assert main(["plan", name, "--devices", "16", "--device-type", "A100-40", "--write", str(path), "--json"]) == 0
    layout = json.loads(capsys.readouterr().out)["rows"][0]["layout"]
    config = load_run(path)
    zero = check_deepspeed(load_deepspeed(config.deepspeed), config)
    check_run(config, zero, 16)
    assert zero.stage == layout["zero_stage"]
    assert config.parallel.tp_size == layout["tp_size"]
    assert config.batch.micro_batch_size == layout["micro_batch_size"]
    assert "# devices: 16" in path.read_text()


def test_a_run_file_with_overrides_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "planned.yaml"
    main([*PLAN, "--write", str(path)])
    capsys.readouterr()
    assert main(["plan", str(path), "batch.global_batch_size=64", "--devices", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["global_batch_size"] == 64


def test_fewest_and_largest_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "gpt3-13b", "--device-type", "A100-80", "--fewest", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"] in (1, 2, 4, 8)
    assert main(["plan", "gpt3-125m", "--devices", "1", "--device-type", "A100-40", "--largest"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("largest preset: gpt3-")
    assert "largest gpt of GPT-3's proportions" in shown


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["gpt3-175", "--devices", "8"], "did you mean 'gpt3-175b'?"),
        (["nowhere.yaml", "--devices", "8"], "does not exist"),
        (["gpt3-13b"], "--devices: is missing"),
        (["gpt3-13b", "--devices", "0"], "--devices = 0: must be between"),
        (["gpt3-13b", "--devices", "8", "--top", "0"], "--top = 0: must be at least 1"),
        (["gpt3-13b", "--devices", "8", "--device-type", "H10"], "did you mean 'H100'?"),
        (["gpt3-13b", "--devices", "7"], "must be a multiple of"),
        (["gpt3-175b", "--devices", "1"], "no layout fits H100: the nearest"),
        (["gpt3-13b", "precision=bf16", "--devices", "8", "--device-type", "V100"], "V100 computes in fp16, fp32 only"),
        ([*PLAN[1:], "--write", "/nowhere/x.yaml"], "--write = '/nowhere/x.yaml': cannot be written"),
        (["gpt3-13b", "model.hidden_size=-1", "--devices", "8"], "model.hidden_size = -1"),
        (["gpt3-13b", "--devices", "8", "--largest", "--fewest"], "--fewest"),
        (["gpt3-13b", "--devices", "8", "data.seq_length=4096"], "error: data.seq_length = 4096: must be at most"),
        (
            ["gpt3-13b", "--devices", "8", "train.train_tokens=10"],
            "error: optim.lr_warmup_tokens = 3000000000: the warm",
        ),
        (["gpt3-13b", "--devices", "8", *LATE_COOLDOWN], "the schedule's rate there is 0"),
        *(
            (["gpt3-13b", "--devices", "8", f"{key}={10**20}"], f"{key} = {10**20}: input should be less than")
            for key in ("batch.global_batch_size", "batch.micro_batch_size", "data.seq_length", "train.train_tokens")
        ),
        (["gpt3-1.3b", "--devices", "1000000"], "--fewest finds how many serve"),
        (["gpt3-1.3b", "--devices", "1000000", "--largest"], "batch.global_batch_size = 512 must be a multiple"),
        (["gpt3-13b", "--devices", "8", "optim.groups=[{name: a, match: b}]"], "matches no parameter of the model"),
        (
            ["gpt3-13b", "--devices", "8", "optim.groups=[{name: a, match: '*', frozen: true}]"],
            "every parameter is froz",
        ),
        (
            ["gpt3-13b", "--devices", "8", "optim.implementation=apex", "optim.name=lion"],
            "optim.implementation = 'apex': has no lion",
        ),
    ],
)
def test_wrong_input_is_one_line_and_status_2(argv: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert part in error


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_a_thousand_devices_take_less_than_a_second(optimizer: str) -> None:
    """Of CPU time, interpreter and imports included: others may use the machine meanwhile."""
    argv = ["plan", "gpt3-175b", "--devices", "1024", f"optim.name={optimizer}", "--json"]
    code = f"import sys; from lmscale.cli.main import main; sys.exit(main({argv!r}))"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 1.0


def test_a_plan_imports_no_torch() -> None:
    status, modules = imported_by(*PLAN)
    assert status == 0
    assert modules & {*HEAVY} == set()


def test_simulated_ranks_are_those_of_the_runs_layout(capfd: pytest.CaptureFixture[str]) -> None:
    line = ["plan", "launch/runs/gpt3-125m-paper.yaml", "--devices", "8", "--simulate-ranks", "first,3,last", "--json"]
    assert main([*line, "parallel.tp_size=2", "parallel.pp_size=2"]) == 0
    ranks = json.loads(capfd.readouterr().out)
    assert [row["rank"] for row in ranks] == [0, 3, 7]
    assert [row["stage"] for row in ranks] == [0, 0, 1]
    assert [row["tp_ranks"] for row in ranks] == [[0, 1], [2, 3], [6, 7]]
    assert [row["dp_ranks"] for row in ranks] == [[0, 2], [1, 3], [5, 7]]
    assert ranks[0]["layers"][0] == "word_embedding"
    assert ranks[2]["layers"][-1] == "head"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [("0,8", "rank = 8: must be 0 to 7"), ("0,middle", "--simulate-ranks = '0,middle': must be numbers")],
)
def test_ranks_that_cannot_be_simulated_are_refused(
    wanted: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "gpt3-125m", "--devices", "8", "--simulate-ranks", wanted]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--largest", "--explain"], "--explain: is not read with --largest"),
        (["--largest", "--top", "3"], "--top: is not read with --largest"),
        (["--simulate-ranks", "0", "--top", "3"], "--top: is not read with --simulate-ranks"),
        (["--fewest"], "--devices: is not read with --fewest"),
        (["--json", "--explain"], "--explain: is not read with --json"),
        (["--simulate-ranks", "0", "--write", "x.yaml"], "--write: is not read with --simulate-ranks"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*PLAN, *options]) == 2
    assert message in capsys.readouterr().err
