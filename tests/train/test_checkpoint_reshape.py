"""A checkpoint rewritten for a layout is what that layout would have saved, bit for bit, and needs little memory for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lmscale.cli.main import main
from lmscale.config.checkpoint_paths import find_checkpoint
from lmscale.config.io import load_run
from lmscale.errors import LmscaleError
from lmscale.train.checkpoint_files import read_manifest
from lmscale.train.checkpoint_reader import CheckpointReader
from lmscale.train.checkpoint_reshape import reshape_checkpoint
from lmscale.train.layout_slices import Sizes
from tests.distributed.runs import LLAMA, Keys, final_state, pretrain_on_ranks, run_keys

pytestmark = pytest.mark.distributed

MOST_MEMORY = 2.0
"""Of the largest tensor: itself, the half of it that is cut out, and some that the allocator keeps. Smaller tensors than
32 MiB do not show that: malloc keeps as much of what is freed."""
OPTIMIZERS: dict[str, Keys] = {
    "adamw": {"name": "adamw", "lr": 1.0e-3},
    "adafactor": {"name": "adafactor", "lr": 1.0e-2, "adafactor_min_dim": 16},
    "muon": {"name": "muon", "lr": 1.0e-2, "muon_precision": "fp32"},
}
MODELS: dict[str, Keys] = {"gpt": {}, "llama": {"model": dict(LLAMA)}}
QUICK = [
    ("gpt", "adamw", (2, 2, 1, 1)),
    ("llama", "adamw", (2, 1, 2, 2)),
    ("gpt", "muon", (1, 1, 2, 3)),
    ("llama", "adafactor", (1, 2, 2, 1)),
]
CASES = [
    (model, optimizer, sizes)
    for model in MODELS
    for optimizer in OPTIMIZERS
    for sizes in [
        *((1, 1, 2, stage) for stage in range(4)),
        *((2, 1, 2, stage) for stage in range(4)),
        *((2, 2, 1, stage) for stage in range(2)),
        *((1, 2, 2, stage) for stage in range(2)),
    ]
]


def layout_of(sizes: tuple[int, int, int, int]) -> Keys:
    tp_size, pp_size, _, stage = sizes
    return {"parallel": {"tp_size": tp_size, "pp_size": pp_size}, "deepspeed__zero_optimization__stage": stage}


def newest(keys: Keys) -> Path:
    path = find_checkpoint(Path(keys["output_dir"], "checkpoints"))
    assert path is not None
    return path


def pieces_of(checkpoint: Path) -> dict[str, list[dict[str, Any]]]:
    return {path.name: json.loads(path.read_text())["pieces"] for path in sorted(checkpoint.glob("rank-*.json"))}


def without_cut_of_statistics(pieces: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Leave out adafactor's rows and columns, which are rewritten whole."""
    return {name: [p for p in found if p["kind"] not in ("row", "column")] for name, found in pieces.items()}


