"""Run the tasks of a sharded tokenization by datatrove: on this host, by Slurm, by Ray.

On this host each worker is a process of its own with its share of the tasks, by datatrove's local executor: its pool of
processes would wait for ever for one that is killed, and would end the others when one fails.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lmscale.data.manifest import Manifest
from lmscale.data.shard_jobs import EncodeShard, ShardJob, load_job, save_job
from lmscale.data.shards import list_path, summed, to_json
from lmscale.data.writer import disk_errors
from lmscale.errors import EXIT_BAD_INPUT, EXIT_FAILURE, ConfigError, DataError, LmscaleError, RunError

Executor = Literal["local", "slurm", "ray"]
_MEMORY = "mem_per_cpu_gb"
_SLURM = {"partition", "time", _MEMORY, "qos"}
"""Options that datatrove has a name for; others go to sbatch as they are."""


def check_executor(executor: Executor, options: Mapping[str, str]) -> None:
    """Check that what an executor needs is there.

    Raises:
        ConfigError: if a package or program is missing, naming the extra, or an option is missing or wrong.
    """
    for package, extra in (("datatrove", "shards"), *([("ray", "ray")] if executor == "ray" else [])):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"needs {package}, which is not installed",
                field="--executor",
                value=executor,
                remedy=f"pip install 'lmscale[{extra}]'",
            )
    if executor != "slurm" and options:
        raise ConfigError("is read with --executor slurm only", field="--slurm", value=next(iter(options)))
    if executor == "slurm":
        if shutil.which("sbatch") is None:
            remedy = "run it on a login node; on Debian: apt-get install slurm-client"
            raise ConfigError(
                "needs sbatch, which is not on the PATH", field="--executor", value=executor, remedy=remedy
            )
        for name in ("partition", "time"):
            if name not in options:
                raise ConfigError("is missing", field=f"--slurm {name}", remedy=f"as in --slurm {name}=...")
        memory = options.get(_MEMORY, "2")
        if not (memory.isdecimal() and int(memory)):
            raise ConfigError("must be a whole number of GB", field=f"--slurm {_MEMORY}", value=memory)


def run_shards(
    job: ShardJob,
    executor: Executor,
    processes: int,
    options: Mapping[str, str],
    missing: Sequence[int] | None = None,
) -> Manifest:
    """Encode the shards that are missing, and write the list when none is.

    Args:
        job: the shards.
        executor: where the tasks run.
        processes: tasks at a time; 0 for no limit (slurm, ray).
        options: of sbatch.
        missing: `job.missing()`, of a caller that knows: it hashes every index. Left out, it is looked up.

    Returns:
        The manifest of all shards together.

    Raises:
        RunError: naming the shards that are missing in the end.
        DataError: the same, where a worker of this host finds the input wrong; or no shard has a document.
        OutputError: if the job's files cannot be written.
    """
    missing = job.missing() if missing is None else missing
    if missing:
        with disk_errors(job.directory):
            list_path(job.prefix).unlink(missing_ok=True)  # it names shards that are about to be replaced
            job_file = save_job(job)
            _note_done(job, missing)
        if executor == "local":
            status, reason = _run_here(job, job_file, processes)
        else:
            status, reason = EXIT_FAILURE, _run_elsewhere(job, job_file, executor, processes, options)
        missing = job.missing()
        if missing:
            names = ", ".join(f"{number:05d}" for number in missing[:8]) + (", ..." if len(missing) > 8 else "")
            kind = DataError if status == EXIT_BAD_INPUT else RunError
            raise kind(
                f"{len(missing)} of {len(job.files)} shards are missing ({names}): {reason or 'see its logs'}",
                field="--executor",
                value=executor,
                remedy=f"the same command makes them, and nothing else; logs are in {job.directory}",
            )
    found = summed(job.prefix, range(len(job.files)))
    _write(list_path(job.prefix), to_json(found))
    return found.manifest


def _note_done(job: ShardJob, missing: Sequence[int]) -> None:
    """Let datatrove's notes say what is done by our own measure: it starts tasks for the rest alone."""
    notes = job.directory / "tasks" / "completions"
    shutil.rmtree(notes, ignore_errors=True)
    notes.mkdir(parents=True)
    for number in set(range(len(job.files))) - set(missing):
        (notes / f"{number:05d}").touch()


