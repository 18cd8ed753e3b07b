"""Files of tensors: safetensors reads them, their hash is that of the bytes, and a failure is one."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lmscale.train.tensor_file import TensorFile, file_layout, write_tensors


@given(sizes=st.lists(st.integers(0, 50), max_size=6), cut=st.integers(1, 20))
def test_safetensors_reads_what_was_written_in_any_cut(tmp_path_factory, sizes, cut):
    path = tmp_path_factory.mktemp("file") / "a.safetensors"
    tensors = {f"t/{number}": torch.randn(size) for number, size in enumerate(sizes)}
    flat = torch.cat([*tensors.values(), torch.empty(0)])
    written = write_tensors(path, {key: tuple(tensor.shape) for key, tensor in tensors.items()}, flat.split(cut))
    content = path.read_bytes()
    assert written.num_bytes == len(content)
    assert written.sha256 == hashlib.sha256(content).hexdigest()
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[key], tensor) for key, tensor in tensors.items())


def test_large_tensors_of_other_precisions_and_strides_are_fp32_in_the_file(tmp_path):
    tensors = {
        "transposed": torch.randn(1500, 1100).t(),
        "half": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(3.5),
    }
    write_tensors(tmp_path / "a", {key: tuple(tensor.shape) for key, tensor in tensors.items()}, tensors.values())
    read = load_file(tmp_path / "a")
    assert all(torch.equal(read[key], tensor.float()) for key, tensor in tensors.items())


def test_tensors_begin_at_multiples_of_their_size():
    layout = file_layout({"a": (3,), "é" * 5: (2, 2), "b": ()})
    assert all(offset % 4 == 0 for offset in layout.offsets.values())
    assert len(layout.header) % 8 == 0
    assert layout.num_bytes == len(layout.header) + 4 * (3 + 4 + 1)


def test_values_that_are_missing_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="bytes were given of"):
        write_tensors(tmp_path / "a", {"a": (3,)}, [torch.zeros(2)])


def test_a_full_disk_is_an_error_and_ends_the_hashing_thread(tmp_path):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_tensors(full, {"a": (3,)}, [torch.zeros(3)])


def test_ranges_of_what_safetensors_wrote_are_read(tmp_path):
    tensors = {"b": torch.randn(7, 5), "a": torch.randn(11), "one": torch.tensor([3.5])}
    save_file(tensors, tmp_path / "a", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "a")
    for key, tensor in tensors.items():
        for start in range(tensor.numel()):
            values = torch.full((tensor.numel() - start,), torch.nan)
            file.read_into(key, start, values)
            assert torch.equal(values, tensor.view(-1)[start:])
    with pytest.raises(ValueError, match="a has 11 values, and 12 are asked for"):
        file.read_into("a", 5, torch.empty(7))
    with pytest.raises(ValueError, match="it has no c"):
        file.read_into("c", 0, torch.empty(1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"\xff" * 20, "its header is longer than the file"),
        ((2).to_bytes(8, "little") + b"{]", "Expecting"),
    ],
)
def test_what_is_no_file_of_tensors_is_refused(tmp_path, content, message):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        TensorFile(tmp_path / "a")


def test_other_precisions_are_refused(tmp_path):
    save_file({"a": torch.zeros(3, dtype=torch.bfloat16)}, tmp_path / "a")
    with pytest.raises(ValueError, match="a is BF16, not F32"):
        TensorFile(tmp_path / "a")
