"""The console: exit statuses, one error line, no traceback, and nothing heavy before it is needed."""

import os
import subprocess
import sys

import pytest
import yaml

from lmscale import __version__
from lmscale.cli.main import COMMANDS, main
from tests.launcher.runs import run_keys, write_deepspeed, write_run

HEAVY = ("torch", "deepspeed", "megatron", "transformers")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def imported_by(*argv: str) -> tuple[int, set[str]]:
    """Run a command in a fresh process; return its status and the top-level modules that it imported."""
    code = (
        "import sys; from lmscale.cli.main import main; status = main(sys.argv[1:]); "
        "print('MODULES', *{name.partition('.')[0] for name in sys.modules}); sys.exit(status)"
    )
    result = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)
    return result.returncode, set(result.stdout.rpartition("MODULES ")[2].split())


def test_help_lists_every_command_and_imports_next_to_nothing():
    status, modules = imported_by("--help")
    assert status == 0
    assert modules & {*HEAVY, "rich", "pydantic", "omegaconf", "numpy", "yaml"} == set()


def test_help_shows_the_commands(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    for name, entry in COMMANDS.items():
        assert name in shown
        assert entry.help in shown


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lmscale {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["trian"], "trian"),
        (["data"], "missing command; see lmscale data --help"),
        (["--nope"], "no such option: --nope"),
        (["train", "--nope"], "no such option: --nope"),
        (["train", "--devices", "two", "x.yaml"], "invalid value for '--devices'"),
        (["train", "--devices"], "--devices"),
        (["train"], "RUN.yaml: is missing"),
        (["train", "nowhere.yaml"], "config = 'nowhere.yaml': does not exist"),
        (["train", "nowhere.yaml", "--launcher", "pdsh"], "nowhere.yaml"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(capsys, argv, part):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert part in error


@pytest.mark.parametrize(
    ("extra", "part"),
    [
        (["model.num_layer=3"], "model.num_layer: unknown key; did you mean 'num_layers'?"),
        (["parallel.tp_size=3"], "model.num_attention_heads = 4: must be a multiple of parallel.tp_size = 3"),
        (["--devices", "3"], "batch.global_batch_size = 16: must be a multiple of"),
        (["data.train.0.prefix=nowhere"], "nowhere.idx"),
        (["--hostfile", "nowhere"], "--hostfile = 'nowhere'"),
        (["--launcher", "ssh"], "--launcher = 'ssh': is no launcher"),
        (["--deepspeed_config", "nowhere.json"], "deepspeed = 'nowhere.json': does not exist"),
    ],
)
def test_a_wrong_run_is_refused_before_anything_starts(tmp_path, capsys, extra, part):
    path = write_run(tmp_path)
    assert main(["train", str(path), *extra]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert part in error
    assert not (tmp_path / "run").exists()


def test_a_refusal_imports_no_torch(tmp_path):
    path = write_run(tmp_path)
    status, modules = imported_by("train", str(path), "data.train.0.prefix=nowhere")
    assert status == 2
    assert modules & {*HEAVY} == set()


def test_dry_run_prints_the_command_and_the_resolved_config_and_starts_nothing(tmp_path, capsys):
    path = write_run(tmp_path)
    keys = write_deepspeed(tmp_path, {"zero_optimization": {"stage": 2}})
    argv = ["train", str(path), "optim.lr=0.5", "--devices", "2", "--deepspeed_config", str(keys), "--dry-run"]
    assert main(argv) == 0
    command, _, config = capsys.readouterr().out.partition("\n")
    assert "deepspeed" in command
    assert "--num_accelerators 2" in command
    assert f"--config {tmp_path}/run/config.resolved.yaml" in command
    assert yaml.safe_load(config)["optim"]["lr"] == 0.5
    assert yaml.safe_load(config)["deepspeed"] == {"zero_optimization": {"stage": 2}}
    assert not (tmp_path / "run").exists()


def test_dry_run_says_what_a_device_holds_and_warns_where_it_has_less(tmp_path, capsys):
    path = write_run(tmp_path)
    small = tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump({**SMALL_DEVICE, "memory_bytes": 1.6e9}))
    assert main(["train", str(path), "--dry-run", "--device-type", str(small)]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[1].startswith("# memory: a device needs 1")
    assert "optimizer" in shown.out.splitlines()[1]
    assert shown.err.startswith("warning: it will not fit: a device needs ")
    assert shown.err.count("\n") == 1
    assert main(["train", str(path), "--dry-run", "--device-type", "H100"]) == 0
    assert capsys.readouterr().err == ""


def test_a_device_type_without_a_dry_run_is_refused(tmp_path, capsys):
    assert main(["train", str(write_run(tmp_path)), "--device-type", "H100"]) == 2
    assert "--device-type" in capsys.readouterr().err


SMALL_DEVICE = {
    "flops_per_second": {"fp32": 1.0e12},
    "memory_bytes_per_second": 1.0e11,
    "node_bytes_per_second": 1.0e10,
    "network_bytes_per_second": 1.0e9,
    "matmul_fraction": 0.7,
}


def test_train_hands_the_ranks_one_config_and_returns_their_status(tmp_path, monkeypatch, capsys):
    """A stand-in for the launcher reads the config file that it is given, and reports for its rank."""
    path = write_run(tmp_path)
    script = tmp_path / "deepspeed"
    script.write_text(
        f"#!{sys.executable}\n"
        "import os, sys, yaml\n"
        "config = yaml.safe_load(open(sys.argv[sys.argv.index('--config') + 1]))\n"
        "assert sys.argv[-2] == '--config' and config['optim']['lr'] == 0.5\n"
        "os.environ['RANK'] = '0'\n"
        "from lmscale.launcher.status import report\n"
        "sys.exit(report(75))\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr("lmscale.launcher.compose._program", lambda name: str(script))
    assert main(["train", str(path), "optim.lr=0.5"]) == 75
    assert capsys.readouterr().err == ""
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["config.resolved.yaml"]


def test_a_defect_keeps_its_traceback(tmp_path, monkeypatch):
    path = write_run(tmp_path)

    def broken(*_):
        raise RuntimeError("a defect")

    monkeypatch.setattr("lmscale.launcher.validate.validate_run", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["train", str(path)])


def test_the_resolved_config_of_a_relative_directory_is_absolute(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write_run(tmp_path)
    keys = run_keys(tmp_path) | {"output_dir": "run"}
    path.write_text(yaml.safe_dump(keys))
    assert main(["train", str(path), "--dry-run"]) == 0
    assert f"--config {os.getcwd()}/run/config.resolved.yaml" in capsys.readouterr().out


def test_help_config_names_every_key(capsys):
    assert main(["train", "--help-config"]) == 0
    shown = capsys.readouterr().out
    assert "lr_warmup_tokens" in shown.replace("\n", "")


def test_doctor_prints_the_layouts(capsys):
    assert main(["doctor", "--layouts"]) == 0
    shown = capsys.readouterr().out
    assert "pipeline with ZeRO 2 or 3: no" in shown
