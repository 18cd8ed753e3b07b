"""`lmscale import-hf` and `lmscale export-hf` as a user calls them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmscale.cli.main import main
from tests.convert.models import build, save, stored


def test_a_directory_goes_in_and_comes_out_in_processes_without_transformers(tmp_path):
    source = save(build("gpt2"), tmp_path / "source")
    checkpoint, exported = tmp_path / "checkpoint", tmp_path / "exported"
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from lmscale.cli.main import main\n"
        "one, two, three = sys.argv[1:]\n"
        "assert main(['import-hf', one, two]) == 0\n"
        "assert main(['export-hf', two, three, '--dtype', 'bf16']) == 0\n"
        "assert main(['export-hf', two, three]) == 2\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(checkpoint), str(exported)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    count = sum(tensor.numel() for tensor in stored(source).values())
    assert done.stdout == f"{checkpoint}: gpt2, {count:,} parameters\n{exported}: gpt2, {count:,} parameters\n"
    assert done.stderr.splitlines() == [
        "note: without a tokenizer: the directory holds none",
        "note: without a tokenizer: the checkpoint holds none",
        f"error: {exported}: exists already; name a new directory, or remove it",
    ]


@pytest.mark.parametrize(
    ("command", "part"),
    [
        (["import-hf", "nowhere", "there"], "HF_DIR = 'nowhere': is no directory"),
        (["export-hf", "nowhere", "there"], "checkpoint = 'nowhere': does not exist"),
        (["export-hf", ".", "there", "--dtype", "int8"], "invalid value for '--dtype'"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(capsys, command, part):
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert part in error
    assert not Path("there").exists()
