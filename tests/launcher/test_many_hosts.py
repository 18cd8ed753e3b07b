"""What runs on each of several hosts, and what travels there."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from lmscale.cli.main import main
from lmscale.errors import ConfigError
from lmscale.launcher.compose import compose, place
from lmscale.launcher.restarts import check_sizes
from lmscale.launcher.shell import check_port, is_loopback, rendezvous_address
from lmscale.launcher.start import resolved_config_path
from lmscale.launcher.validate import validate_run
from tests.launcher.fake_ssh import put_ssh_on_path, standard_input
from tests.launcher.runs import make_run, write_run

CPU = {"DS_ACCELERATOR": "cpu"}
ENVIRON = {
    **CPU,
    **{"GLOO_SOCKET_IFNAME": "eth0", "NCCL_DEBUG": "INFO", "UCX_TLS": "tcp", "PYTHONUNBUFFERED": "1", "EDITOR": "vi"},
    **{"HF_TOKEN": "hush-1", "WANDB_API_KEY": "hush-2", "MLFLOW_TRACKING_PASSWORD": "hush-3", "NCCL_SECRET": "hush-4"},
}
SECRETS = {"HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "NCCL_SECRET"}
OVER_HOSTS = ["deepspeed", "pdsh", "openmpi", "mpich", "torchrun"]


@pytest.fixture(autouse=True)
def installed(tmp_path, monkeypatch):
    put_ssh_on_path(tmp_path, monkeypatch)
    monkeypatch.setattr(shutil, "which", lambda program: f"/usr/bin/{program}")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        monkeypatch.setenv(name, "1")


def hostfile(tmp_path, text="a slots=2\nb slots=1\n"):
    path = tmp_path / "hostfile"
    path.write_text(text)
    return str(path)


def command_for(tmp_path, placement, environ=ENVIRON, overrides=("batch.global_batch_size=24",)):
    plan = validate_run(make_run(tmp_path, *overrides), placement.num_ranks)
    return compose(plan, placement, resolved_config_path(plan), environ)


def after(argv, option):
    return argv[argv.index(option) + 1]


@pytest.mark.parametrize("launcher", OVER_HOSTS)
def test_every_host_gets_what_its_ranks_need_and_no_secret(tmp_path, launcher):
    command = command_for(tmp_path, place(launcher, None, hostfile(tmp_path), CPU))
    assert [(each.host, each.num_ranks) for each in command.on_hosts] == [("a", 2), ("b", 1)]
    needed = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_DEBUG": "INFO", "UCX_TLS": "tcp", "DS_ACCELERATOR": "cpu"}
    assert needed.items() <= command.travels.items()
    assert command.travels["LMSCALE_RUN_ID"] == command.env["LMSCALE_RUN_ID"]
    assert command.hosts == ("a", "b")
    assert command.rank_hosts == ("a", "a", "b")
    assert command.travels["PYTHONPATH"].startswith(str(Path.cwd()))
    assert "EDITOR" not in command.travels
    assert not SECRETS & {*command.travels, *command.env}
    assert set(command.unset) >= SECRETS  # a launcher passes on what it finds: mpiexec everything, DeepSpeed MLFLOW*
    assert "hush" not in f"{command.show()}{command.show_hosts()}{command.argv}"
    assert not command.is_local


@pytest.mark.parametrize("launcher", OVER_HOSTS)
def test_what_the_users_file_names_travels_but_for_secrets(tmp_path, launcher, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text("MY_FLAG=1\nWANDB_API_KEY=hush\nno pair\n")
    command = command_for(tmp_path, place(launcher, None, hostfile(tmp_path), CPU))
    assert command.travels["MY_FLAG"] == "1"
    assert command.withheld == ("WANDB_API_KEY",)
    assert "hush" not in f"{command.show()}{command.show_hosts()}{command.travels}"


@pytest.mark.parametrize("devices", [None, 1])
def test_deepspeed_starts_on_each_host_what_is_shown(tmp_path, devices):
    """A contract: DeepSpeed's own code, given our command line, composes the same line and the same variables."""
    from deepspeed.launcher import runner
    from deepspeed.launcher.multinode_runner import PDSHRunner

    command = command_for(
        tmp_path, place("pdsh", devices, hostfile(tmp_path), CPU), overrides=("batch.global_batch_size=12",)
    )
    arguments: Namespace = runner.parse_args([*command.argv[1:]])
    pool = runner.fetch_hostfile(arguments.hostfile)
    active = runner.parse_inclusion_exclusion(pool, arguments.include, arguments.exclude)
    active = runner.apply_num_nodes_and_gpus(active, arguments.num_nodes, arguments.num_gpus)
    theirs = PDSHRunner(arguments, runner.encode_world_info(active))
    composed = theirs.get_cmd({}, active)[0]
    where = composed.index("-w")
    assert composed[where + 1] == "a,b"
    line = " ".join(word for word in composed[where + 2 :] if word)
    for number, each in enumerate(command.on_hosts):
        assert each.line == line.replace("%n", str(number))
        assert each.num_ranks == len(active[each.host])
    assert tuple(runner.EXPORT_ENVS) == ("MLFLOW", "PYTHON", "MV2", "UCX")


