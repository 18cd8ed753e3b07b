"""Ranks, devices, threads, and what travels."""

import pytest

from lmscale.launcher.environment import adopt_rank, free_port, is_secret, threads_for, travelling, visible_devices


@pytest.mark.parametrize(
    "environ",
    [
        {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"},
        {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"},
        {"PMI_RANK": "3", "MPI_LOCALRANKID": "1", "PMI_SIZE": "4"},
    ],
)
def test_ranks_of_srun_and_mpirun_are_adopted(environ):
    adopt_rank(environ)
    assert (environ["RANK"], environ["LOCAL_RANK"], environ["WORLD_SIZE"]) == ("3", "1", "4")


def test_ranks_that_are_given_stay():
    environ = {"RANK": "0", "SLURM_PROCID": "3"}
    adopt_rank(environ)
    assert environ["RANK"] == "0"


def test_a_process_that_no_launcher_started_is_the_only_rank():
    environ = {"HOME": "/"}
    adopt_rank(environ)
    assert (environ["RANK"], environ["LOCAL_RANK"], environ["WORLD_SIZE"]) == ("0", "0", "1")
    assert environ["MASTER_ADDR"] == "127.0.0.1"
    assert int(environ["MASTER_PORT"]) >= 1024


def test_secrets_do_not_travel():
    environ = {
        "NCCL_DEBUG": "INFO",
        "LMSCALE_API_KEY": "s",
        "HF_TOKEN": "s",
        "TOKENIZERS_PARALLELISM": "false",
        "HOME": "/",
    }
    assert travelling(environ) == {"NCCL_DEBUG": "INFO", "TOKENIZERS_PARALLELISM": "false"}


@pytest.mark.parametrize(
    "name",
    ["PGPASSFILE", "OPENAI_KEY", "SIGNING_KEY", "GH_PAT", "MYSQL_PASS", "REGISTRY_AUTH", "WANDB_API_KEY", "ssh_keys"],
)
def test_names_of_secrets_are_told(name):
    assert is_secret(name)


@pytest.mark.parametrize(
    "name", ["NCCL_PAT_ENABLE", "NCCL_P2P_BYPASS", "TOKENIZERS_PARALLELISM", "PATH", "KEYBOARD", "AUTHOR"]
)
def test_names_that_resemble_those_of_secrets_are_none(name):
    assert not is_secret(name)


@pytest.mark.parametrize(
    ("environ", "nodes", "devices"),
    [
        ({}, [], None),
        ({}, ["nvidia0", "nvidia1", "nvidiactl"], ["0", "1"]),
        ({}, ["nvidia3"], ["0"]),
        ({"CUDA_VISIBLE_DEVICES": "1,3"}, ["nvidia0", "nvidia1", "nvidia2", "nvidia3"], ["1", "3"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, ["nvidia0"], None),
        ({"DS_ACCELERATOR": "cpu"}, ["nvidia0"], None),
    ],
)
def test_devices_are_counted_without_torch(tmp_path, environ, nodes, devices):
    for name in nodes:
        (tmp_path / name).touch()
    assert visible_devices(environ, tmp_path) == devices


def test_threads_are_an_even_share_of_the_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert [threads_for(ranks) for ranks in (1, 3, 8, 20)] == [8, 2, 1, 1]


def test_ports_are_free_ones():
    assert 1024 <= free_port() <= 65535
