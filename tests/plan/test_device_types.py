"""The planner's devices: the known ones, and one's own from YAML."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lmscale.errors import ConfigError
from lmscale.plan.device_types import DEVICE_TYPES, device_type, reported_type

OWN = {
    "flops_per_second": {"bf16": 1.0e14},
    "memory_bytes": 24.0e9,
    "memory_bytes_per_second": 1.0e12,
    "node_bytes_per_second": 3.0e10,
    "network_bytes_per_second": 1.0e10,
}


def write(tmp_path: Path, **changes: object) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**OWN, **changes}))
    return str(path)


def test_every_promised_device_is_known_in_any_case() -> None:
    assert list(DEVICE_TYPES) == ["A100-40", "A100-80", "H100", "H200", "B200", "MI300X", "V100", "cpu"]
    assert device_type("mi300x").memory_bytes == 192e9
    assert device_type("h100").flops_per_second["bf16"] == 989e12
    assert "bf16" not in device_type("V100").flops_per_second


def test_a_file_describes_another_device(tmp_path: Path) -> None:
    found = device_type(write(tmp_path, devices_per_node=4))
    assert (found.name, found.devices_per_node, found.memory_bytes) == ("mine", 4, 24.0e9)


def test_the_documents_example_of_a_device_loads(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "planner.md").read_text()
    path = tmp_path / "example.yaml"
    path.write_text(page.split("```yaml\n")[1].split("```")[0])
    assert device_type(str(path)).name == "L40S"


def test_a_device_like_no_other_is_refused_with_the_list() -> None:
    with pytest.raises(ConfigError, match=r"one of A100-40, .*, cpu, or a YAML file of your own"):
        device_type("abacus")


def test_an_unknown_device_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"--device-type = 'H10': is no device type; did you mean 'H100'\?"):
        device_type("H10")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_bytes": -1.0}, "memory_bytes = -1.0: input should be greater than 0"),
        ({"matmul_fraction": 1.5}, "matmul_fraction = 1.5"),
        ({"flops_per_second": {}}, "flops_per_second = {}: must hold a number above 0"),
        ({"flops_per_second": {"bf16": 0.0}}, "must hold a number above 0"),
        ({"devices_per_node": 0}, "devices_per_node = 0"),
        ({"memory": 1.0}, "memory: unknown key"),
    ],
)
def test_wrong_files_are_one_line(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("{}", r"\{\}")) as raised:
        device_type(write(tmp_path, **changes))
    assert "\n" not in str(raised.value)
    assert raised.value.exit_status == 2


def test_missing_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        device_type(str(tmp_path / "none.yaml"))
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(ConfigError, match="must hold a mapping"):
        device_type(str(tmp_path / "list.yaml"))


@pytest.mark.parametrize(
    ("name", "memory", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", 85e9, "A100-80"),
        ("NVIDIA A100-PCIE-40GB", 42e9, "A100-40"),
        ("NVIDIA H100 80GB HBM3", 85e9, "H100"),
        ("NVIDIA H200", 151e9, "H200"),
        ("AMD Instinct MI300X", 206e9, "MI300X"),
        ("cpu", 1e9, "cpu"),
        ("NVIDIA GeForce RTX 4090", 25e9, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 10e9, None),
    ],
)
def test_a_running_device_has_its_type(name: str, memory: float, expected: str | None) -> None:
    found = reported_type(name, memory)
    assert (found and found.name) == expected