@pytest.mark.parametrize("value", ["a\nb", "$HOME", "`id`", 'say "x"', "back\\slash", "core.%h.%n", " blank"])
def test_a_value_that_pdsh_would_change_is_refused_and_torchrun_takes_it(tmp_path, value):
    environ = {**ENVIRON, "NCCL_DEBUG_FILE": value}
    with pytest.raises(ConfigError, match=r"NCCL_DEBUG_FILE = .*: cannot travel by pdsh: a shell would change it; "):
        command_for(tmp_path, place("pdsh", None, hostfile(tmp_path), CPU), environ)
    command = command_for(tmp_path, place("torchrun", None, hostfile(tmp_path), CPU), environ)
    assert command.travels["NCCL_DEBUG_FILE"] == value


def test_pdsh_gives_up_a_host_that_falls_silent(tmp_path):
    command = command_for(tmp_path, place("pdsh", None, hostfile(tmp_path), CPU))
    alive = "-o ServerAliveInterval=5 -o ServerAliveCountMax=4"
    assert command.env["PDSH_SSH_ARGS_APPEND"] == alive
    environ = {**ENVIRON, "PDSH_SSH_ARGS_APPEND": "-p 2222"}
    command = command_for(tmp_path, place("pdsh", None, hostfile(tmp_path), CPU), environ)
    assert command.env["PDSH_SSH_ARGS_APPEND"] == f"-p 2222 {alive}"


def test_values_between_double_quotes_travel_by_pdsh(tmp_path):
    environ = {**ENVIRON, "NCCL_IB_HCA": "=mlx5_0:1,mlx5_1:1", "PYTHONWARNINGS": "ignore::UserWarning;(x) & 100%"}
    command = command_for(tmp_path, place("pdsh", None, hostfile(tmp_path), CPU), environ)
    assert command.travels["PYTHONWARNINGS"] == "ignore::UserWarning;(x) & 100%"


@pytest.mark.parametrize("name", ["a b", "a;b"])
def test_a_working_directory_that_pdsh_would_change_is_refused(tmp_path, name, monkeypatch):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(ConfigError, match=rf"the working directory = '.*{name}': cannot be passed on by pdsh"):
        command_for(tmp_path, place("pdsh", None, hostfile(tmp_path), CPU))


@pytest.mark.parametrize(
    ("name", "is_right"), [("a run", True), ("a'run", False), ("a $run", False), ("run-%h", False)]
)
def test_an_output_dir_that_pdsh_would_change_is_refused(tmp_path, name, is_right):
    overrides = ("batch.global_batch_size=24", f"output_dir='{tmp_path}/{name}'".replace("a'run", "a''run"))
    refused = pytest.raises(ConfigError, match=r"output_dir = .*: cannot be passed on by pdsh")
    with nullcontext() if is_right else refused:
        command_for(tmp_path, place("pdsh", None, hostfile(tmp_path), CPU), overrides=overrides)


