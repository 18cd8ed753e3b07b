"""A checkpoint's manifest names all of it, and nothing that is not as it was written passes."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest

from lmscale.cli.main import main
from lmscale.config.checkpoint_paths import find_checkpoint, list_checkpoints
from lmscale.errors import CheckpointError
from lmscale.train.checkpoint_files import FORMAT, MANIFEST, check_hashes, is_whole, read_manifest, seal, stored_files
from lmscale.train.retention import EPHEMERAL, Keep, point_latest, prune, remove_leftovers

FIELDS = {"progress": {"step": 7, "consumed_samples": 14, "consumed_tokens": 448, "skipped_steps": 0}}


@pytest.fixture
def checkpoint(tmp_path):
    directory = tmp_path / "checkpoints" / "step-00000007"
    (directory / "tokenizer").mkdir(parents=True)
    (directory / "rank-00000.safetensors").write_bytes(bytes(range(256)) * 9000)
    (directory / "config.yaml").write_text("model: {}\n")
    (directory / "tokenizer" / "model").write_text("words")
    seal(directory, FIELDS)
    return directory


def verified(directory):
    check_hashes(directory, stored_files(read_manifest(directory)))


def edit_manifest(directory, change):
    manifest = json.loads((directory / MANIFEST).read_text())
    change(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest))


def test_a_whole_checkpoint_passes_and_every_file_is_named(checkpoint):
    verified(checkpoint)
    assert list(stored_files(read_manifest(checkpoint))) == ["config.yaml", "rank-00000.safetensors", "tokenizer/model"]


def flip(path, at=-1):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "a bit of a tensor": (
        lambda d: flip(d / "rank-00000.safetensors", 123_456),
        "rank-00000.safetensors is not as it was",
    ),
    "a bit of the config": (lambda d: flip(d / "config.yaml", 2), "config.yaml is not as it was"),
    "a bit of the tokenizer": (lambda d: flip(d / "tokenizer/model"), "tokenizer/model is not as it was"),
    "a byte short": (lambda d: os.truncate(d / "rank-00000.safetensors", 2_303_999), "has 2303999 bytes of 2304000"),
    "a missing file": (lambda d: (d / "tokenizer/model").unlink(), "tokenizer/model is missing"),
    "a foreign file": (
        lambda d: (d / "rank-00000.safetensors").write_bytes(b"\1" * 2_304_000),
        "rank-00000.safetensors is not as it was",
    ),
    "no manifest": (lambda d: (d / MANIFEST).unlink(), "is not a checkpoint of lmscale"),
    "half a manifest": (lambda d: os.truncate(d / MANIFEST, 100), "is not a checkpoint of lmscale"),
    "another step in the manifest": (
        lambda d: edit_manifest(d, lambda m: m["progress"].update(step=8)),
        "manifest.json is not as it was written",
    ),
    "a manifest that lies about sizes": (
        lambda d: edit_manifest(d, lambda m: m["files"]["config.yaml"].update(bytes=3)),
        "manifest.json is not as it was written",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_refused_with_the_name_of_the_file(checkpoint, damage):
    harm, part = DAMAGES[damage]
    harm(checkpoint)
    with pytest.raises(CheckpointError, match=re.escape(part)) as caught:
        verified(checkpoint)
    assert str(caught.value).startswith(f"checkpoint = '{checkpoint}': ")


def resealed(directory, change):
    """Change the manifest as somebody would who knows its checksum."""
    from lmscale.train.checkpoint_files import _checksum

    def both(manifest):
        change(manifest)
        manifest["checksum"] = _checksum(manifest)

    edit_manifest(directory, both)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "tokenizer/../../outside", "link"])
def test_names_that_lead_outside_are_refused(checkpoint, name):
    outside = checkpoint.parent / "outside"
    outside.write_text("secret")
    (checkpoint / "link").symlink_to(outside)
    resealed(checkpoint, lambda m: m["files"].update({name: {"bytes": 6, "sha256": "0"}}))
    with pytest.raises(CheckpointError, match="names a file outside of the checkpoint"):
        read_manifest(checkpoint)


def test_a_newer_format_is_refused_and_the_one_before_is_read(checkpoint):
    resealed(checkpoint, lambda m: m.update(format=FORMAT + 1))
    with pytest.raises(CheckpointError, match=f"has format {FORMAT + 1}, and this lmscale reads 1 to {FORMAT}"):
        read_manifest(checkpoint)
    edit_manifest(checkpoint, lambda m: m.update(format=1, files={"config.yaml": 10}))
    verified(checkpoint)
    (checkpoint / "config.yaml").write_text("short")
    assert not is_whole(checkpoint)


def make(checkpoints, step, kind="regular"):
    directory = checkpoints / f"step-{step:08d}"
    directory.mkdir(parents=True)
    seal(directory, {**FIELDS, "kind": kind})
    return directory


def names(checkpoints):
    return [int(path.name[-8:]) for path in sorted(checkpoints.glob("step-*"))]


def test_latest_comes_first_then_older_ones_then_those_of_a_course_that_was_given_up(tmp_path):
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    assert [int(path.name[-1]) for path in list_checkpoints(tmp_path)] == [4, 3, 2, 1]
    point_latest(tmp_path / "step-00000002")
    assert [int(path.name[-1]) for path in list_checkpoints(tmp_path)] == [2, 1, 4, 3]
    assert find_checkpoint(tmp_path) == tmp_path / "step-00000002"


@pytest.mark.parametrize(
    ("keep", "protected", "left"),
    [
        (Keep(2), set(), [5, 6]),
        (Keep(0), set(), [1, 2, 3, 4, 5, 6]),
        (Keep(1, every_steps=2), set(), [2, 4, 6]),
        (Keep(1), {3}, [3, 6]),
        (Keep(3), {5}, [3, 4, 5, 6]),
    ],
)
def test_what_nothing_keeps_goes_and_the_newest_never(tmp_path, keep, protected, left):
    paths = {step: make(tmp_path, step) for step in range(1, 7)}
    prune(tmp_path, keep, paths[6], {paths[step] for step in protected})
    assert names(tmp_path) == left


def test_an_ephemeral_one_goes_when_the_next_is_there_and_counts_for_nothing(tmp_path):
    paths = {step: make(tmp_path, step, EPHEMERAL if step in (2, 4, 6) else "regular") for step in range(1, 7)}
    prune(tmp_path, Keep(2), paths[6])
    assert names(tmp_path) == [3, 5, 6]


def test_later_ones_of_a_given_up_course_are_left_and_count_for_nothing(tmp_path):
    paths = {step: make(tmp_path, step) for step in (1, 2, 3, 8, 9)}
    prune(tmp_path, Keep(2), paths[3])
    assert names(tmp_path) == [2, 3, 8, 9]


def test_leftovers_of_a_crash_go_and_a_checkpoint_that_had_lost_its_name_gets_it_back(tmp_path):
    whole = make(tmp_path, 3)
    shutil.copytree(make(tmp_path, 4), tmp_path / ".step-00000004.replaced")
    whole.rename(tmp_path / ".step-00000003.replaced")
    for name in (".step-00000005.partial", ".step-00000001.deleted"):
        (tmp_path / name).mkdir()
    (tmp_path / ".replacing-12.tmp").write_text("")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [3, 4]
    assert [path.name for path in tmp_path.glob(".*")] == []
    assert is_whole(whole)


class TestCommands:
    def test_list_says_what_is_there_and_which_is_torn(self, checkpoint, capsys):
        torn = make(checkpoint.parent, 3)
        (torn / MANIFEST).unlink()
        point_latest(checkpoint)
        assert main(["checkpoint", "list", str(checkpoint.parents[1]), "--json"]) == 0
        first, second = json.loads(capsys.readouterr().out)
        assert (first["name"], first["step"], first["state"], first["pointers"]) == (
            checkpoint.name,
            7,
            "whole",
            ["latest"],
        )
        assert second["state"].startswith("is not a checkpoint")
        assert main(["checkpoint", "list", str(checkpoint.parent)]) == 0
        assert "step-00000003" in capsys.readouterr().out

    def test_verify_ends_with_0_or_names_what_is_damaged(self, checkpoint, capsys):
        assert main(["checkpoint", "verify", str(checkpoint)]) == 0
        assert "good" in capsys.readouterr().out
        flip(checkpoint / "config.yaml")
        assert main(["checkpoint", "verify", str(checkpoint.parent)]) == 2
        assert f"error: checkpoint = '{checkpoint}': config.yaml is not as it was written" in capsys.readouterr().err
        flip(checkpoint / "tokenizer/model")
        assert main(["checkpoint", "verify", str(checkpoint)]) == 2
        captured = capsys.readouterr()
        assert "2 files or manifests are not as they were written" in captured.err
        assert captured.out.count("bad") == 2

    def test_a_path_without_a_checkpoint_is_told(self, tmp_path, capsys):
        for command in ("list", "verify"):
            assert main(["checkpoint", command, str(tmp_path / "nowhere")]) == 2
            assert "does not exist" in capsys.readouterr().err
