"""launch/: every script passes shellcheck, composes nothing itself, and says what it needs; the manifest fits its schema."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from lmscale.cli.main import main
from tests.launcher.runs import write_run

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = sorted([*(ROOT / "launch").glob("*.sh"), *(ROOT / "launch").glob("*.sbatch")])
SCRIPTS = [*LAUNCH, *sorted((ROOT / "tools").glob("*.sh")), ROOT / ".ci" / "run"]
SHELLCHECK = Path(sys.executable).with_name("shellcheck")
SCHEMA = json.loads(Path(__file__).with_name("jobset_schema.json").read_text())
MANIFEST = yaml.safe_load((ROOT / "launch" / "kubernetes.yaml").read_text())
KUBERNETES = "1.33"
"""The schemas to hold the Job and its pods against."""


def shellcheck(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SHELLCHECK, path], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
    done = shellcheck(path)
    assert done.returncode == 0, done.stdout


def test_shellcheck_finds_what_is_wrong(tmp_path):
    script = tmp_path / "bad.sh"
    script.write_text("#!/bin/bash\ncd $1\n")
    assert "SC2086" in shellcheck(script).stdout


def test_every_launcher_has_a_script():
    assert {path.name for path in LAUNCH} == {
        *("single_node.sh", "multi_node.sh", "openmpi.sh", "mpich.sh", "torchrun.sh", "torchrun_elastic.sh"),
        "slurm.sbatch",
    }


@pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.name)
def test_a_script_leaves_the_command_to_lmscale_train(path):
    """One source for the command: no script names a module, or the program of a launcher."""
    body = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
    assert body.count('lmscale train "$run"') == 1
    assert not re.search(
        r"(?<!--launcher )\b(deepspeed|pdsh|mpirun|mpiexec|srun|torch\.distributed|python|lmscale\.pretrain)", body
    )


@pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.name)
def test_a_script_says_how_it_is_called_and_what_travels(path):
    header = path.read_text().split("set -euo")[0]
    assert f"launch/{path.name}" in header
    assert re.search(r"travel|hands on the environment", header)


@pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.name)
def test_a_script_without_arguments_says_how_it_is_called_and_ends_with_2(path):
    done = subprocess.run(["bash", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert re.fullmatch(rf"error: usage: .*{path.name} .*RUN.yaml .*\n", done.stderr)


SCRIPT_ARGUMENTS = {
    "single_node.sh": ([], "--num_accelerators 2", {"NUM_RANKS": "2"}),
    "multi_node.sh": (["HOSTFILE"], "--launcher pdsh", {}),
    "openmpi.sh": (["HOSTFILE"], "mpirun", {}),
    "mpich.sh": (["HOSTFILE"], "mpiexec.hydra", {}),
    "torchrun.sh": (["HOSTFILE"], "--node-rank=1", {}),
    "torchrun_elastic.sh": (["1:2", "node-1"], "--max-restarts=7", {"NUM_RANKS": "2", "MAX_RESTARTS": "7"}),
    "slurm.sbatch": ([], "srun --ntasks=2", {"SLURM_NTASKS": "2"}),
}


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A PATH with this environment's lmscale and the names of the launchers; a dry run starts none of them."""
    directory = tmp_path / "bin"
    directory.mkdir()
    lmscale = f'#!/bin/sh\nexec {sys.executable} -m lmscale "$@"\n'
    names = ("pdsh", "ssh", "ompi_info", "mpirun", "mpiexec.hydra", "srun")
    for name, text in (("lmscale", lmscale), *((name, "#!/bin/sh\nexit 1\n") for name in names)):
        (directory / name).write_text(text)
        (directory / name).chmod(0o755)
    return directory


@pytest.mark.parametrize("name", SCRIPT_ARGUMENTS)
def test_a_script_composes_by_a_dry_run(name, tmp_path, programs):
    arguments, part, extra = SCRIPT_ARGUMENTS[name]
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node-1 slots=2\nnode-2 slots=2\n")
    words = [str(hostfile) if word == "HOSTFILE" else word for word in arguments]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "DS_ACCELERATOR": "cpu"}
    environ = {**os.environ, **root, **extra, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = ["bash", ROOT / "launch" / name, *words, str(write_run(tmp_path)), "train.seed=7", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 0, done.stderr
    assert part in done.stdout
    assert "seed: 7" in done.stdout


@pytest.mark.parametrize("name", SCRIPT_ARGUMENTS)
def test_a_script_without_arguments_says_how_it_is_called(name):
    done = subprocess.run(["bash", ROOT / "launch" / name], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "usage: " in done.stderr


def validate(manifest: dict[str, Any]) -> None:
    """Hold a JobSet against its own schema, and its jobs against Kubernetes'."""
    jsonschema.validate(manifest, SCHEMA)
    for each in manifest["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": each["name"]}, **each["template"]}
        kubernetes_validate.validate(job, KUBERNETES, strict=True)


def test_the_manifest_fits_its_schemas():
    validate(MANIFEST)


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ((), "kind", "JobSets"),
        (("spec",), "failurePolice", {}),
        (("spec", "failurePolicy"), "maxRestarts", "many"),
        (("spec", "replicatedJobs", 0), "replica", 1),
        (("spec", "replicatedJobs", 0, "template", "spec"), "backofLimit", 0),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0), "image", 7),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0), "commands", []),
    ],
)
def test_the_schemas_find_what_is_wrong(place, key, value):
    manifest = copy.deepcopy(MANIFEST)
    inner = manifest
    for step in place:
        inner = inner[step]
    inner[key] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(manifest)


def test_the_manifests_command_is_one_that_lmscale_takes(tmp_path, monkeypatch, capsys):
    """As a pod runs it, but for the run's own file, whose corpora are not here."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    jobs = MANIFEST["spec"]["replicatedJobs"][0]
    job = jobs["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    program, *words = container["command"]
    assert program == "lmscale"
    assert (ROOT / words[1]).is_file()
    words = [word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in words if not word.startswith("output_dir=")]
    words[1] = str(write_run(tmp_path))
    assert main([*words, "batch.micro_batch_size=1", "--dry-run"]) == 0
    out = capsys.readouterr().out
    name = MANIFEST["metadata"]["name"]
    first = f"{name}-{jobs['name']}-0-0.{name}"
    assert {"--nnodes=2", "--node-rank=1", "--nproc-per-node=8", f"--master-addr={first}"} <= set(out.split())
    assert job["parallelism"] == job["completions"] == 2
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
