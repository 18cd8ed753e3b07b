"""`lmscale train` and the bare deepspeed command, by the real launcher, with their signals and statuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmscale.errors import EXIT_INTERRUPTED_AND_SAVED
from tests.distributed.runs import Keys, records, run_keys

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def write_config(keys: Keys, path: Path) -> str:
    path.write_text(json.dumps(keys))  # YAML reads JSON
    return str(path)


def wait_for_a_record(keys: Keys, process: subprocess.Popen[str]) -> None:
    while not (Path(keys["output_dir"]) / "metrics.jsonl").is_file() or not records(keys):
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)


def processes_of(output_dir: Path) -> list[str]:
    """Command lines of living processes that name the run's directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(output_dir) in line and "pytest" not in line:
            found.append(line)
    return found


def test_terminated_run_is_saved_leaves_no_process_and_goes_on(corpus: str, tmp_path: Path) -> None:
    keys = run_keys(corpus, tmp_path / "run", train__train_tokens=200_000 * 8 * 32)
    config = write_config(keys, tmp_path / "run.yaml")
    command = [str(BIN / "lmscale"), "train", config, "--devices", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)
    wait_for_a_record(keys, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == EXIT_INTERRUPTED_AND_SAVED, output
    assert "Traceback" not in output
    for chatter in ("hostfile", "built successfully", "fp16"):
        assert chatter not in output
    assert not processes_of(tmp_path / "run")
    stopped_at = records(keys)[-1]["step"]
    resumed = subprocess.run(
        [*command, f"train.stop_at_step={stopped_at + 2}"], capture_output=True, text=True, env=ENVIRONMENT, timeout=400
    )
    assert resumed.returncode == 0, resumed.stderr
    assert [record["step"] for record in records(keys)] == list(range(1, stopped_at + 3))


def test_bare_deepspeed_command_trains_with_overrides_and_another_json(corpus: str, tmp_path: Path) -> None:
    keys = run_keys(corpus, tmp_path / "run")
    config = write_config(keys, tmp_path / "run.yaml")
    (tmp_path / "zero2.json").write_text('{"zero_optimization": {"stage": 2}}')
    command = [
        str(BIN / "deepspeed"),
        "--num_accelerators",
        "2",
        "--master_port",
        "29731",
        "--module",
        "lmscale.pretrain",
    ]
    command += ["--config", config, "--deepspeed_config", str(tmp_path / "zero2.json"), "train.stop_at_step=2"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(records(keys)) == 2
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["layout"]["zero_stage"] == 2
    assert manifest["layout"]["dp_size"] == 2
    assert (tmp_path / "run" / "logs" / "rank-0001.log").is_file()
