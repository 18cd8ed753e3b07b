"""The faults of tools/drill.py: each with what is promised, and what is done to see it kept."""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
site_module: Any = importlib.import_module("drill_site")
Broken, NotHere = site_module.Broken, site_module.NotHere

Keys = dict[str, Any]
STEP = 4
"""Of the save, or the update, that is broken."""
WHOLE = "the checkpoint before stays whole and `latest` on it; the next start ends as if nothing had happened"
PASSED_OVER = "every rank refuses it by name, and resume: auto takes the newest good one"
GOES_ON = "the run says so and goes on; the checkpoint before is as it was; the last save succeeds"


@dataclass(frozen=True)
class Drill:
    """A fault, the promise, and a function that breaks a run of a site and says what happened; it raises if not kept."""

    name: str
    promise: str
    run: Callable[[Any], str]


def drills(site: Any) -> list[Drill]:
    """List all drills; the points at which a save writes are counted in a run of the site."""
    return [*write_points(site), *damages(), *steps(), *numbers(), *requests(), *disks()]


# --- kill -9 at every point at which a save writes ---------------------------------------------------------------------


def write_points(site: Any) -> list[Drill]:
    """List a kill -9 of each rank at each of its points."""
    points = site.train(site.fresh(), count_points)
    found = []
    for mode, asynchronous in (("", False), (", written behind the loop", True)):
        for rank, names in enumerate(points):
            for number, name in enumerate(names):
                if asynchronous and number % 4:
                    continue
                found.append(
                    Drill(
                        f"kill -9 of rank {rank} at write point {number + 1}/{len(names)} of a save{mode}: {name}",
                        WHOLE,
                        _KillAtPoint(rank, number, asynchronous),
                    )
                )
    return found


@dataclass(frozen=True)
class _KillAtPoint:
    rank: int
    number: int
    asynchronous: bool

    def __call__(self, site: Any) -> str:
        keys = site.fresh(checkpoint__asynchronous=self.asynchronous)
        reason = site.breaks(keys, die_at_point, self.rank, self.number)
        # Once the directory has its name, the new checkpoint is the one to go on from, if `latest` names it.
        latest = (site_module.checkpoints(keys) / "latest").read_text().strip()
        return f"{reason}; {site.recovers(keys, int(latest[-8:]))}"


def _watch_points(see: Callable[[str], None]) -> None:
    """Call a function at each point at which this process opens, makes, renames or removes a file of the save of STEP.

    Python reports these before they happen; the hook stays until the process ends.
    """
    partial, is_on = f".step-{STEP:08d}.partial", False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal is_on
        if event not in ("open", "os.mkdir", "os.rename", "os.remove", "shutil.rmtree", "shutil.copytree"):
            return
        paths = [str(argument) for argument in arguments[:2] if isinstance(argument, str | os.PathLike)]
        is_on = is_on or any(f"step-{STEP:08d}" in path for path in paths)
        if is_on and any("/checkpoints" in path for path in paths) and f"step-{STEP + 2:08d}" not in "".join(paths):
            shown = " -> ".join(
                path.rpartition("/checkpoints")[2].lstrip("/") or "checkpoints" for path in paths if "/" in path
            )
            see(f"{event.removeprefix('os.')} {shown.replace(f'{partial}/', '').replace(str(os.getpid()), 'PID')}")

    sys.addaudithook(hook)


def count_points(keys: Keys) -> list[str]:
    """Train on this rank to the save of STEP, and name the points at which it writes."""
    found: list[str] = []
    _watch_points(found.append)
    keys["train"]["stop_at_step"] = STEP
    site_module.pretrain_in_rank(keys)
    return found


def die_at_point(keys: Keys, rank: int, number: int) -> int:
    """Train on this rank, and die at one of the points."""
    if _rank() == rank:
        left = number

        def see(_: str) -> None:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

        _watch_points(see)
    return int(site_module.pretrain_in_rank(keys))


# --- files that are not as they were written ---------------------------------------------------------------------------


