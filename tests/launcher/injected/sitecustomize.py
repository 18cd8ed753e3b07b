"""Faults for real ranks: with this directory on PYTHONPATH, a rank dies, gets stuck or strays in the middle of a step.

INJECTED_FAULT="KIND RANK STEP MARKER"; MARKER is a file that is made then, so that it happens once.
"""

import importlib.util
import os
import re
import signal
import sys
import time
from pathlib import Path


class Injector:
    """Wraps a step of the training loop when its module is imported."""

    def __init__(self, kind, rank, step, marker):
        self.kind, self.rank, self.step, self.marker = kind, rank, int(step), Path(marker)

    def find_spec(self, name, path=None, target=None):
        if name != "lmscale.train.loop" or os.environ.get("RANK") != self.rank:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            original = module._step
            module._step = lambda run, *more: self.inject(run) or original(run, *more)

        spec.loader.exec_module = exec_module
        return spec

    def inject(self, run):
        if run.progress.step + 1 != self.step or self.marker.exists():
            return
        if self.kind == "skip":
            agreed = run.requests.agreed

            def skipped():
                self.mark()
                run.requests.agreed = agreed
                return 0  # as Request.NONE

            run.requests.agreed = skipped
        else:
            run.engine.deepspeed.module.register_forward_pre_hook(lambda *_: self.act())

    def act(self):
        if self.marker.exists():
            return
        self.mark()
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.kind == "lock":
            re.match(r"(a+)+$", "a" * 60 + "b")  # tries 2^60 ways, and keeps Python's lock meanwhile
        elif self.kind == "crash":
            raise RuntimeError("injected")

    def mark(self):
        self.marker.write_text(str(time.time()))


if "INJECTED_FAULT" in os.environ:
    sys.meta_path.insert(0, Injector(*os.environ["INJECTED_FAULT"].split()))
