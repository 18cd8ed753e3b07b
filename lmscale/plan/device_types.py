"""The devices that the planner knows: arithmetic, memory, links, and how much of the arithmetic is reached.

Peaks are those of plan.devices. Memory and its bandwidth are the datasheets'. A link's rate is that of one device in one
direction: NVLink's and Infinity Fabric's totals count both, so they are halved here. Between nodes, a device's share of
the network cards of the vendor's reference node of 8: DGX-1 V100 4 x 100 Gb/s, DGX A100 8 x 200 Gb/s, DGX H100, H200,
B200 and MI300X platforms 8 x 400 Gb/s. Host memory is an eighth of those nodes' 2 TB.

`matmul_fraction` is calibrated on the published runs of plan.published for A100 and H100, one number for each. H200 has
H100's arithmetic and takes its number; V100 takes A100's, B200 H100's. MI300X's 0.45 is an estimate. On a CPU nothing is
calibrated: its row is one core of an ordinary machine, to try the command.

Source: NVIDIA datasheets V100 (2020), A100 (2021), H100 (2023), H200 (2024), DGX B200 (2024); AMD Instinct MI300X
datasheet (2023).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from lmscale.config.base import Section
from lmscale.config.validation import config_error, nearest
from lmscale.errors import ConfigError
from lmscale.plan.devices import peak_flops_per_second

Precision = Literal["bf16", "fp16", "fp32"]


class DeviceType(Section):
    """A device: a name of DEVICE_TYPES, or a YAML file with these keys."""

    name: str
    """What tables call it."""
    flops_per_second: dict[Precision, float]
    """Peak of dense arithmetic by precision; a precision that is left out cannot be trained."""
    memory_bytes: float = Field(gt=0)
    """Memory of one device."""
    memory_bytes_per_second: float = Field(gt=0)
    """Bandwidth of that memory."""
    node_bytes_per_second: float = Field(gt=0)
    """What one device sends to the others of its node, in one direction."""
    network_bytes_per_second: float = Field(gt=0)
    """One device's share of what its node sends to other nodes, in one direction."""
    devices_per_node: int = Field(8, gt=0)
    """Devices of a node."""
    host_bytes_per_second: float = Field(25.0e9, gt=0)
    """What one device exchanges with host memory, in one direction; read with offload only."""
    host_memory_bytes: float = Field(250.0e9, gt=0)
    """One device's share of its host's memory; read with offload only."""
    matmul_fraction: float = Field(0.6, gt=0, le=1)
    """Share of the peak that large matrix multiplications reach."""

    @field_validator("flops_per_second")
    @classmethod
    def _has_arithmetic(cls, value: dict[str, float]) -> dict[str, float]:
        if not value or any(flops <= 0 for flops in value.values()):
            raise ValueError("must hold a number above 0 for at least one precision")
        return value


_GIGA = 1.0e9
_GIB = 2.0**30 / _GIGA


def _type(
    name: str, peak: str, memory: float, memory_rate: float, node: float, network: float, fraction: float
) -> DeviceType:
    """Make a type; memory in 10^9 bytes, rates in 10^9 bytes a second."""
    kinds: tuple[Precision, ...] = ("bf16", "fp16", "fp32")
    flops = {kind: peak_flops_per_second(peak, kind) for kind in kinds}
    return DeviceType(
        name=name,
        flops_per_second={kind: value for kind, value in flops.items() if value is not None},
        memory_bytes=memory * _GIGA,
        memory_bytes_per_second=memory_rate * _GIGA,
        node_bytes_per_second=node * _GIGA,
        network_bytes_per_second=network * _GIGA,
        matmul_fraction=fraction,
    )


A100_FRACTION, H100_FRACTION, MI300X_FRACTION = 0.77, 0.64, 0.45
_ALL = (
    _type("A100-40", "A100", 40 * _GIB, 1555, 300, 25, A100_FRACTION),
    _type("A100-80", "A100", 80 * _GIB, 2039, 300, 25, A100_FRACTION),
    _type("H100", "H100", 80 * _GIB, 3350, 450, 50, H100_FRACTION),
    _type("H200", "H200", 141, 4800, 450, 50, H100_FRACTION),
    _type("B200", "B200", 180, 8000, 900, 50, H100_FRACTION),
    _type("MI300X", "MI300X", 192, 5300, 448, 50, MI300X_FRACTION),
    _type("V100", "V100", 32 * _GIB, 900, 150, 6.25, A100_FRACTION),
    DeviceType(
        name="cpu",
        flops_per_second={"fp32": 50 * _GIGA, "bf16": 25 * _GIGA, "fp16": 25 * _GIGA},
        memory_bytes=4 * _GIB * _GIGA,
        memory_bytes_per_second=10 * _GIGA,
        node_bytes_per_second=1 * _GIGA,
        network_bytes_per_second=1 * _GIGA,
        host_bytes_per_second=10 * _GIGA,
        host_memory_bytes=4 * _GIB * _GIGA,
        matmul_fraction=0.7,
    ),
)
DEVICE_TYPES: dict[str, DeviceType] = {kind.name: kind for kind in _ALL}


def device_type(name: str) -> DeviceType:
    """Look a device up, or read it from a YAML file.

    Args:
        name: of DEVICE_TYPES, in any case, or a path that ends in .yaml or .yml.

    Raises:
        ConfigError: if there is no such device (the nearest is named), or the file is wrong.
    """
    if name.endswith((".yaml", ".yml")):
        return _read(Path(name))
    found = {known.lower(): kind for known, kind in DEVICE_TYPES.items()}.get(name.lower())
    if found is None:
        remedy = nearest(name, DEVICE_TYPES)
        remedy += " A YAML file of your own serves too" if remedy.endswith("?") else ", or a YAML file of your own"
        raise ConfigError("is no device type", field="--device-type", value=name, remedy=remedy)
    return found


def reported_type(device_name: str, memory_bytes: float) -> DeviceType | None:
    """Find the type of a device that runs: by the name that torch reports, and its memory where a name has two.

    Returns:
        None where there is no such type, or the device is a slice of one (MIG).
    """
    name = device_name.lower()
    if " mig " in f" {name} ":
        return None
    matching = [kind for kind in DEVICE_TYPES.values() if kind.name.partition("-")[0].lower() in name]
    return min(matching, key=lambda kind: abs(kind.memory_bytes - memory_bytes), default=None)


def _read(path: Path) -> DeviceType:
    import yaml

    field = "--device-type"
    try:
        keys: Any = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError("does not exist", field=field, value=str(path)) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot be read: {error}", field=field, value=str(path)) from None
    if not isinstance(keys, dict):
        raise ConfigError("must hold a mapping of keys", field=field, value=str(path))
    try:
        return DeviceType.model_validate({"name": path.stem, **keys})
    except ValidationError as error:
        raise config_error(error, DeviceType, f"{path}: ") from None