def test_openmpi_takes_values_from_its_environment(tmp_path):
    command = command_for(tmp_path, place("openmpi", None, hostfile(tmp_path), CPU))
    assert command.argv[:5] == ("mpirun.openmpi", "-np", "3", "--host", "a:2,b:1")
    names = {command.argv[number + 1] for number, word in enumerate(command.argv) if word == "-x"}
    assert names == {*command.travels, "LMSCALE_STATUS_ADDRESS"}
    assert not any("=" in name for name in names)
    assert command.env["MASTER_ADDR"] == "a"
    assert command.travels["MASTER_PORT"] == command.env["MASTER_PORT"]
    assert command.argv[-5:-1] == ("-u", "-m", "lmscale.pretrain", "--config")


def test_mpich_passes_on_a_list_and_nothing_else(tmp_path):
    hosts = hostfile(tmp_path, "a slots=2\nb slots=4\n")
    command = command_for(tmp_path, place("mpich", 2, hosts, CPU), overrides=())
    assert command.argv[0] == "mpiexec.hydra"
    assert after(command.argv, "-hosts") == "a:2,b:2"
    assert set(after(command.argv, "-genvlist").split(",")) == {*command.travels, "LMSCALE_STATUS_ADDRESS"}


def test_torchrun_runs_on_each_host_with_its_rank(tmp_path):
    command = command_for(tmp_path, place("torchrun", None, hostfile(tmp_path), CPU, master_port=4000))
    assert after(command.argv, "-m") == "lmscale.launcher.over_ssh"
    names, hosts, lines = command.argv[4].split(","), command.argv[5::2], command.argv[6::2]
    assert set(names) == {*command.travels, "LMSCALE_STATUS_ADDRESS"}
    assert command.travels.items() <= command.env.items()
    assert hosts == ("a", "b")
    for number, (line, slots) in enumerate(zip(lines, (2, 1), strict=True)):
        words = shlex.split(line)
        assert {f"--node-rank={number}", "--nnodes=2", f"--nproc-per-node={slots}"} <= set(words)
        assert {"--master-addr=a", "--master-port=4000"} <= set(words)
        assert words[words.index("--module") + 1] == "lmscale.pretrain"


def test_torchrun_on_each_host_by_itself(tmp_path):
    where = {"nnodes": "2", "node_rank": 1, "master_addr": "a", "max_restarts": 3}
    command = command_for(tmp_path, place("torchrun", 2, None, CPU, **where), overrides=())
    assert command.is_part
    assert {"--nnodes=2", "--node-rank=1", "--nproc-per-node=2", "--master-addr=a"} <= set(command.argv)
    assert [each.num_ranks for each in command.on_hosts] == [2]
    assert "LMSCALE_STATUS_DIR" in command.unset


@pytest.mark.parametrize("where", [{"nnodes": "2", "node_rank": 1}, {"nnodes": "1:2"}])
def test_torchrun_lets_ranks_save_for_longer_than_its_30_s_and_less_than_a_pod_has(tmp_path, where):
    name = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
    placement = place("torchrun", 2, None, CPU, master_addr="a", **where)
    manifest = yaml.safe_load((Path(__file__).parents[2] / "launch" / "kubernetes.yaml").read_text())
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert 30 < int(command_for(tmp_path, placement, overrides=()).env[name]) < pod["terminationGracePeriodSeconds"]
    assert name not in command_for(tmp_path, placement, {**ENVIRON, name: "500"}, overrides=()).env


@pytest.mark.parametrize(("where", "value"), [({"nnodes": "2", "node_rank": 1}, None), ({"nnodes": "1:2"}, "1")])
def test_an_elastic_torchrun_lets_hosts_join_it_later(tmp_path, where, value):
    placement = place("torchrun", 2, None, CPU, master_addr="a", **where)
    assert command_for(tmp_path, placement, overrides=()).env.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == value


def test_an_elastic_torchrun_takes_in_hosts_of_the_same_run_only(tmp_path):
    placement = place("torchrun", 2, None, CPU, nnodes="1:2", master_addr="a")

    def rendezvous(output_dir: str) -> str:
        command = command_for(tmp_path, placement, overrides=(f"output_dir={tmp_path}/{output_dir}",))
        return next(word for word in command.argv if word.startswith("--rdzv-id="))

    assert rendezvous("one") == rendezvous("one")
    assert rendezvous("one") != rendezvous("two")


