"""The command line for each launcher, and where ranks go."""

import shutil
import sys
from pathlib import Path

import pytest

from lmscale.errors import ConfigError
from lmscale.launcher.compose import Placement, compose, place
from lmscale.launcher.hosts import Host, read_hostfile
from lmscale.launcher.start import resolved_config_path
from lmscale.launcher.validate import validate_run
from tests.launcher.runs import make_run

CPU = {"DS_ACCELERATOR": "cpu"}


def plan_for(tmp_path, placement):
    return validate_run(make_run(tmp_path), placement.num_ranks)


def command_for(tmp_path, placement, environ=CPU):
    plan = plan_for(tmp_path, placement)
    return compose(plan, placement, resolved_config_path(plan), environ)


def hostfile(tmp_path, text="a slots=2\nb slots=2\n"):
    path = tmp_path / "hostfile"
    path.write_text(text)
    return str(path)


def after(argv, option):
    return argv[argv.index(option) + 1]


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: f"/usr/bin/{program}")
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        monkeypatch.setenv(name, "1")


def test_one_host_without_a_gpu(tmp_path):
    command = command_for(tmp_path, place(None, 2, None, CPU))
    assert Path(command.argv[0]).name == "deepspeed"
    assert after(command.argv, "--num_accelerators") == "2"
    assert command.argv[-4:] == ("--module", "lmscale.pretrain", "--config", f"{tmp_path}/run/config.resolved.yaml")
    assert command.env["DS_ACCELERATOR"] == "cpu"
    assert int(command.env["OMP_NUM_THREADS"]) >= 1
    assert command.is_local
    assert command.travels == {}


def test_two_runs_on_one_host_meet_on_no_port_and_bear_no_common_mark(tmp_path):
    first, second = (command_for(tmp_path, place(None, 1, None, CPU)) for _ in range(2))
    assert after(first.argv, "--master_port") != after(second.argv, "--master_port")
    assert first.env["LMSCALE_RUN_ID"] != second.env["LMSCALE_RUN_ID"]


def test_threads_that_the_user_sets_stay(tmp_path):
    command = command_for(tmp_path, place(None, 1, None, CPU), {**CPU, "OMP_NUM_THREADS": "3"})
    assert "OMP_NUM_THREADS" not in command.env


def test_a_rank_identity_from_outside_is_taken_away(tmp_path):
    assert {"RANK", "WORLD_SIZE"} <= set(command_for(tmp_path, place(None, 1, None, CPU)).unset)


def test_cuda_devices_that_the_user_chose_are_used(tmp_path):
    """DeepSpeed takes the host's first devices where it is given a number, whatever CUDA_VISIBLE_DEVICES says."""
    placement = Placement(num_ranks=2, cuda_devices=("2", "5", "7"))
    command = command_for(tmp_path, placement, {"CUDA_VISIBLE_DEVICES": "2,5,7"})
    assert after(command.argv, "--include") == "localhost:2,5"
    assert "CUDA_VISIBLE_DEVICES" in command.unset
    assert "DS_ACCELERATOR" not in command.env


def test_all_cuda_devices_are_counted(tmp_path):
    command = command_for(tmp_path, Placement(num_ranks=2, cuda_devices=("0", "1")), {})
    assert after(command.argv, "--num_gpus") == "2"


def test_devices_named_by_uuid_need_torchrun(tmp_path):
    environ = {"CUDA_VISIBLE_DEVICES": "MIG-1"}
    with pytest.raises(ConfigError, match=r"CUDA_VISIBLE_DEVICES = 'MIG-1'.*--launcher torchrun"):
        command_for(tmp_path, Placement(num_ranks=1, cuda_devices=("MIG-1",)), environ)
    command = command_for(tmp_path, Placement("torchrun", num_ranks=1, cuda_devices=("MIG-1",)), environ)
    assert "CUDA_VISIBLE_DEVICES" not in command.unset


@pytest.mark.parametrize("launcher", [None, "pdsh"])
def test_several_hosts_by_deepspeed(tmp_path, launcher):
    path = hostfile(tmp_path)
    command = command_for(tmp_path, place(launcher, None, path, CPU))
    assert after(command.argv, "--hostfile") == path
    assert after(command.argv, "--launcher") == "pdsh"
    assert after(command.argv, "--master_addr") == "a"
    assert "--num_gpus" not in command.argv
    assert not command.is_local


