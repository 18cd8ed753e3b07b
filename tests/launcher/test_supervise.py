"""The supervisor over real processes: signals reach the ranks, their status comes back, nothing is left."""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

from lmscale.launcher import supervise as supervision
from lmscale.launcher.environment import free_port
from lmscale.launcher.processes import marked, ranks_of
from lmscale.launcher.status import RUN_ID, Report, read_registrations
from lmscale.launcher.supervise import Outcome, outcome_of, supervise

HERE = Path(__file__).parent
DEADLINE_S = 60.0
SECONDS_TO_END = 15.0
"""From the death of a rank to the end of all: 4 s of grace, the launcher's own polling, and room for a busy machine."""


class Launch:
    """A supervised launch of stand-ins; `when` runs in a thread once the ranks are as far as it wants."""

    def __init__(self, tmp_path: Path, behaviour: str, num_ranks: int = 2):
        self.logs, self.status_dir = tmp_path / "logs", tmp_path / "status"
        self.logs.mkdir()
        self.status_dir.mkdir()
        self.run_id, self.num_ranks = uuid.uuid4().hex, num_ranks
        self.script = [str(HERE / "stand_in.py"), behaviour, str(self.logs)]

    def run(self, when=None, grace_s: float = 5.0, launcher: str = "fake_launcher.py", **options) -> Outcome:
        thread = threading.Thread(target=when or (lambda: None))
        thread.start()
        argv = [sys.executable, str(HERE / launcher), str(self.num_ranks), *self.script]
        try:
            environ = {**os.environ, RUN_ID: self.run_id}
            return supervise(argv, environ, self.status_dir, self.num_ranks, logs=self.logs, grace_s=grace_s, **options)
        finally:
            thread.join()
            assert marked(self.run_id) == {}

    def wait_for(self, text: str) -> None:
        wait_until(lambda: all(text in self.log(number) for number in range(self.num_ranks)))

    def log(self, number: int) -> str:
        path = self.logs / f"rank-{number}.log"
        return path.read_text() if path.exists() else ""

    def signal_when(self, text: str, number: int):
        def act() -> None:
            self.wait_for(text)
            os.kill(os.getpid(), number)

        return act

    def launcher_pid(self) -> int:
        return next(pid for pid, is_rank in marked(self.run_id).items() if not is_rank)


