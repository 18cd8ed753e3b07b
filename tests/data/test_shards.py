"""Corpora in shards: read as one, made by workers of their own, finished by a rerun."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lmscale.cli.main import main
from lmscale.config.data import TokenizerConfig
from lmscale.data import shard_executors, shard_jobs
from lmscale.data.encode import encode_corpus
from lmscale.data.indexed import IndexedCorpus
from lmscale.data.readers import TextReader
from lmscale.data.sentences import SentenceSplitter
from lmscale.data.shard_executors import build_executor, check_executor, run_shards
from lmscale.data.shard_jobs import ShardJob, divided, make_job, save_job
from lmscale.data.shards import ShardedTokens, files_of, is_corpus, list_path, read_shards, shard_prefix
from lmscale.data.windows import Windows
from lmscale.errors import ConfigError, DataError, RunError
from tests.data.corpora import TEXTS

NEEDS_DATATROVE = "tasks are spread by datatrove: pip install 'lmscale[shards]'"
NUM_FILES = 6
SLURM = {"partition": "cpu", "time": "01:00:00"}


@pytest.fixture
def config(tokenizer_path: str) -> TokenizerConfig:
    return TokenizerConfig(path=tokenizer_path)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Six files of different sizes; one line of the fourth is broken."""
    directory = tmp_path / "text"
    directory.mkdir()
    for number in range(NUM_FILES):
        lines = [json.dumps({"text": f"{number} {line} {TEXTS[line % 4]}"}) for line in range(3 + 5 * number)]
        (directory / f"part-{number}.jsonl").write_text("\n".join([*lines, *(["{"] if number == 3 else [])]) + "\n")
    return directory


def job_of(
    text: Path, config: TokenizerConfig, prefix: Path, shards: int = 3, reader: TextReader | None = None
) -> ShardJob:
    return make_job([str(text / "*.jsonl")], config, prefix, shards, reader or TextReader())


def whole_of(text: Path, config: TokenizerConfig, prefix: Path, reader: TextReader | None = None) -> IndexedCorpus:
    encode_corpus([str(text / "*.jsonl")], config, prefix, workers=1, reader=reader)
    return IndexedCorpus(prefix)


def encode_all(job: ShardJob) -> IndexedCorpus:
    """Encode a job's shards here, one by one, and write the list."""
    for number in job.missing():
        job.encode(number)
    run_shards(job, "local", 1, {})
    return IndexedCorpus(job.prefix)


def test_files_are_divided_in_order_and_by_size() -> None:
    paths = [Path(name) for name in "abcdef"]
    assert divided(paths, [1] * 6, 3) == [paths[:2], paths[2:4], paths[4:]]
    assert divided(paths, [100, 1, 1, 1, 1, 1], 2) == [paths[:1], paths[1:]]
    assert divided(paths[:2], [5, 5], 8) == [paths[:1], paths[1:2]]
    for parts in range(1, 9):
        assert [path for part in divided(paths, [3, 0, 7, 1, 1, 9], parts) for path in part] == paths


@pytest.mark.parametrize(
    "reader", [TextReader(), TextReader(splitter=SentenceSplitter("lines"))], ids=["plain", "lines"]
)
def test_shards_are_read_as_the_corpus_in_one_piece(
    text: Path, config: TokenizerConfig, tmp_path: Path, reader: TextReader
) -> None:
    one = whole_of(text, config, tmp_path / "one", reader)
    many = encode_all(job_of(text, config, tmp_path / "many", 3, reader))
    assert sorted(path.name for path in tmp_path.glob("many-*.idx")) == [f"many-0000{n}.idx" for n in range(3)]
    assert not (tmp_path / "many.bin").exists()
    for name in ("document_offsets", "sentence_offsets", "document_sentences"):
        np.testing.assert_array_equal(getattr(many, name), getattr(one, name))
    np.testing.assert_array_equal(np.asarray(many.tokens), np.asarray(one.tokens))
    for number in range(one.num_documents):
        np.testing.assert_array_equal(many.document(number), one.document(number))
    assert many.has_sentences == one.has_sentences
    assert one.manifest is not None
    assert many.manifest is not None
    for name in ("documents", "tokens", "skipped", "bin_bytes", "tokenizer_hash", "eos_id", "vocab_size", "sentences"):
        assert getattr(many.manifest, name) == getattr(one.manifest, name), name
    assert many.manifest.skipped == {"broken JSON": 1}