def test_devices_limit_the_ranks_of_each_host(tmp_path):
    placement = place(None, 1, hostfile(tmp_path), CPU)
    assert placement.num_ranks == 2
    assert after(command_for(tmp_path, placement).argv, "--num_gpus") == "1"


def test_torchrun(tmp_path):
    command = command_for(tmp_path, place("torchrun", 2, None, CPU))
    assert Path(command.argv[0]).name == "torchrun"
    assert "--nproc_per_node=2" in command.argv
    assert command.argv[-4:-2] == ("--module", "lmscale.pretrain")


def test_slurm_takes_the_jobs_tasks(tmp_path):
    environ = {**CPU, "SLURM_NTASKS": "4", "SLURM_JOB_ID": "17", "SLURMD_NODENAME": "node-1"}
    command = command_for(tmp_path, place("slurm", None, None, environ), environ)
    assert command.argv[:2] == ("srun", "--ntasks=4")
    assert command.argv[-5:-1] == ("-u", "-m", "lmscale.pretrain", "--config")
    assert sys.executable in command.argv
    assert (command.env["MASTER_ADDR"], command.env["MASTER_PORT"]) == ("node-1", "20017")
    assert command.passes_usr1


@pytest.mark.parametrize(
    ("launcher", "devices", "hosts", "part"),
    [
        ("pdhs", None, False, "--launcher = 'pdhs': is no launcher; did you mean 'pdsh'?"),
        ("pdsh", None, False, "give --hostfile"),
        ("slurm", None, True, "--launcher = 'slurm': does not read a hostfile"),
        (None, 0, False, "--devices = 0: must be at least 1"),
    ],
)
def test_wrong_placements_are_refused(tmp_path, launcher, devices, hosts, part):
    with pytest.raises(ConfigError) as caught:
        place(launcher, devices, hostfile(tmp_path) if hosts else None, CPU)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("launcher", "program", "package"),
    [
        ("deepspeed", "pdsh", "pdsh"),
        ("pdsh", "pdsh", "pdsh"),
        ("openmpi", "ompi_info", "openmpi-bin"),
        ("mpich", "mpiexec.hydra", "mpich"),
        ("torchrun", "ssh", "openssh-client"),
        ("slurm", "srun", "slurm-client"),
    ],
)
def test_a_launcher_that_is_not_installed_names_its_package(tmp_path, monkeypatch, launcher, program, package):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    expected = rf"needs {program}, which is not on the PATH; .* apt-get install {package}"
    with pytest.raises(ConfigError, match=expected):
        place(launcher, None, None if launcher == "slurm" else hostfile(tmp_path), CPU)


def test_show_is_a_line_for_a_shell(tmp_path):
    line = command_for(tmp_path, place(None, 1, None, CPU)).show()
    assert "DS_ACCELERATOR=cpu" in line
    assert "--module lmscale.pretrain" in line


def test_hostfile_is_read(tmp_path):
    assert read_hostfile(hostfile(tmp_path, "# two\na slots=2 # first\n\nb  slots=3\n")) == [Host("a", 2), Host("b", 3)]
    example = Path(__file__).parents[2] / "launch" / "hostfile.example"
    assert read_hostfile(example) == [Host("node-1", 8), Host("node-2", 8)]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a slots=2\na slots=1\n", "hostfile:2 = 'a slots=1': names a host again"),
        ("a slots=0\n", "hostfile:1 = 'a slots=0': must give the host at least one slot"),
        ("a\n", "hostfile:1 = 'a': must be as"),
        ("a slots=2 max\n", "must be as"),
        ("# none\n", "names no host"),
    ],
)
def test_wrong_hostfiles_are_refused_by_line(tmp_path, text, part):
    with pytest.raises(ConfigError) as caught:
        read_hostfile(hostfile(tmp_path, text))
    assert part in str(caught.value)


def test_a_missing_hostfile_is_refused():
    with pytest.raises(ConfigError, match=r"--hostfile = 'nowhere': cannot be read: No such file"):
        read_hostfile("nowhere")