def wait_until(condition) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_finished_ranks_make_status_0(tmp_path):
    assert Launch(tmp_path, "done").run() == Outcome(0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_every_rank_save_and_makes_status_75(tmp_path, number):
    launch = Launch(tmp_path, "work", num_ranks=3)
    assert launch.run(launch.signal_when("up", number)) == Outcome(75)
    for rank in range(3):
        assert launch.log(rank) == f"up\nstopped by {number.name}\nsaved\n"


def test_a_hangup_saves_like_a_term(tmp_path):
    launch = Launch(tmp_path, "work")
    assert launch.run(launch.signal_when("up", signal.SIGHUP)).status == 75
    assert "stopped by SIGTERM" in launch.log(1)


def test_usr1_saves_and_goes_on(tmp_path):
    launch = Launch(tmp_path, "work")

    def act():
        launch.signal_when("up", signal.SIGUSR1)()
        launch.signal_when("saved", signal.SIGTERM)()

    assert launch.run(act).status == 75
    assert launch.log(0) == "up\nsaved\nstopped by SIGTERM\nsaved\n"


def test_a_signal_before_the_ranks_are_up_waits_for_them(tmp_path):
    launch = Launch(tmp_path, "late")

    def act():
        wait_until(lambda: len(ranks_of(launch.run_id)) == 2)
        os.kill(os.getpid(), signal.SIGTERM)

    assert launch.run(act).status == 75
    assert launch.log(1) == "up\nstopped by SIGTERM\nsaved\n"


def test_a_launch_that_does_not_come_up_ends_when_it_is_asked_to(tmp_path, monkeypatch):
    monkeypatch.setattr(supervision, "_START_GRACE_S", 1.0)
    launch = Launch(tmp_path, "one-missing")

    def act():
        wait_until(lambda: "up" in launch.log(0))
        os.kill(os.getpid(), signal.SIGTERM)

    assert launch.run(act) == Outcome(75, "stopped before every rank was up")


def test_a_second_interrupt_kills(tmp_path):
    launch = Launch(tmp_path, "deaf")

    def act():
        launch.signal_when("up", signal.SIGINT)()
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    outcome = launch.run(act)
    assert outcome.status == 1
    assert "interrupted twice" in outcome.error


def test_bad_input_found_by_the_ranks_makes_status_2_and_one_line(tmp_path, capfd):
    assert Launch(tmp_path, "bad-config").run() == Outcome(2, "optim.lr = 3: is wrong")
    assert capfd.readouterr().err == ""


def test_a_crash_makes_status_1_names_the_rank_and_keeps_the_traceback(tmp_path, capfd):
    outcome = Launch(tmp_path, "crash").run()
    assert outcome == Outcome(1, "rank 1 failed: RuntimeError: rank 1 is broken")
    assert "Traceback" in capfd.readouterr().err


def test_a_killed_rank_makes_status_1(tmp_path):
    outcome = Launch(tmp_path, "killed").run()
    assert outcome.status == 1
    assert "rank 1 of 2" in outcome.error


def test_a_killed_rank_is_named_and_not_the_crash_of_those_that_lost_it(tmp_path):
    outcome = Launch(tmp_path, "killed-and-lost").run()
    assert outcome == Outcome(1, "died without a word, killed or crashed: rank 1 of 2", lost=(1,))


def test_ranks_that_wait_for_a_killed_one_are_ended_within_seconds(tmp_path):
    launch, killed_at = Launch(tmp_path, "deaf", num_ranks=3), []

    def act():
        launch.wait_for("up")
        os.kill(read_registrations(launch.status_dir)[2].pid, signal.SIGKILL)
        killed_at.append(time.monotonic())

    outcome = launch.run(act, grace_s=60.0)
    assert (outcome.status, outcome.lost) == (1, (2,))
    assert time.monotonic() - killed_at[0] < SECONDS_TO_END


def test_a_term_before_ranks_on_other_hosts_are_up_leaves_the_stop_file_with_the_launchs_id(tmp_path):
    launch, stop_file = Launch(tmp_path, "late"), tmp_path / "STOP"

    def act():
        wait_until(lambda: len(ranks_of(launch.run_id)) == 2)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(stop_file.exists)
        launch.signal_when("up", signal.SIGTERM)()  # these stand-ins do not look at it

    launch.run(act, is_local=False, stop_file=stop_file)
    assert stop_file.read_text() == launch.run_id


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_under_slurm_a_signal_lets_every_rank_save_though_srun_does_not_pass_it_on(tmp_path, number):
    launch = Launch(tmp_path, "work")
    options = {"launcher": "fake_srun.py", "is_local": False, "launcher_passes_usr1": True}
    outcome = launch.run(launch.signal_when("up", number), **options)
    assert outcome == Outcome(75)
    assert [launch.log(rank) for rank in range(2)] == [f"up\nstopped by {number.name}\nsaved\n"] * 2


def test_under_slurm_signals_reach_ranks_that_are_all_on_other_hosts(tmp_path, monkeypatch):
    launch, stop_file = Launch(tmp_path, "work"), tmp_path / "STOP"

    def act():
        launch.wait_for("up")
        monkeypatch.setattr("socket.gethostname", lambda: "login-node")
        os.kill(os.getpid(), signal.SIGUSR1)
        launch.wait_for("saved")
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(stop_file.exists)
        for entry in read_registrations(launch.status_dir).values():
            os.kill(entry.pid, signal.SIGTERM)  # these stand-ins do not look at it

    options = {"launcher": "fake_srun.py", "is_local": False, "launcher_passes_usr1": True, "stop_file": stop_file}
    assert launch.run(act, **options) == Outcome(75)
    assert stop_file.read_text() == launch.run_id


def test_survivors_of_a_killed_rank_are_ended_without_the_launcher(tmp_path):
    launch = Launch(tmp_path, "deaf")

    def act():
        launch.wait_for("up")
        os.kill(launch.launcher_pid(), signal.SIGKILL)
        os.kill(ranks_of(launch.run_id)[0], signal.SIGKILL)

    assert launch.run(act, grace_s=0.5).status == 1


def test_ranks_outlive_a_killed_launcher_and_keep_their_status(tmp_path):
    launch = Launch(tmp_path, "work")

    def act():
        launch.wait_for("up")
        os.kill(launch.launcher_pid(), signal.SIGKILL)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    assert launch.run(act) == Outcome(75)


def test_a_launcher_that_starts_no_rank_makes_status_1(tmp_path):
    argv = [sys.executable, "-c", "raise SystemExit(3)"]
    outcome = supervise(argv, {**os.environ, RUN_ID: "none"}, tmp_path, 2)
    assert outcome == Outcome(1, "every rank crashed or was killed without a word; the launcher returned 3, see above")


def test_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    Launch(tmp_path, "done", num_ranks=1).run()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("statuses", "num_ranks", "expected"),
    [
        ([0, 0], 2, 0),
        ([75, 75], 2, 75),
        ([75, 1], 2, 1),
        ([2, 1], 2, 2),
        ([2], 2, 2),
        ([75], 2, 1),
        ([76], 2, 76),
        ([1, 76], 2, 1),
        ([0, 77], 2, 77),
        ([3, 0], 2, 1),
        ([], 2, 1),
    ],
)
def test_outcome_of_reports(statuses, num_ranks, expected):
    reports = {number: Report(status, "") for number, status in enumerate(statuses)}
    assert outcome_of(reports, num_ranks, launcher_status=0).status == expected