def test_windows_cross_the_borders_of_shards(text: Path, config: TokenizerConfig, tmp_path: Path) -> None:
    one, many = whole_of(text, config, tmp_path / "one"), encode_all(job_of(text, config, tmp_path / "many", 6))
    read = []
    for corpus in (one, many):
        windows = Windows(corpus, None, 17, isolate=True)
        numbers = np.arange(windows.num_samples())
        keys = np.stack([np.zeros_like(numbers)] * 3 + [numbers], axis=1)
        read.append(windows.read(keys))
    np.testing.assert_array_equal(read[0].tokens, read[1].tokens)
    np.testing.assert_array_equal(read[0].document_ids, read[1].document_ids)


def test_sharded_tokens_are_indexed_as_one_array() -> None:
    flat = np.arange(100, dtype=np.uint16)
    tokens = ShardedTokens([flat[:1], flat[1:40], flat[40:40], flat[40:]])
    assert len(tokens) == 100
    for start, stop in [(0, 100), (0, 0), (0, 1), (39, 41), (5, 30), (40, 40), (90, 200), (-10, 100)]:
        np.testing.assert_array_equal(tokens[start:stop], flat[start:stop])
    places = np.array([[0, 1, 39], [40, 99, -1]])
    np.testing.assert_array_equal(tokens[places], flat[places])
    assert np.shares_memory(tokens[5:30], flat)
    np.testing.assert_array_equal(tokens.view(np.uint8)[3:90], flat.view(np.uint8)[3:90])


def test_content_hash_tells_a_changed_shard(text: Path, config: TokenizerConfig, tmp_path: Path) -> None:
    corpus = encode_all(job_of(text, config, tmp_path / "c"))
    before = corpus.content_hash
    assert before == IndexedCorpus(tmp_path / "c").content_hash
    with (tmp_path / "c-00001.bin").open("r+b") as file:
        file.write(b"\x07\x00")
    assert IndexedCorpus(tmp_path / "c").content_hash != before


def test_damaged_and_missing_shards_are_named(text: Path, config: TokenizerConfig, tmp_path: Path) -> None:
    prefix = tmp_path / "c"
    assert not is_corpus(prefix)
    job = job_of(text, config, prefix)
    encode_all(job)
    assert is_corpus(prefix)
    assert files_of(prefix) == [list_path(prefix)]
    content = (tmp_path / "c-00002.bin").read_bytes()
    (tmp_path / "c-00002.bin").write_bytes(content[:-2])
    with pytest.raises(DataError, match=r"c-00002\.bin: holds"):
        IndexedCorpus(prefix)
    assert job.missing() == [2]
    (tmp_path / "c-00002.idx").unlink()
    with pytest.raises(DataError, match=r"c-00002\.idx: there is no such file"):
        IndexedCorpus(prefix)
    job.encode(1)
    encode_corpus([str(text / "part-0.jsonl")], config, shard_prefix(prefix, 2), workers=1)
    with pytest.raises(DataError, match="is not the shard that the list names"):
        IndexedCorpus(prefix)
    list_path(prefix).write_text("{}")
    with pytest.raises(DataError, match="is no list of shards"):
        read_shards(prefix)


def test_an_empty_file_makes_an_empty_shard(text: Path, config: TokenizerConfig, tmp_path: Path) -> None:
    for name in ("part-1b.jsonl", "part-6.jsonl"):
        (text / name).write_text("")
    one = whole_of(text, config, tmp_path / "one")
    job = make_job([str(text / "*.jsonl")], config, tmp_path / "many", NUM_FILES + 2, TextReader())
    job = dataclasses.replace(job, files=tuple((name,) for part in job.files for name in part))  # as a shard per file
    many = encode_all(job)
    assert [shard.tokens == 0 for shard in read_shards(tmp_path / "many").shards] == [n in (2, 7) for n in range(8)]
    assert job.missing() == []
    np.testing.assert_array_equal(many.document_offsets, one.document_offsets)
    np.testing.assert_array_equal(np.asarray(many.tokens), np.asarray(one.tokens))
    nothing = dataclasses.replace(job, prefix=str(tmp_path / "nothing"), files=job.files[2:3])
    with pytest.raises(DataError, match="nothing: holds no documents"):
        encode_all(nothing)
    assert not list_path(tmp_path / "nothing").exists()