def test_the_port_of_an_elastic_torchrun_is_checked_on_the_host_that_keeps_the_rendezvous(tmp_path):
    with socket.create_server(("", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--master-port = {port}: is in use on this host"):
            place("torchrun", 2, None, CPU, nnodes="1:2", master_addr="127.0.0.1", master_port=port)
        place("torchrun", 2, None, CPU, nnodes="1:2", master_addr="192.0.2.1", master_port=port)


def test_an_elastic_torchrun_meets_by_c10d(tmp_path):
    where = {"nnodes": "1:2", "master_addr": "a", "master_port": 4000, "max_restarts": 3}
    placement = place("torchrun", 2, None, CPU, **where)
    assert placement.num_ranks == 4
    command = command_for(tmp_path, placement, overrides=())
    meets = {"--rdzv-backend=c10d", "--rdzv-endpoint=a:4000", "--nnodes=1:2", "--max-restarts=3"}
    assert meets <= set(command.argv)
    assert not any(word.startswith("--node-rank") for word in command.argv)


def test_every_size_of_an_elastic_torchrun_must_give_the_layout(tmp_path):
    placement = place("torchrun", 1, None, CPU, nnodes="1:3", master_addr="a")
    with pytest.raises(ConfigError, match=r"--nnodes = '1:3': with 3 hosts of 1 ranks, batch.global_batch_size = 16"):
        check_sizes(make_run(tmp_path), placement)
    check_sizes(make_run(tmp_path, "batch.global_batch_size=12"), placement)


def test_slurm_names_the_hosts_of_the_allocation(tmp_path, monkeypatch):
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\ntest $3 = n[1-3] && printf 'n1\\nn2\\nn3\\n'\n")
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_TASKS_PER_NODE": "2(x2),4", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "5"}
    environ = {**ENVIRON, **job, "PATH": str(tmp_path / "bin")}
    command = command_for(tmp_path, place("slurm", None, None, environ), environ, overrides=())
    assert [(each.host, each.num_ranks) for each in command.on_hosts] == [("n1", 2), ("n2", 2), ("n3", 4)]
    assert set(command.unset) >= SECRETS  # --export=ALL hands on the rest
    assert "hush" not in f"{command.show()}{command.show_hosts()}"


def test_devices_are_ranks_of_each_host_under_slurm_too(tmp_path):
    environ = {**ENVIRON, "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "16"}
    command = command_for(tmp_path, place("slurm", 2, None, environ), environ, overrides=())
    assert command.argv[:3] == ("srun", "--ntasks=4", "--ntasks-per-node=2")
    assert [each.num_ranks for each in command.on_hosts] == [2]


@pytest.mark.parametrize(
    ("devices", "job", "part"),
    [
        (None, {}, "--launcher = 'slurm': starts ranks in a job of Slurm's; start it by sbatch"),
        (2, {}, "--launcher = 'slurm': starts ranks in a job of Slurm's; start it by sbatch"),
        (None, {"SLURM_JOB_NUM_NODES": "2"}, "--devices = None: is required in a job without a number of tasks"),
        (None, {"SLURM_NTASKS": "x"}, "SLURM_NTASKS = 'x': must be a number above 0"),
        (2, {"SLURM_NNODES": "0"}, "SLURM_NNODES = '0': must be a number above 0"),
    ],
)
def test_without_a_job_slurm_starts_nothing(devices, job, part):
    with pytest.raises(ConfigError) as caught:
        place("slurm", devices, None, {**CPU, **job})
    assert part in str(caught.value)


def test_a_host_is_not_given_more_ranks_than_it_has_slots(tmp_path):
    with pytest.raises(ConfigError, match=r"--devices = 2: b has 1 slot in the hostfile; use fewer"):
        place("pdsh", 2, hostfile(tmp_path), CPU)


@pytest.mark.parametrize(
    ("first", "is_alone", "expected"),
    [
        ("node-1", False, "node-1"),
        ("alias", False, "10.0.0.1"),
        ("me@node-1", False, "node-1"),
        ("localhost", True, "localhost"),
    ],
)
def test_the_ranks_meet_at_what_ssh_makes_of_the_first_host(first, is_alone, expected):
    assert rendezvous_address(first, is_alone) == expected


def test_a_loopback_name_becomes_this_hosts_own(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    assert rendezvous_address("127.0.0.1", is_alone=False) == "here"
    assert [is_loopback(name) for name in ("::1", "localhost", "127.1.2.3", "node", "10.0.0.1")] == [True] * 3 + [
        False
    ] * 2


def test_the_check_of_a_port_leaves_standard_input(tmp_path):
    (tmp_path / "bin" / "ssh").write_text("#!/bin/sh\nexec cat\n")
    with standard_input(b"the next command\n"):
        check_port("a", 29500)


@pytest.mark.parametrize("launcher", OVER_HOSTS)
def test_dry_run_prints_a_section_for_each_host(tmp_path, launcher, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hush")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    arguments = ["train", str(write_run(tmp_path)), "batch.global_batch_size=24", "--launcher", launcher]
    assert main([*arguments, "--hostfile", hostfile(tmp_path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for head in ("# on a, 2 ranks, with\n", "# on b, 1 rank, with\n"):
        section = re.split(r"^# (?! )", out.split(head)[1], flags=re.MULTILINE)[0]
        assert "#   NCCL_DEBUG=INFO\n" in section
        assert re.search(r"#   cd .*lmscale\.pretrain --config .*config\.resolved\.yaml", section)
    assert "hush" not in out
    assert not (tmp_path / "run").exists()


def test_what_looks_like_a_secret_in_the_users_file_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text("WANDB_API_KEY=hush\n")
    arguments = ["train", str(write_run(tmp_path)), "batch.global_batch_size=24", "--hostfile", hostfile(tmp_path)]
    assert main([*arguments, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert "not passed on to other hosts, though .deepspeed_env names it: WANDB_API_KEY" in err
    assert "hush" not in out + err


@pytest.mark.parametrize(
    ("launcher", "options", "part"),
    [
        ("torchrun", {"nnodes": "0"}, "--nnodes = '0': must be a number of hosts, or a range; as in 2:4"),
        ("torchrun", {"nnodes": "3:2"}, "--nnodes = '3:2'"),
        ("torchrun", {"nnodes": "two"}, "--nnodes = 'two'"),
        ("torchrun", {"nnodes": "2", "master_addr": "a"}, "--node-rank = None: must be between 0 and 1"),
        ("torchrun", {"nnodes": "2", "node_rank": 2, "master_addr": "a"}, "--node-rank = 2: must be between 0 and 1"),
        ("torchrun", {"nnodes": "1:2", "node_rank": 0, "master_addr": "a"}, "find their order by themselves"),
        ("torchrun", {"nnodes": "2", "node_rank": 0}, "--master-addr = None: is required with --nnodes"),
        ("torchrun", {"node_rank": 0}, "--node-rank = 0: is read with --nnodes only"),
        ("deepspeed", {"nnodes": "2"}, "--nnodes = '2': is torchrun's; add --launcher torchrun"),
        ("deepspeed", {"master_addr": "a"}, "--master-addr = 'a': is for several hosts"),
        ("deepspeed", {"master_port": 70000}, "--master-port = 70000: must be between 1 and 65535"),
    ],
)
def test_wrong_meetings_are_refused(launcher, options, part):
    with pytest.raises(ConfigError) as caught:
        place(launcher, 1, None, CPU, **options)
    assert part in str(caught.value)


def test_nnodes_and_a_hostfile_are_two_ways(tmp_path):
    with pytest.raises(ConfigError, match=r"--nnodes = '2': is for a start on each host by itself; drop one"):
        place("torchrun", None, hostfile(tmp_path), CPU, nnodes="2", node_rank=0)


def test_openmpi_refuses_root_before_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.delenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
    with pytest.raises(ConfigError, match=r"does not start as root.*set OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"):
        place("openmpi", None, hostfile(tmp_path), CPU)