def test_what_a_rank_says_on_purpose_is_told_and_not_the_crash_of_those_that_lost_it():
    lost = "rank 0 failed: RuntimeError: Connection closed by peer"
    for status in (1, 2):
        reports = {0: Report(1, lost), 1: Report(status, "output_dir: the disk is full"), 2: Report(1, lost)}
        assert outcome_of(reports, 3, launcher_status=1) == Outcome(status, "output_dir: the disk is full")
    assert outcome_of({0: Report(1, lost), 1: Report(0, "")}, 2, launcher_status=1) == Outcome(1, lost)
    hang = Report(76, "no progress")
    assert outcome_of({0: Report(1, lost), 1: hang}, 2, launcher_status=1) == Outcome(76, "no progress")


@pytest.mark.parametrize(("launcher_status", "expected"), [(0, 0), (75, 75), (76, 76), (1, 1)])
def test_ranks_that_cannot_report_from_other_hosts_are_judged_by_the_launcher(launcher_status, expected):
    assert outcome_of({}, 4, launcher_status, is_local=False).status == expected


@pytest.mark.distributed
def test_under_the_real_launcher_a_term_saves_on_every_rank(tmp_path, monkeypatch):
    """DeepSpeed's own launcher would leave the ranks running, and return 0 or 1."""
    launch = Launch(tmp_path, "work")
    deepspeed = [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_accelerators",
        "2",
        "--master_port",
        str(free_port()),
    ]
    environ = {**os.environ, RUN_ID: launch.run_id, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    thread = threading.Thread(target=launch.signal_when("up", signal.SIGTERM))
    thread.start()
    outcome = supervise([*deepspeed, *launch.script], environ, launch.status_dir, 2)
    thread.join()
    assert outcome == Outcome(75)
    assert marked(launch.run_id) == {}
    assert launch.log(1) == "up\nstopped by SIGTERM\nsaved\n"


def test_without_a_supervisor_a_rank_ends_with_its_own_status_and_one_line(tmp_path):
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LMSCALE_")}
    argv = [sys.executable, str(HERE / "stand_in.py"), "bad-config", str(tmp_path)]
    result = subprocess.run(argv, env=environ, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (2, "error: optim.lr = 3: is wrong\n")
