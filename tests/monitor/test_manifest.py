"""manifest.json."""

import hashlib
import json
import subprocess
import sys

import pytest

from lmscale.config.io import parse_run, show
from lmscale.monitor import manifest
from lmscale.monitor.manifest import git_commit, git_commit_of_package, versions, write_manifest


@pytest.fixture
def config():
    return parse_run(
        {
            "model": {"preset": "gpt3-125m"},
            "data": {"train": [{"prefix": "corpus"}], "seq_length": 128},
            "batch": {"micro_batch_size": 1, "global_batch_size": 2},
            "optim": {"lr": 1e-3},
            "train": {"train_tokens": 1000},
            "output_dir": "runs/x",
        }
    )


@pytest.fixture
def checkout(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-m", "one")
    return tmp_path


def test_manifest_names_versions_layout_command_hosts_and_hashes(tmp_path, config):
    path = tmp_path / "run" / "manifest.json"
    write_manifest(
        path, config, {"tp_size": 2}, ["lmscale", "train"], {"data": {"corpus": "ab12"}, "hosts": ["a", "b"]}
    )
    written = json.loads(path.read_text())
    assert written["config_sha256"] == hashlib.sha256(show(config).encode()).hexdigest()
    assert written["layout"] == {"tp_size": 2}
    assert written["command"] == ["lmscale", "train"]
    assert (written["data"], written["hosts"]) == ({"corpus": "ab12"}, ["a", "b"])
    assert written["versions"]["torch"].split(".")[0].isdigit()
    assert list(path.parent.iterdir()) == [path]


def test_earlier_starts_are_kept_in_order(tmp_path, config):
    path = tmp_path / "manifest.json"
    for devices in (1, 2, 4):
        write_manifest(path, config, {"dp_size": devices}, [])
    written = json.loads(path.read_text())
    assert written["layout"] == {"dp_size": 4}
    assert [start["layout"]["dp_size"] for start in written["earlier_starts"]] == [1, 2]
    assert all("earlier_starts" not in start for start in written["earlier_starts"])


@pytest.mark.parametrize("broken", ["", "{", "[]", "\x00"])
def test_a_broken_earlier_manifest_is_replaced(tmp_path, config, broken):
    path = tmp_path / "manifest.json"
    path.write_text(broken)
    write_manifest(path, config, {}, [])
    assert json.loads(path.read_text())["earlier_starts"] == []


def test_versions_need_no_import():
    code = (
        "import sys; import lmscale.monitor.manifest as m; m.versions(); "
        "print(sorted({'torch', 'deepspeed', 'megatron'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert versions()["python"]


def test_commit_says_whether_tracked_files_differ_from_it(checkout):
    clean = git_commit(checkout)
    assert clean is not None
    assert len(clean) == 40
    (checkout / "untracked").write_text("b")
    assert git_commit(checkout) == clean
    (checkout / "file").write_text("b")
    assert git_commit(checkout) == clean + "+changes"


def test_without_a_checkout_or_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit(tmp_path) is None


def test_a_copy_of_lmscale_inside_another_checkout_is_not_that_checkout(checkout, monkeypatch):
    package = checkout / "lmscale"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(manifest, "_PACKAGE_DIR", package)
    assert git_commit(checkout) is not None
    assert git_commit_of_package() is None