def test_what_is_there_is_hashed_once_to_be_known_as_done(
    text: Path, config: TokenizerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_all(job_of(text, config, tmp_path / "c"))
    hashed: list[Path] = []
    original = shard_jobs.sha256_of_file
    monkeypatch.setattr(shard_jobs, "sha256_of_file", lambda path: (hashed.append(path), original(path))[1])
    monkeypatch.setattr(shard_executors, "check_executor", lambda *_: None)
    assert tokenize(text, config, tmp_path / "c", "--executor", "local", "--shards", "3") == 0
    assert [path.name for path in hashed] == [f"c-0000{number}.idx" for number in range(3)]


def test_a_directory_that_cannot_be_made_is_one_line(
    text: Path,
    config: TokenizerConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shard_executors, "check_executor", lambda *_: None)
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", Path("/proc/nowhere")):
        assert tokenize(text, config, place / "c", "--executor", "local", "--workers", "1") == 2
        error = capsys.readouterr().err
        assert f"{place}/c.shards: cannot be written" in error
        assert error.count("\n") == 1


def test_a_shard_is_made_again_where_its_files_or_its_reader_changed(
    text: Path, config: TokenizerConfig, tmp_path: Path
) -> None:
    encode_all(job_of(text, config, tmp_path / "c"))
    assert job_of(text, config, tmp_path / "c").missing() == []
    assert job_of(text, config, tmp_path / "c", reader=TextReader("body")).missing() == [0, 1, 2]
    last = text / f"part-{NUM_FILES - 1}.jsonl"
    os.utime(last, (1, 1))
    assert job_of(text, config, tmp_path / "c").missing() == [2]


# By datatrove.


def tokenize(text: Path, config: TokenizerConfig, prefix: Path, *more: str) -> int:
    return main(
        ["tokenize", "--input", str(text / "*.jsonl"), "--tokenizer", config.path, "--output", str(prefix), *more]
    )


def test_local_workers_make_what_one_process_makes(
    text: Path, config: TokenizerConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("datatrove", reason=NEEDS_DATATROVE)
    one = whole_of(text, config, tmp_path / "one")
    options = ("--executor", "local", "--workers", "2", "--shards", "3")
    assert tokenize(text, config, tmp_path / "many", *options) == 0
    assert "in 3 shards, 0 of which were there" in capsys.readouterr().out
    np.testing.assert_array_equal(np.asarray(IndexedCorpus(tmp_path / "many").tokens), np.asarray(one.tokens))
    changed = {path: path.stat().st_mtime_ns for path in tmp_path.glob("many-*")}
    assert tokenize(text, config, tmp_path / "many", *options) == 0
    assert "3 of which were there" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("many-*")} == changed
    assert main(["data", "inspect", str(tmp_path / "many"), "--documents", "1"]) == 0


def slow_file(directory: Path) -> None:
    """Write a file that takes some seconds, behind all others."""
    lines = (json.dumps({"text": f"{number} " + TEXTS[number % 4] * 3}) for number in range(40_000))
    (directory / "slow.jsonl").write_text("\n".join(lines) + "\n")


def child_of(parent: int, argument: str) -> int | None:
    """Find the worker that a process has started with an argument behind the job's file."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            is_child = int((path / "stat").read_text().rpartition(")")[2].split()[1]) == parent
        except (OSError, IndexError):
            continue
        if is_child and b"lmscale.data.shard_executors" in words and words[4:5] == [argument.encode()]:
            return int(path.name)
    return None


def test_a_killed_worker_leaves_the_rest_unharmed_and_a_rerun_makes_what_is_missing(
    text: Path, config: TokenizerConfig, tmp_path: Path
) -> None:
    pytest.importorskip("datatrove", reason=NEEDS_DATATROVE)
    slow_file(text)
    arguments = [
        "tokenize",
        "--input",
        str(text / "*.jsonl"),
        "--tokenizer",
        config.path,
        "--output",
        str(tmp_path / "c"),
    ]
    command = [sys.executable, "-m", "lmscale", *arguments, "--executor", "local", "--workers", "2", "--shards", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # The second worker has the slow file; it is killed in the middle of it, when its output has begun.
    partial = tmp_path / "c-00001.bin.partial"
    while not (partial.exists() and partial.stat().st_size > 0):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    worker = child_of(process.pid, "1")
    assert worker is not None
    os.kill(worker, signal.SIGKILL)
    _, error = process.communicate(timeout=200)
    assert process.returncode == 1
    assert error.startswith(
        "error: --executor = 'local': 1 of 2 shards are missing (00001): a worker was killed by signal 9"
    )
    assert error.count("\n") == 1
    assert (tmp_path / "c-00000.idx").exists()
    assert not list_path(tmp_path / "c").exists()
    first = (tmp_path / "c-00000.idx").stat().st_mtime_ns
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "in 2 shards, 1 of which were there" in done.stdout
    assert (tmp_path / "c-00000.idx").stat().st_mtime_ns == first
    one = whole_of(text, config, tmp_path / "one")
    many = IndexedCorpus(tmp_path / "c")
    np.testing.assert_array_equal(many.document_offsets, one.document_offsets)
    np.testing.assert_array_equal(np.asarray(many.tokens), np.asarray(one.tokens))
    assert not left_behind(tmp_path)


def left_behind(directory: Path) -> list[str]:
    """List living processes that name a directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(directory) in line:
            found.append(line)
    return found


def test_a_broken_line_under_strict_is_told_by_file_and_line(
    text: Path, config: TokenizerConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("datatrove", reason=NEEDS_DATATROVE)
    assert tokenize(text, config, tmp_path / "c", "--executor", "local", "--workers", "2", "--strict") == 2
    error = capsys.readouterr().err
    assert "part-3.jsonl:19: broken JSON" in error
    assert error.count("\n") == 1


FAKE_SBATCH = """#!/usr/bin/env bash
# Runs a job array here, task by task, as `sbatch --wait` would on a cluster; a second array that waits for it, not at all.
for word in "$@"; do case $word in --export=*) export RUN_OFFSET=${word##*=} ;; esac; done
script="${!#}"
cp "$script" SEEN/script-$(ls SEEN | wc -l)
echo "Submitted batch job 7"
array=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
[[ -n $array ]] || exit 0
for ((task = 0; task <= array; task++)); do
    SLURM_ARRAY_TASK_ID=$task SLURM_NODELIST=node-1 bash "$script" >SEEN/log-$task 2>&1 || exit 1
done
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for Slurm's commands, which runs array tasks here; returns where it keeps what it was given."""
    programs, seen = tmp_path / "programs", tmp_path / "seen"
    programs.mkdir()
    seen.mkdir()
    scripts = {
        "sbatch": FAKE_SBATCH.replace("SEEN", str(seen)),
        "srun": '#!/usr/bin/env bash\nwhile [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done\nexec "$@"\n',
        "scontrol": "#!/usr/bin/env bash\necho node-1\n",
    }
    for name, script in scripts.items():
        (programs / name).write_text(script)
        (programs / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return seen


def test_slurm_runs_an_array_of_tasks_and_the_list_appears_when_all_are_done(
    text: Path, config: TokenizerConfig, tmp_path: Path, slurm: Path
) -> None:
    pytest.importorskip("datatrove", reason=NEEDS_DATATROVE)
    job_of(text, config, tmp_path / "c", 3).encode(1)
    options = ["--slurm", "partition=cpu", "--slurm", "time=01:00:00", "--slurm", "account=us"]
    assert tokenize(text, config, tmp_path / "c", "--executor", "slurm", "--shards", "3", *options) == 0
    script = (slurm / "script-0").read_text()
    for line in ("--array=0-1", "--partition=cpu", "--time=01:00:00", "--account=us", "--cpus-per-task=1"):
        assert f"#SBATCH {line}" in script, script
    assert "#SBATCH --wait" in script.splitlines()  # a flag: sbatch refuses --wait=
    one, many = whole_of(text, config, tmp_path / "one"), IndexedCorpus(tmp_path / "c")
    np.testing.assert_array_equal(np.asarray(many.tokens), np.asarray(one.tokens))


def test_a_failed_array_is_told_with_what_is_missing(
    text: Path, config: TokenizerConfig, tmp_path: Path, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("datatrove", reason=NEEDS_DATATROVE)
    options = ["--slurm", "partition=cpu", "--slurm", "time=01:00:00", "--strict"]
    assert tokenize(text, config, tmp_path / "c", "--executor", "slurm", "--shards", "6", *options) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "3 of 5 shards are missing (00002, 00003, 00004): sbatch ended with status 1" in error


def test_ray_gets_a_task_for_each_shard(text: Path, config: TokenizerConfig, tmp_path: Path) -> None:
    pytest.importorskip("datatrove", reason=NEEDS_DATATROVE)
    job = make_job([str(text / "*.jsonl")], config, tmp_path / "c", 3, TextReader(), workers=4)
    executor = build_executor(job, save_job(job), "ray", 0, {})
    assert type(executor).__name__ == "RayPipelineExecutor"
    assert (executor.world_size, executor.cpus_per_task, executor.workers) == (3, 4, 3)
    for number in range(3):
        for step in executor.pipeline:
            step(None, rank=number, world_size=3)
    assert job.missing() == []


@pytest.mark.parametrize(
    ("executor", "absent", "options", "part"),
    [
        ("local", "datatrove", {}, r"needs datatrove, which is not installed; pip install 'lmscale\[shards\]'"),
        ("ray", "ray", {}, r"needs ray, which is not installed; pip install 'lmscale\[ray\]'"),
        ("slurm", "", {}, "needs sbatch, which is not on the PATH"),
        ("local", "", {"partition": "cpu"}, "is read with --executor slurm only"),
        ("slurm", "", SLURM | {"mem_per_cpu_gb": "2G"}, "--slurm mem_per_cpu_gb = '2G': must be a whole number of GB"),
        ("slurm", "", SLURM | {"mem_per_cpu_gb": "0"}, "must be a whole number of GB"),
    ],
)
def test_what_an_executor_lacks_is_named(
    executor: shard_executors.Executor,
    absent: str,
    options: dict[str, str],
    part: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = shard_executors.importlib.util.find_spec
    monkeypatch.setattr(
        shard_executors.importlib.util, "find_spec", lambda name: None if name == absent else found("json")
    )
    monkeypatch.setattr(shard_executors.shutil, "which", lambda name: "sbatch" if options else None)
    with pytest.raises(ConfigError, match=part):
        check_executor(executor, options)


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--shards", "2"], "--shards = 2: is read with --executor only"),
        (["--executor", "local", "--slurm", "partition"], "--slurm = 'partition': must be KEY=VALUE"),
        (["--executor", "local", "--slurm", "a=b"], "--slurm = 'a': is read with --executor slurm only"),
        (["--executor", "here"], "--executor"),
    ],
)
def test_wrong_options_are_one_line(
    text: Path, config: TokenizerConfig, tmp_path: Path, more: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tokenize(text, config, tmp_path / "c", *more) == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1


def test_a_corpus_in_one_piece_is_not_hidden_by_shards(
    text: Path, config: TokenizerConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("datatrove", reason=NEEDS_DATATROVE)
    whole_of(text, config, tmp_path / "c")
    assert tokenize(text, config, tmp_path / "c", "--executor", "local") == 2
    assert "is a corpus in one piece" in capsys.readouterr().err


def test_missing_shards_end_the_run_by_name(
    text: Path, config: TokenizerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_executors, "_run_here", lambda *_: (0, ""))
    with pytest.raises(RunError, match=r"3 of 3 shards are missing \(00000, 00001, 00002\)"):
        run_shards(job_of(text, config, tmp_path / "c"), "local", 1, {})