@pytest.fixture(scope="module")
def sources(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """A checkpoint of two tensor-parallel ranks for each model and optimizer, trained when it is asked for."""
    directory = tmp_path_factory.mktemp("sources")

    class Sources(dict[tuple[str, str], Path]):
        def __missing__(self, key: tuple[str, str]) -> Path:
            model, optimizer = key
            changes = {**MODELS[model], "optim": OPTIMIZERS[optimizer], **layout_of((2, 1, 1, 1))}
            keys = run_keys(corpus, directory / f"{model}-{optimizer}", train__stop_at_step=2, **changes)
            pretrain_on_ranks(2, keys)
            self[key] = newest(keys)
            return self[key]

    return Sources()


@pytest.mark.parametrize(
    ("model", "optimizer", "sizes"),
    [pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in CASES],
    ids=str,
)
def test_reshaped_checkpoint_is_cut_as_its_layout_cuts_and_holds_the_same_bits(
    model: str,
    optimizer: str,
    sizes: tuple[int, int, int, int],
    sources: dict[tuple[str, str], Path],
    corpus: str,
    tmp_path: Path,
) -> None:
    source = sources[model, optimizer]
    reshape_checkpoint(source, tmp_path / "reshaped", Sizes(*sizes))
    ours, theirs = CheckpointReader(tmp_path / "reshaped"), CheckpointReader(source)
    for name in theirs.shapes():
        assert ours.kinds(name) == theirs.kinds(name)
        for kind in theirs.kinds(name):
            assert torch.equal(ours.logical(kind, name), theirs.logical(kind, name))
    tp_size, pp_size, dp_size, stage = sizes
    layout = {"tp_size": tp_size, "pp_size": pp_size, "dp_size": dp_size, "zero_stage": stage}
    assert ours.manifest["layout"] == layout
    parallel = load_run(tmp_path / "reshaped" / "config.yaml").parallel
    assert (parallel.tp_size, parallel.pp_size) == (tp_size, pp_size)
    for key in ("progress", "optimizer", "loss_scaler", "stages"):
        assert ours.manifest[key] == theirs.manifest[key]

    changes = {**MODELS[model], "optim": OPTIMIZERS[optimizer], **layout_of(sizes)}
    native = run_keys(corpus, tmp_path / "native", train__stop_at_step=1, **changes)
    pretrain_on_ranks(tp_size * pp_size * dp_size, native)
    reshaped = without_cut_of_statistics(pieces_of(tmp_path / "reshaped"))
    assert reshaped == without_cut_of_statistics(pieces_of(newest(native)))


def test_run_resumed_from_it_is_the_run_resumed_from_the_original(
    sources: dict[tuple[str, str], Path], corpus: str, tmp_path: Path
) -> None:
    source = sources["llama", "adafactor"]
    reshape_checkpoint(source, tmp_path / "reshaped", Sizes(1, 2, 1, 1))
    states = []
    for number, checkpoint in enumerate((source, tmp_path / "reshaped")):
        changes = {**MODELS["llama"], "optim": OPTIMIZERS["adafactor"], **layout_of((1, 2, 1, 1))}
        keys = run_keys(
            corpus, tmp_path / str(number), checkpoint__resume=str(checkpoint), train__stop_at_step=4, **changes
        )
        pretrain_on_ranks(2, keys)
        states.append(final_state(keys))
    assert states[0] == states[1]


def test_command_takes_a_run_says_what_it_took_and_replaces_nothing(
    sources: dict[tuple[str, str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = sources["gpt", "adamw"].parent.parent, tmp_path / "out"
    command = ["checkpoint", "reshape", str(run), str(out), "--tp-size", "1", "--pp-size", "2", "--dp-size", "2"]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert f"{out}: 4 files, " in printed.out
    assert "MB of memory at most, the largest tensor 0.1 MB of it" in printed.out
    assert read_manifest(out)["layout"]["zero_stage"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    before = (out / "manifest.json").read_bytes()
    assert main(command) == 2
    assert f"OUT = '{out}': exists already" in capsys.readouterr().err
    assert (out / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("sizes", "part"),
    [
        ((1, 2, 1, 3), "pipeline with ZeRO 2 or 3 cannot be trained"),
        ((3, 1, 1, 1), "model.num_attention_heads = 4"),
        ((1, 3, 1, 1), "model.num_layers = 4"),
    ],
)
def test_layout_that_cannot_be_trained_is_refused_and_leaves_nothing(
    sizes: tuple[int, int, int, int], part: str, sources: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    with pytest.raises(LmscaleError) as caught:
        reshape_checkpoint(sources["gpt", "adamw"], tmp_path / "out", Sizes(*sizes))
    assert part in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_damaged_checkpoint_is_refused_and_leaves_nothing(sources: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    import shutil

    damaged = shutil.copytree(sources["gpt", "adamw"], tmp_path / "damaged")
    file = damaged / "rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(LmscaleError, match=r"rank-00001\.safetensors is not as it was written"):
        reshape_checkpoint(damaged, tmp_path / "out", Sizes(1, 1, 1, 0))
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


_MEASURED = """
import sys, threading, time
from pathlib import Path
from lmscale.train.checkpoint_reshape import reshape_checkpoint
from lmscale.train.layout_slices import Sizes

def resident():
    return 4096 * int(open("/proc/self/statm").read().split()[1])

def watch():
    while True:
        peaks.append(max(peaks.pop(), resident()))
        time.sleep(0.0005)

source, tiny, out = map(Path, sys.argv[1:])
reshape_checkpoint(tiny, out / "tiny", Sizes(2, 1, 2, 1))  # what the first use of everything takes
start = resident()
peaks = [start]
threading.Thread(target=watch, daemon=True).start()
done = reshape_checkpoint(source, out / "large", Sizes(2, 1, 2, 1))
print(peaks[0] - start, done.largest_tensor_bytes, done.num_bytes)
"""


def test_no_more_than_a_tensor_and_its_slice_is_in_memory(
    sources: dict[tuple[str, str], Path], corpus: str, tmp_path: Path
) -> None:
    large = run_keys(corpus, tmp_path / "run", train__stop_at_step=1, **layout_of((2, 1, 1, 1)))
    large["model"] |= {"vocab_size": 65_536, "hidden_size": 256, "num_layers": 2}
    pretrain_on_ranks(2, large)
    command = [sys.executable, "-c", _MEASURED, str(newest(large)), str(sources["gpt", "adamw"]), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    more, largest, whole = map(int, done.stdout.split()[-3:])
    assert largest == 65_536 * 256 * 4
    assert more < MOST_MEMORY * largest < 0.9 * whole
