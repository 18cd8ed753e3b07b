"""A rank without torch: `stand_in.py BEHAVIOUR DIRECTORY`. It writes what happens to it to DIRECTORY/rank-N.log."""

import os
import re
import signal
import sys
import time
from pathlib import Path

from lmscale.errors import ConfigError
from lmscale.launcher.environment import adopt_rank
from lmscale.launcher.status import end_hung, rank, register, run_rank, tell
from lmscale.log import log_file
from lmscale.train import watchdog
from lmscale.train.pulse import Phase, Pulse
from lmscale.train.watchdog import Watchdog

BEHAVIOUR, DIRECTORY = sys.argv[-2], Path(sys.argv[-1])
RECEIVED: list[int] = []
HANG_TIMEOUT_S = 1.5
STUCK_AT = 5


def say(text: str) -> None:
    with (DIRECTORY / f"rank-{rank()}.log").open("a") as file:
        file.write(text + "\n")


def listen() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda received, _: RECEIVED.append(received))


def work() -> int:
    """Do steps until a signal says to save: 75 after TERM or INT, on after USR1."""
    for _ in range(1000):
        if signal.SIGUSR1 in RECEIVED:
            say("saved")
            RECEIVED.remove(signal.SIGUSR1)
        if RECEIVED:
            say(f"stopped by {signal.Signals(RECEIVED[0]).name}")
            time.sleep(0.3 * rank())  # ranks never end at the same time
            say("saved")
            return 75
        time.sleep(0.02)
    return 0


def get_stuck() -> None:
    """Stop being of use, in one of the ways that a rank can."""
    time.sleep(0.5)  # for its watchdog to tell where it is
    if BEHAVIOUR == "hang-stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif BEHAVIOUR == "hang-lock-held":
        re.match(r"(a+)+$", "a" * 60 + "b")  # tries 2^60 ways, and keeps Python's lock meanwhile
    elif BEHAVIOUR == "hang-lock-free":
        time.sleep(1000)


def hang() -> int:
    """Do steps that wait for all ranks under a watchdog, until rank 1 gets stuck."""
    num_ranks, pulse = int(os.environ.get("WORLD_SIZE", "1")), Pulse()
    slow_s = 8.0  # ranks do not start at the same time
    if BEHAVIOUR == "hang-lock-held" and num_ranks == 1:
        watchdog._LAST_RESORT_S, slow_s = 1.0, 3.0
    with Watchdog(pulse, HANG_TIMEOUT_S, slow_s, log_file(rank(), DIRECTORY), tell, end_hung):
        register()
        for step in range(1, 1000):
            pulse.enter(Phase.DATA, step)
            if step == STUCK_AT and rank() == num_ranks - 1:
                get_stuck()
            pulse.enter(Phase.TRAIN)
            (DIRECTORY / f"step-{rank()}").write_text(str(step))
            while not all(step_of(other) >= step for other in range(num_ranks)):
                time.sleep(0.01)
    return 0


def step_of(number: int) -> int:
    path = DIRECTORY / f"step-{number}"
    return int(path.read_text() or 0) if path.exists() else 0


def body() -> int:
    if BEHAVIOUR.startswith("hang"):
        return hang()
    if BEHAVIOUR == "done":
        register()
        return 0
    if BEHAVIOUR == "bad-config":
        register()
        raise ConfigError("is wrong", field="optim.lr", value=3)
    if BEHAVIOUR == "crash" and rank() == 1:
        register()
        raise RuntimeError("rank 1 is broken")
    if BEHAVIOUR == "deaf":
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        register()
        say("up")
        time.sleep(60)
    if BEHAVIOUR == "one-missing" and rank() == 1:
        time.sleep(1000)
    if BEHAVIOUR == "late":
        time.sleep(1.0)  # as imports take
    listen()
    register()
    say("up")
    if BEHAVIOUR in ("killed", "killed-and-lost") and rank() == 1:
        while not (DIRECTORY / "rank-0.log").exists():  # before it listens, the launcher's TERM would silence it too
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)
    if BEHAVIOUR == "killed-and-lost":
        time.sleep(0.3)
        raise RuntimeError("Connection closed by peer")
    return work()


adopt_rank()
if BEHAVIOUR == "unborn" and rank() == 1:
    time.sleep(1000)
sys.exit(run_rank(body))