def _run_here(job: ShardJob, job_file: Path, processes: int) -> tuple[int, str]:
    """Run a worker for each share of the tasks, and leave no process behind.

    Returns: the status of the first that failed and what it told of it; 0 where none did.
    """
    shares = _shares(len(job.files), processes)
    workers: list[tuple[subprocess.Popen[bytes], Path]] = []
    try:
        for first, behind in shares:
            log = job.directory / f"worker-{first:05d}.log"
            command = [sys.executable, "-m", __name__, str(job_file), str(first), str(behind)]
            with disk_errors(log):
                file = log.open("wb")
            with file:
                process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
            workers.append((process, log))
        statuses = [process.wait() for process, _ in workers]
    finally:
        for process, _ in workers:
            # The group outlives its leader: what the worker itself has started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    failed = next(((status, log) for status, (_, log) in zip(statuses, workers, strict=True) if status), None)
    return (0, "") if failed is None else (failed[0], _told(*failed))


def _shares(tasks: int, processes: int) -> list[tuple[int, int]]:
    bounds = [tasks * number // processes for number in range(processes + 1)]
    return [(first, behind) for first, behind in itertools.pairwise(bounds) if first < behind]


def _told(status: int, log: Path) -> str:
    """Say why a worker has ended, by its own error line where it wrote one."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
    if lines:
        return lines[-1].removeprefix("error: ")
    return f"a worker was killed by signal {-status}" if status < 0 else f"a worker ended with status {status}"


def _run_elsewhere(
    job: ShardJob, job_file: Path, executor: Executor, processes: int, options: Mapping[str, str]
) -> str:
    """Run datatrove's executor until its tasks are over; return what it has to say of a failure."""
    built = build_executor(job, job_file, executor, processes, options)
    try:
        built.run()
    except subprocess.CalledProcessError as error:
        return f"sbatch ended with status {error.returncode}"
    except Exception as error:  # of any of the tasks, on any host
        return f"{type(error).__name__}: {error}"
    return ""


def build_executor(
    job: ShardJob, job_file: Path, executor: Executor, processes: int, options: Mapping[str, str]
) -> Any:
    """Build datatrove's executor for a cluster; its files lie in the job's directory, which all hosts share."""
    common: dict[str, Any] = {
        "pipeline": [EncodeShard(str(job_file))],
        "tasks": len(job.files),
        "workers": processes or -1,
        "logging_dir": str(job.directory / "tasks"),
        "cpus_per_task": job.workers,
    }
    if executor == "ray":
        from datatrove.executor.ray import RayPipelineExecutor

        return RayPipelineExecutor(**common)
    from datatrove.executor.slurm import SlurmPipelineExecutor

    own = {name: options.get(name) for name in _SLURM}
    return SlurmPipelineExecutor(
        **common,
        time=own["time"],
        partition=own["partition"],
        qos=own["qos"],
        mem_per_cpu_gb=int(own[_MEMORY] or 2),
        job_name="lmscale-tokenize",
        # The tasks run in this environment, and sbatch stays until they are over.
        env_command=f"export PATH={Path(sys.executable).parent}:$PATH",
        sbatch_args={"wait": "", **{name: value for name, value in options.items() if name not in _SLURM}},
        mail_type="NONE",
    )


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with disk_errors(path):
        partial.write_text(text)
        partial.replace(path)


def _work(job_file: str, first: int, behind: int) -> int:
    """Be a worker of this host: run tasks first up to behind, one after another."""
    from datatrove.executor.local import LocalPipelineExecutor

    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    job = load_job(Path(job_file))
    try:
        LocalPipelineExecutor(
            pipeline=[EncodeShard(job_file)],
            tasks=len(job.files),
            workers=1,
            local_tasks=behind - first,
            local_rank_offset=first,
            logging_dir=str(job.directory / "tasks"),
        ).run()
    except LmscaleError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_status
    except Exception:
        sys.stderr.write(f"error: task of {first} to {behind - 1} failed\n")
        return EXIT_FAILURE
    return 0


def _end_with_parent(parent: int) -> None:
    """End this worker and what it has started when the command that started it is gone, however it went."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(_work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
