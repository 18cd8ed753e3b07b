"""What is left of a run's devices, and how many of them it can use."""

import contextlib
import os
import socket

import pytest

from lmscale.launcher import elastic
from lmscale.launcher.compose import Placement, compose
from lmscale.launcher.elastic import largest_legal, shrink
from lmscale.launcher.hosts import Host, read_hostfile
from lmscale.launcher.validate import LaunchPlan, validate_run
from tests.launcher.runs import make_run


@pytest.mark.parametrize(
    ("overrides", "most", "expected"),
    [
        ((), 7, 4),  # batch 16 in micro batches of 2: dp 8, 4, 2, 1
        (("parallel.tp_size=2",), 7, 4),
        (("parallel.tp_size=2", "parallel.pp_size=2"), 7, 4),
        (("parallel.tp_size=4",), 3, None),
        (("batch.global_batch_size=12",), 5, 3),
    ],
)
def test_the_largest_count_that_divides_the_layout_and_the_batch(tmp_path, overrides, most, expected):
    assert largest_legal(make_run(tmp_path, *overrides), most) == expected


def test_ranks_that_were_lost_are_left_out_with_their_devices(tmp_path):
    config = make_run(tmp_path)
    placement = Placement(num_ranks=4, cuda_devices=("0", "1", "2", "3"))
    smaller = shrink(config, placement, (1,))
    assert (smaller.num_ranks, smaller.cuda_devices) == (2, ("0", "2", "3"))
    plan = validate_run(config, 2)
    command = compose(plan, smaller, tmp_path / "config.yaml", {})
    assert command.argv[command.argv.index("--include") + 1] == "localhost:0,2"


def test_nothing_lost_changes_nothing(tmp_path):
    placement = Placement(num_ranks=4)
    assert shrink(make_run(tmp_path), placement, ()) is placement


def test_fewer_than_the_least_is_too_little(tmp_path):
    assert shrink(make_run(tmp_path), Placement(num_ranks=4), (0,), min_devices=3) is None


def test_hosts_that_do_not_answer_are_dropped(tmp_path):
    config = make_run(tmp_path, "parallel.tp_size=2")
    (tmp_path / "run").mkdir()
    hosts = tuple(Host(f"host-{number}", 2) for number in range(4))
    placement = Placement("pdsh", "hosts", hosts, None, 8)
    assert shrink(config, placement, (5,), is_up=lambda _: True) is placement
    smaller = shrink(config, placement, (), is_up=lambda name: name != "host-1")
    assert smaller.num_ranks == 4  # of 6: dp 3 does not divide the batch
    assert smaller.hosts == (Host("host-0", 2), Host("host-2", 2))
    assert read_hostfile(smaller.hostfile) == list(smaller.hosts)
    plan: LaunchPlan = validate_run(config, 4)
    assert smaller.hostfile in compose(plan, smaller, tmp_path / "config.yaml", {}).argv


def test_a_host_may_give_a_part_of_its_slots(tmp_path):
    config = make_run(tmp_path)
    (tmp_path / "run").mkdir()
    placement = Placement("pdsh", "hosts", (Host("a", 3), Host("b", 3), Host("c", 2)), None, 8)
    smaller = shrink(config, placement, (), is_up=lambda name: name != "c")
    assert smaller.hosts == (Host("a", 3), Host("b", 1))


def test_too_few_hosts_are_too_little(tmp_path):
    placement = Placement("pdsh", "hosts", (Host("a", 1), Host("b", 1)), None, 2)
    assert shrink(make_run(tmp_path), placement, (), min_devices=2, is_up=lambda name: name == "a") is None


def put_settings_of_ssh(directory, monkeypatch, settings):
    """Let `ssh -G` say where a host is."""
    program = directory / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n" + "".join(f"echo {line}\n" for line in settings))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


@pytest.mark.parametrize("jump", [None, "proxyjump gate", "proxycommand nc"])
def test_ssh_is_not_asked_of_a_host_whose_port_is_silent(tmp_path, monkeypatch, jump):
    monkeypatch.setattr(elastic, "_CONNECT_S", 0.3)
    asked = []
    monkeypatch.setattr(elastic, "answers", lambda host: asked.append(host) or True)
    with contextlib.ExitStack() as held:
        listener = held.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        port = listener.getsockname()[1]
        put_settings_of_ssh(tmp_path, monkeypatch, ["hostname 127.0.0.1", f"port {port}", *([jump] if jump else [])])
        assert elastic._is_up("host")
        with contextlib.suppress(TimeoutError):  # until the kernel takes no more: then it is as silent as a dead host's
            while True:
                held.enter_context(socket.create_connection(("127.0.0.1", port), 0.3))
        assert elastic._is_up("host") == (jump is not None)
    assert asked == ["host"] * (1 if jump is None else 2)


def test_what_is_not_silence_is_for_ssh_to_judge(tmp_path, monkeypatch):
    put_settings_of_ssh(tmp_path, monkeypatch, ["hostname no-such-host.invalid", "port 22"])
    monkeypatch.setattr(elastic, "answers", lambda host: True)
    assert elastic._is_up("host")
