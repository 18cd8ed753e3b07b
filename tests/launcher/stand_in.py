"""A rank without torch: `stand_in.py BEHAVIOUR DIRECTORY`. It writes what happens to it to DIRECTORY/rank-N.log."""

import os
import signal
import sys
import time
from pathlib import Path

from lmscale.errors import ConfigError
from lmscale.launcher.status import rank, register, run_rank

BEHAVIOUR, DIRECTORY = sys.argv[-2], Path(sys.argv[-1])
RECEIVED: list[int] = []


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


def body() -> int:
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
    if BEHAVIOUR == "late":
        time.sleep(1.0)  # as imports take
    listen()
    register()
    say("up")
    if BEHAVIOUR == "killed" and rank() == 1:
        while not (DIRECTORY / "rank-0.log").exists():  # before it listens, the launcher's TERM would silence it too
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)
    return work()


sys.exit(run_rank(body))
