"""Ranks that tell their supervisor by a connection, as those of other hosts do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

from lmscale.launcher.link import Link, split_address
from lmscale.launcher.relay import Gone, Relay
from lmscale.launcher.status import (
    RUN_ID,
    STATUS_ADDRESS,
    STATUS_BY_FILE,
    STATUS_DIR,
    Report,
    read_registrations,
    read_reports,
)
from lmscale.launcher.supervise import Outcome, supervise
from tests.launcher.test_supervise import wait_until

HERE = Path(__file__).parent


@pytest.fixture
def relay(tmp_path):
    with Relay(tmp_path, uuid.uuid4().hex, 2) as found:
        yield found


def connect(relay: Relay, rank: int, run_id: str | None = None, lost=lambda reason: None) -> Link:
    return Link(f"127.0.0.1:{relay.port}", relay._run_id if run_id is None else run_id, rank, lost)


def leave(link: Link) -> None:
    link.close()
    link._socket.shutdown(2)


def test_what_a_rank_sends_lies_in_the_directory_as_if_it_had_written_it(tmp_path, relay):
    link = connect(relay, 1)
    assert link.send("pid", "17\nhost-2")
    assert link.send("status", "75\n")
    wait_until(lambda: read_reports(tmp_path) == {1: Report(75, "")})
    assert read_registrations(tmp_path)[1].host == "host-2"


def test_a_rank_that_goes_without_a_report_is_lost_and_one_with_a_report_is_not(tmp_path, relay):
    first, second = connect(relay, 0), connect(relay, 1)
    wait_until(lambda: relay.num_connected == 2)
    first.send("status", "0\n")
    for link in (first, second):
        leave(link)
    wait_until(lambda: relay.num_connected == 0)
    assert relay.lost() == {1: Gone(os.uname().nodename, is_silent=False)}


def test_a_rank_that_ends_well_while_reports_are_read_is_not_lost(tmp_path, relay, monkeypatch):
    ending, lost = connect(relay, 0), connect(relay, 1)
    wait_until(lambda: relay.num_connected == 2)
    leave(lost)
    wait_until(lambda: relay.num_connected == 1)

    def read_and_let_a_rank_end(directory: Path) -> dict[int, Report]:
        reports = read_reports(directory)
        if relay.num_connected:
            ending.send("status", "0\n")
            leave(ending)
            wait_until(lambda: relay.num_connected == 0)
        return reports

    monkeypatch.setattr("lmscale.launcher.relay.read_reports", read_and_let_a_rank_end)
    assert list(relay.lost()) == [1]
    assert list(relay.lost()) == [1]


def test_a_rank_that_is_dead_is_lost_though_a_process_that_it_forked_lives(relay):
    program = (
        "import os, sys, time\n"
        "from lmscale.launcher.link import Link\n"
        "Link(sys.argv[1], sys.argv[2], 0, print)\n"
        "time.sleep(0.5)\n"  # for the thread that reads to wait in it
        "forked = os.fork()\n"
        "if forked: print(forked, flush=True)\n"
        "time.sleep(60)\n"
    )
    argv = [sys.executable, "-c", program, f"127.0.0.1:{relay.port}", relay._run_id]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as rank:
        forked = int(rank.stdout.readline())
        try:
            rank.kill()
            wait_until(lambda: list(relay.lost()) == [0])
        finally:
            os.kill(forked, signal.SIGKILL)


@pytest.mark.parametrize(("rank", "run_id"), [(0, "another"), (2, None), (-1, None)])
def test_a_stranger_is_turned_away(tmp_path, relay, rank, run_id):
    turned_away = threading.Event()
    connect(relay, rank, run_id, lost=lambda reason: turned_away.set()).send("status", "0\n")
    assert turned_away.wait(30)
    assert not list(tmp_path.iterdir())
    assert not relay.lost()


def test_only_what_ranks_tell_is_written(tmp_path, relay):
    link = connect(relay, 0)
    link.send("../escaped", "x")
    link.send("status", "0\n")
    wait_until(lambda: bool(read_reports(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["rank-00000.status"]


def test_a_rank_hears_of_the_end_of_its_supervisor(relay):
    lost = threading.Event()
    connect(relay, 0, lost=lambda reason: lost.set())
    wait_until(lambda: relay.num_connected == 1)
    relay.__exit__()
    assert lost.wait(30)


def test_an_address_may_be_of_either_kind():
    assert split_address("10.0.0.1:80") == ("10.0.0.1", 80)
    assert split_address("fe80::1:80") == ("fe80::1", 80)


class FarLaunch:
    """A supervised launch of stand-ins that know no directory, only an address."""

    def __init__(self, tmp_path: Path, behaviour: str):
        self.logs, self.status_dir, self.run_id = tmp_path / "logs", tmp_path / "status", uuid.uuid4().hex
        self.logs.mkdir()
        self.status_dir.mkdir()
        self.argv = [sys.executable, str(HERE / "fake_launcher.py"), "2", str(HERE / "stand_in.py")]
        self.argv += [behaviour, str(self.logs)]

    def run(self, when=lambda: None, **options) -> Outcome:
        with Relay(self.status_dir, self.run_id, 2) as relay:
            address = f"{STATUS_ADDRESS}=127.0.0.1:{relay.port}"
            argv = ["env", "-u", STATUS_DIR, address, f"{STATUS_BY_FILE}=1", *self.argv]
            thread = threading.Thread(target=when)
            thread.start()
            environ = {**os.environ, RUN_ID: self.run_id}
            outcome = supervise(argv, environ, self.status_dir, 2, is_local=False, relay=relay, **options)
            thread.join()
        return outcome

    def log(self, number: int) -> str:
        path = self.logs / f"rank-{number}.log"
        return path.read_text() if path.exists() else ""


def test_a_signal_reaches_ranks_by_the_connection_and_makes_status_75(tmp_path):
    launch = FarLaunch(tmp_path, "work")

    def act() -> None:
        wait_until(lambda: "up" in launch.log(0) and "up" in launch.log(1))
        os.kill(os.getpid(), signal.SIGTERM)

    assert launch.run(act) == Outcome(75)
    assert launch.log(1) == "up\nstopped by SIGTERM\nsaved\n"


def test_errors_and_the_rank_that_died_are_told_as_on_one_host(tmp_path):
    assert FarLaunch(tmp_path, "bad-config").run() == Outcome(2, "optim.lr = 3: is wrong")
    (tmp_path / "second").mkdir()
    outcome = FarLaunch(tmp_path / "second", "killed-and-lost").run()
    host = os.uname().nodename
    assert outcome == Outcome(1, f"died without a word, killed or crashed: rank 1 of 2, on {host}", lost=(1,))


def test_a_host_whose_ranks_do_not_come_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("lmscale.launcher.supervise.sweep", lambda hosts, run_id: None)  # they are no hosts
    outcome = FarLaunch(tmp_path, "unborn").run(rank_hosts=["node-1", "node-2"], start_s=1.0)
    line = "hang: rank 1 of 2 on node-2 has not started, 1 s after the first was there"
    assert outcome == Outcome(76, line, lost=(1,))


def test_a_rank_that_cannot_reach_its_supervisor_says_so_and_ends(tmp_path):
    environ = {**os.environ, RUN_ID: "a", STATUS_ADDRESS: "127.0.0.1:9", "RANK": "0"}
    argv = [sys.executable, str(HERE / "stand_in.py"), "done", str(tmp_path)]
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "error: cannot reach lmscale train at 127.0.0.1:9: " in done.stderr


def test_a_rank_whose_supervisor_is_gone_ends_itself(tmp_path):
    with Relay(tmp_path, "a", 1) as relay:
        environ = {**os.environ, RUN_ID: "a", STATUS_ADDRESS: f"127.0.0.1:{relay.port}", "RANK": "0"}
        argv = [sys.executable, str(HERE / "stand_in.py"), "deaf", str(tmp_path)]
        process = subprocess.Popen(argv, env=environ, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: relay.num_connected == 1)
        time.sleep(0.2)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "has lost lmscale train at 127.0.0.1:" in err
