"""docs/launch.md: every command in it is one that lmscale takes, by a dry run; its table is that of the code."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

from lmscale.launcher.environment import is_secret, travelling
from lmscale.launcher.placement import Launcher
from tests.launcher.runs import write_run

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "launch.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A directory as the page supposes it: the repository's scripts, a hostfile, a run of that name, launchers."""
    write_run(tmp_path)
    (tmp_path / "launch" / "runs").mkdir(parents=True)
    (tmp_path / "run.yaml").rename(tmp_path / "launch" / "runs" / "gpt3-1.3b-modern.yaml")
    for path in (ROOT / "launch").glob("*.*"):
        (tmp_path / "launch" / path.name).symlink_to(path)
    (tmp_path / "hostfile").write_text("node-1 slots=4\nnode-2 slots=4\n")
    programs = tmp_path / "bin"
    programs.mkdir()
    texts = {
        "lmscale": f'exec {sys.executable} -m lmscale "$@"',
        "sbatch": 'shift 2; exec env SLURM_JOB_NUM_NODES=2 SLURM_NTASKS=16 bash "$@"',
    }
    names = ("pdsh", "ssh", "ompi_info", "mpirun", "mpiexec.hydra", "srun")
    for name, text in {**texts, **dict.fromkeys(names, "exit 255")}.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    return tmp_path


def run(command: str, home: Path) -> subprocess.CompletedProcess[str]:
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    path = f"{home / 'bin'}:{os.environ['PATH']}"
    environ = {**os.environ, **root, "DS_ACCELERATOR": "cpu", "PATH": path, "PYTHONPATH": str(ROOT)}
    return subprocess.run(["bash", "-c", command], cwd=home, env=environ, capture_output=True, text=True, check=False)


def test_the_page_has_commands():
    assert len(COMMANDS) >= 12


@pytest.mark.parametrize("command", [line for line in COMMANDS if "gpt3-1.3b-modern.yaml" in line])
def test_a_command_that_trains_is_dry_run(command, home):
    # The batch must divide over as many ranks as the command names.
    done = run(f"{command} batch.micro_batch_size=1 batch.global_batch_size=96 --dry-run", home)
    assert done.returncode == 0, done.stderr
    assert "lmscale.pretrain" in done.stdout


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("lmscale doctor")])
def test_doctor_takes_the_pages_options(command, home):
    """The hosts of the page do not exist: both are named."""
    done = run(command, home)
    assert done.returncode == 1
    assert "node-1: ssh: " in done.stdout
    assert "node-2: ssh: " in done.stdout


def test_no_command_is_left_out(home):
    """What is no command of ours is kubectl's, and its manifest has a test of its own."""
    others = [
        line for line in COMMANDS if "gpt3-1.3b-modern.yaml" not in line and not line.startswith("lmscale doctor")
    ]
    assert others == ["kubectl apply -f launch/kubernetes.yaml"]
    assert yaml.safe_load((ROOT / shlex.split(others[0])[-1]).read_text())["kind"] == "JobSet"


def test_the_table_names_every_launcher_and_every_script():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]
    assert {name for name in get_args(Launcher) if name != "deepspeed"} <= set(
        re.findall(r"`([a-z]+)`", "\n".join(rows))
    )
    files = {path.name for path in (ROOT / "launch").glob("*.*") if path.name != "hostfile.example"}
    assert files == {Path(name).name for name in re.findall(r"`(launch/[\w.]+)`", "\n".join(rows))}


def test_what_the_page_says_travels_does():
    section = PAGE.split("## What travels")[1]
    first, second = section.split("what `~/.deepspeed_env`")
    names = re.findall(r"`([A-Z_0-9]+\*?)`", first.split("`PYTHONPATH`")[0])
    assert len(names) > 15
    found = {name: name.replace("*", "X") for name in names}
    assert set(travelling(dict.fromkeys(found.values(), "1"))) == set(found.values())
    secrets = re.findall(r"`\*([A-Z_]+)\*`", second)
    assert len(secrets) >= 6
    assert all(is_secret(f"MY_{name}_1") for name in secrets)
    endings = re.findall(r"`\*(_[A-Z]+)`", second)
    assert len(endings) >= 4
    assert all(is_secret(f"MY{name}") for name in endings)