def damages() -> list[Drill]:
    """List harm to the files of the newest checkpoint, between two starts."""
    newest = f"step-{STEP:08d}"

    def of_file(name: str, what: str, harm: Callable[[Path], None]) -> Drill:
        return Drill(f"{what}: {name}", PASSED_OVER, _Damage(lambda home: harm(home / newest / name)))

    files = ("rank-00000.safetensors", "rank-00001.safetensors", "rank-00000.json", "config.yaml", "manifest.json")
    found = [of_file(name, "a flipped bit", flip) for name in files]
    found += [of_file(name, "truncated", lambda path: os.truncate(path, path.stat().st_size // 2)) for name in files]
    found += [of_file(name, "missing", Path.unlink) for name in files]
    found += [
        Drill("a file of another checkpoint: rank-00001.safetensors", PASSED_OVER, _Damage(_exchange)),
        Drill(
            "`latest` names what is not there", PASSED_OVER, _Damage(lambda home: _point(home, "step-00000099"), STEP)
        ),
        Drill("`latest` is empty", PASSED_OVER, _Damage(lambda home: (home / "latest").write_text(""), STEP)),
        Drill("`latest` is missing", PASSED_OVER, _Damage(lambda home: (home / "latest").unlink(), STEP)),
        Drill("all checkpoints damaged", "an error on every rank, and no start from scratch", _all_damaged),
        Drill("a checkpoint that is asked for is missing", "an error, never a start from scratch", _asked_for),
    ]
    return found


@dataclass(frozen=True)
class _Damage:
    harm: Callable[[Path], Any]
    resumes_from: int = 2

    def __call__(self, site: Any) -> str:
        keys = site.fresh(train__stop_at_step=STEP)
        site.train(keys)
        home = site_module.checkpoints(keys)
        self.harm(home)
        del keys["train"]["stop_at_step"]
        # What was damaged is passed over, and replaced when the run comes to its step.
        site.train(keys)
        step = site_module.resumed_step(keys)
        if step != self.resumes_from:
            raise Broken(f"resumed from step {step}, not {self.resumes_from}")
        for path in home.glob("step-*"):
            site_module.verify(path)
        if site_module.losses(keys) != site.reference:
            raise Broken("losses differ from those of the run that nothing happened to")
        if site_module.tensors(keys) != site_module.tensors(site.keys(site.directory / "whole")):
            raise Broken("weights or moments differ from those of the run that nothing happened to")
        shutil.rmtree(keys["output_dir"])
        return f"resumed from step {step}; the end is that of the whole run, bit for bit"


def flip(path: Path) -> None:
    """Flip a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _exchange(home: Path) -> None:
    shutil.copy(home / "step-00000002/rank-00001.safetensors", home / f"step-{STEP:08d}/rank-00001.safetensors")


def _point(home: Path, name: str) -> None:
    (home / "latest").write_text(f"{name}\n")


def _all_damaged(site: Any) -> str:
    keys = site.fresh()
    flip(site_module.checkpoints(keys) / "step-00000002/rank-00001.safetensors")
    reason = site.breaks(keys, site_module.pretrain_in_rank)
    return _must_hold(reason, "holds no checkpoint that is whole", keys)


def _asked_for(site: Any) -> str:
    keys = site.fresh(checkpoint__resume=str(site.directory / "nowhere"))
    return _must_hold(site.breaks(keys, site_module.pretrain_in_rank), "there is no such checkpoint", keys)


def _must_hold(reason: str, part: str, keys: Keys) -> str:
    if part not in reason:
        raise Broken(f"{part!r} is not in: {reason}")
    if len(site_module.losses(keys)) != 2:
        raise Broken("a run was started")
    return reason.partition(": ")[2][:160]


# --- in the middle of a step -------------------------------------------------------------------------------------------


def steps() -> list[Drill]:
    """List what happens to ranks in mid-step."""
    found = []
    for rank in (0, 1):
        for where in ("forward", "update"):
            name = f"kill -9 of rank {rank} in the {where} of a step"
            found.append(Drill(name, f"the others end; {WHOLE}", _KillInStep(rank, where)))
    return found


@dataclass(frozen=True)
class _KillInStep:
    rank: int
    where: str

    def __call__(self, site: Any) -> str:
        keys = site.fresh()
        start = time.monotonic()
        reason = site.breaks(keys, die_in_step, self.rank, self.where)
        return f"{reason}, all ended in {time.monotonic() - start:.1f} s; {site.recovers(keys)}"


def die_in_step(keys: Keys, rank: int, where: str) -> int:
    """Train on this rank, and die in step STEP - 1, which follows the resumed checkpoint."""
    from lmscale.train.engine import Engine

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    train_step = Engine.train_step

    def step(engine: Any, micro_batches: Any, count: int, number: int, *rest: Any) -> Any:
        if number == STEP - 1 and _rank() == rank:
            if where == "forward":
                next(engine.model.parameters())
                engine.model.register_forward_pre_hook(die)
            else:
                engine.basic_optimizer.step = die
        return train_step(engine, micro_batches, count, number, *rest)

    Engine.train_step = step  # type: ignore[method-assign]
    return int(site_module.pretrain_in_rank(keys))


# --- numbers that are none ---------------------------------------------------------------------------------------------

SKIPPED = "the update is withheld on all ranks, and the run is that which has the step in train.skip_steps, bit for bit"


def numbers() -> list[Drill]:
    """List what is done about a gradient and a loss that are not finite."""
    found = []
    for what in ("a NaN in a gradient of rank 1", "a poisoned batch (the loss is NaN) on rank 1"):
        found += [
            Drill(f"{what}: skip", SKIPPED, _Poison(what, "skip")),
            Drill(f"{what}: rewind", f"back to the checkpoint; then {SKIPPED}", _Poison(what, "rewind")),
            Drill(
                f"{what}: stop", "status 77, the state is not saved, the checkpoint before stays", _Poison(what, "stop")
            ),
        ]
    return found


@dataclass(frozen=True)
class _Poison:
    what: str
    action: str

    def __call__(self, site: Any) -> str:
        keys = site.fresh(faults__non_finite={"action": self.action})
        if self.action == "stop":
            reason = site.breaks(keys, poison, "gradient" in self.what)
            if site_module.check_all(keys) != "step-00000002":
                raise Broken("the state was saved")
            return reason.partition(": ")[2][:140]
        site.train(keys, poison, "gradient" in self.what)
        skipped = site.fresh(train__skip_steps=[str(STEP - 1)])
        site.train(skipped)
        if site_module.tensors(keys) != site_module.tensors(skipped):
            raise Broken("weights or moments differ from those of the run that skips the step by hand")
        if site_module.losses(keys)[STEP:] != site_module.losses(skipped)[STEP:]:
            raise Broken("losses differ from those of the run that skips the step by hand")
        newest = site_module.find_checkpoint(site_module.checkpoints(keys))
        actions = site_module.read_manifest(newest)["progress"]["faults"]["actions"]
        told = [(action["step"], action["action"]) for action in actions]
        if told != [(STEP - 1, self.action)]:
            raise Broken(f"the manifest tells {told}")
        shutil.rmtree(keys["output_dir"])
        return f"{self.action} at step {STEP - 1}, told in the manifest; the end is that of the run that skips it"


def poison(keys: Keys, is_gradient: bool) -> int:
    """Train on this rank; the gradient, or the loss, of step STEP - 1 of rank 1 is NaN, the first time that it is trained."""
    from lmscale.train.engine import Engine

    train_step, marker = Engine.train_step, Path(keys["output_dir"]) / "poisoned"

    def step(engine: Any, micro_batches: Any, count: int, number: int, *rest: Any) -> Any:
        if number != STEP - 1 or _rank() != 1 or marker.exists():
            return train_step(engine, micro_batches, count, number, *rest)
        marker.touch()
        if is_gradient:
            hook = next(engine.model.parameters()).register_hook(lambda gradient: gradient * float("nan"))
        else:
            hook = engine.model.register_forward_hook(lambda *arguments: arguments[-1] * float("nan"))
        try:
            return train_step(engine, micro_batches, count, number, *rest)
        finally:
            hook.remove()

    Engine.train_step = step  # type: ignore[method-assign]
    return int(site_module.pretrain_in_rank(keys))


# --- requests, and ranks that do not answer ----------------------------------------------------------------------------


def requests() -> list[Drill]:
    """List what asks a run to save or to stop, and a rank that stops answering."""
    saved = "the step is finished and saved on all ranks, status 75; the next start ends as if nothing had happened"
    found = [
        Drill(f"{name} to rank {rank}", saved, _Ask(name, rank))
        for name, rank in (("SIGTERM", 0), ("SIGTERM", 1), ("SIGINT", 1))
    ]
    found += [
        Drill("the file STOP", saved, _Ask("STOP", 0)),
        Drill("SIGUSR1 to rank 1", "the step is saved, and the run goes on", _Ask("SIGUSR1", 1)),
        Drill(
            "a rank that stops answering (SIGSTOP)", f"the others end with 76 and say where they are; {WHOLE}", _stopped
        ),
    ]
    return found


@dataclass(frozen=True)
class _Ask:
    how: str
    rank: int

    def __call__(self, site: Any) -> str:
        keys = site.fresh()
        statuses = site.train(keys, ask, self.how, self.rank)
        goes_on = self.how == "SIGUSR1"
        if statuses != [0 if goes_on else 75] * site_module.RANKS:
            raise Broken(f"statuses {statuses}")
        names = {path.name for path in site_module.checkpoints(keys).glob("step-*")}
        if f"step-{STEP - 1:08d}" not in names:
            raise Broken(f"step {STEP - 1} was not saved")
        return f"statuses {statuses}, step {STEP - 1} saved; {site.recovers(keys, None if goes_on else STEP - 1)}"


def ask(keys: Keys, how: str, rank: int) -> int:
    """Train on this rank, and ask for a stop or a save in step STEP - 1."""
    from lmscale.train import loop

    step = loop._step

    def asked(run: Any, *rest: Any) -> Any:
        if run.progress.step == STEP - 2 and _rank() == rank:
            if how == "STOP":
                (Path(keys["output_dir"]) / "STOP").touch()
            else:
                os.kill(os.getpid(), signal.Signals[how])
        return step(run, *rest)

    loop._step = asked
    return int(site_module.pretrain_in_rank(keys))


def _stopped(site: Any) -> str:
    keys = site.fresh(train__hang_timeout_s=4)
    start = time.monotonic()
    reason = site.breaks(keys, stop_answering)
    seconds = time.monotonic() - start
    if "76" not in reason:
        raise Broken(reason)
    if "Thread" not in (Path(keys["output_dir"]) / "logs/rank-0000.log").read_text():
        raise Broken("no stacks are in the log")
    return f"{reason} after {seconds:.0f} s, stacks in the log; {site.recovers(keys)}"


def stop_answering(keys: Keys) -> int:
    """Train on this rank; rank 1 is stopped in step STEP, the second of this start."""
    from lmscale.train import loop

    step = loop._step

    def stopped(run: Any, *rest: Any) -> Any:
        if run.progress.step == STEP - 1 and _rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return step(run, *rest)

    loop._step = stopped
    return int(site_module.pretrain_in_rank(keys))


# --- disks -------------------------------------------------------------------------------------------------------------


def disks() -> list[Drill]:
    """List what happens to the directory of checkpoints while a run saves; the harm is undone before the last save."""
    full = _Disk("fill", "size=60k", "No space left")
    return [
        Drill("a full disk (a small tmpfs) while saving", GOES_ON, full),
        Drill("a full disk, written behind the loop", GOES_ON, _Disk("fill", "size=60k", "No space left", True)),
        Drill("a read-only disk while saving", GOES_ON, _Disk("read-only", "size=9m", "Read-only file system")),
        Drill("a vanished directory while saving", GOES_ON, _Disk("vanish", None, "Not a directory")),
        Drill(
            "a full disk at the last save",
            "the run ends with an error; the checkpoint before is whole",
            _full_at_the_end,
        ),
    ]


@dataclass(frozen=True)
class _Disk:
    harm: str
    tmpfs: str | None
    message: str
    asynchronous: bool = False

    def __call__(self, site: Any) -> str:
        keys = site.fresh(checkpoint__asynchronous=self.asynchronous)
        home = site_module.checkpoints(keys)
        with _mounted(home, None if self.tmpfs is None else "size=9m"):
            site.train(keys, harm_disk, self.harm)
            log = "\n".join(path.read_text() for path in Path(keys["output_dir"], "logs").glob("*.log"))
            if self.message not in log:
                raise Broken(f"{self.message!r} is not in the logs")
            for path in home.glob("step-*"):
                site_module.verify(path)
            names = sorted(path.name for path in home.glob("step-*"))
            if names != ["step-00000002", "step-00000006"]:
                raise Broken(f"checkpoints {names}")
            if site_module.losses(keys) != site.reference:
                raise Broken("losses differ from those of the run that nothing happened to")
            if site_module.tensors(keys) != site_module.tensors(site.keys(site.directory / "whole")):
                raise Broken("weights or moments differ from those of the run that nothing happened to")
        shutil.rmtree(keys["output_dir"])
        return f'"{self.message}" told at step {STEP}; trained on, step 6 saved; the end is that of the whole run'


@contextlib.contextmanager
def _mounted(home: Path, options: str | None) -> Iterator[None]:
    """Put a small tmpfs in the place of a directory, with its content."""
    if options is None:
        yield
        return
    if os.geteuid() != 0:
        raise NotHere("mounting needs root")
    kept = home.with_name("kept")
    home.rename(kept)
    home.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", home], capture_output=True, check=False)
    if done.returncode:
        raise NotHere(f"a tmpfs cannot be mounted: {done.stderr.decode().strip()}")
    try:
        for path in kept.iterdir():
            (shutil.copytree if path.is_dir() else shutil.copy)(path, home / path.name)
        yield
    finally:
        subprocess.run(["umount", "-l", home], check=True)


def harm_disk(keys: Keys, harm: str) -> int:
    """Train on this rank; rank 0 harms the directory before the save of STEP, and undoes that a step later."""
    from lmscale.train import loop

    home, step = site_module.checkpoints(keys), loop._step
    away = home.with_name("away")

    def harmed(run: Any, *rest: Any) -> Any:
        number = run.progress.step + 1
        if _rank() == 0 and number == STEP:
            _harm(harm, home, away)
        if _rank() == 0 and number == STEP + 2:
            run.saver.poll()
            _mend(harm, home, away)
        elif number == STEP + 2:
            run.saver.poll()
        return step(run, *rest)

    loop._step = harmed
    return int(site_module.pretrain_in_rank(keys))


def _harm(harm: str, home: Path, away: Path) -> None:
    if harm == "fill":
        with contextlib.suppress(OSError), (home / "filling").open("wb") as file:
            while True:
                file.write(b"\0" * 4096)
                file.flush()
    elif harm == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", home], check=True)
    else:
        home.rename(away)
        home.write_text("")


def _mend(harm: str, home: Path, away: Path) -> None:
    if harm == "fill":
        (home / "filling").unlink()
    elif harm == "read-only":
        subprocess.run(["mount", "-o", "remount,rw", home], check=True)
    else:
        home.unlink()
        away.rename(home)


def _full_at_the_end(site: Any) -> str:
    keys = site.fresh(train__stop_at_step=STEP)
    home = site_module.checkpoints(keys)
    with _mounted(home, "size=9m"):
        reason = site.breaks(keys, harm_disk, "fill")
        if "No space left" not in reason:
            raise Broken(reason)
        if site_module.check_all(keys) != "step-00000002":
            raise Broken("the checkpoint before is gone")
    return reason.partition(": ")[2][:120]


# --- at random times ---------------------------------------------------------------------------------------------------


def random_kills(count: int, seed: int = 1) -> Drill:
    """Kill a run that saves at every step, again and again, until it has been killed so many times."""
    return Drill(f"kill -9 at {count} random times of a run that saves at every step", WHOLE, _RandomKills(count, seed))


_LONG_STEPS = 70
"""Of a run that is killed at random times."""


@dataclass(frozen=True)
class _RandomKills:
    count: int
    seed: int

    def __call__(self, site: Any) -> str:
        draw = random.Random(self.seed)
        whole = self._keys(site, "long", checkpoint__save_interval=0)
        site.train(whole)
        kills = runs = 0
        while kills < self.count:  # where steps are fast, a run ends before all kills are spent: then another one
            keys = self._keys(site, f"killed-{runs}", checkpoint__save_interval=1, checkpoint__keep=3)
            here = self._kill_on(site, keys, self.count - kills, draw)
            if not here:
                raise Broken("a run ended before it was killed once")
            site.train(keys)
            if site_module.losses(keys) != site_module.losses(whole):
                raise Broken("losses differ from those of the run that nothing happened to")
            if site_module.tensors(keys) != site_module.tensors(whole):
                raise Broken("weights or moments differ from those of the run that nothing happened to")
            kills, runs = kills + here, runs + 1
        return (
            f"{kills} kills of {runs} runs; all {_LONG_STEPS} losses and the ends are those of a whole run, bit for bit"
        )

    def _keys(self, site: Any, name: str, **changes: Any) -> Keys:
        tokens = 4 * 32 * _LONG_STEPS
        keys: Keys = site.keys(site.directory / f"{name}-of-{self.count}", train__train_tokens=tokens, **changes)
        return keys

    @staticmethod
    def _kill_on(site: Any, keys: Keys, count: int, draw: random.Random) -> int:
        """Start a run and kill it, until it was killed so many times or has come to its end; count the kills."""
        kills, metrics = 0, Path(keys["output_dir"]) / "metrics.jsonl"
        while kills < count and not (metrics.exists() and len(site_module.losses(keys)) >= _LONG_STEPS):
            keys["checkpoint"]["asynchronous"] = draw.random() < 0.5
            killer = _Killer(draw.uniform(0.0, 1.2), draw.random() < 0.5, draw)
            kills += _killed(site, keys, killer)
            for path in site_module.checkpoints(keys).glob("step-*"):
                site_module.verify(path)
        return kills


@dataclass
class _Killer:
    """Kills ranks some seconds after the run's first step since the start: one of them or all."""

    delay_s: float
    kills_all: bool
    draw: random.Random
    began_s: float | None = None
    is_done: bool = False

    def tick(self, pids: list[int], has_begun: Callable[[], bool]) -> None:
        """Look whether it is time."""
        if self.is_done:
            return
        if self.began_s is None:
            self.began_s = time.monotonic() if has_begun() else None
        elif time.monotonic() - self.began_s >= self.delay_s:
            self.is_done = True
            for pid in pids if self.kills_all else [self.draw.choice(pids)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _killed(site: Any, keys: Keys, killer: _Killer) -> bool:
    """Start the run and kill it; tell whether it was."""
    from lmscale.parallel.local_ranks import RankFailure, RankPool

    metrics = Path(keys["output_dir"]) / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    with RankPool(site_module.RANKS, logs=Path(keys["output_dir"]) / "logs") as pool:
        pids = [process.pid for process in pool._processes]
        try:
            pool.run(
                site_module.pretrain_in_rank,
                keys,
                timeout_s=site_module.TIMEOUT_S,
                tick=lambda: killer.tick(pids, lambda: metrics.exists() and metrics.stat().st_mtime_ns > before),
            )
        except RankFailure:
            return killer.is_done
    return False


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank()
