"""Peak arithmetic of accelerators, by the name under which torch reports them.

Dense figures from the vendors' datasheets (those with 2:4 sparsity are twice as high), per device, at boost clock.
fp32 is the plain fp32 pipeline, which torch uses unless TF32 is allowed.

Source: NVIDIA datasheets: V100 (2020), A100 (2021), H100 (2023), H100 NVL (2024), H200 (2024), Blackwell architecture
technical brief (2024; HGX B200 and GB200); AMD Instinct MI300X datasheet (2023).
"""

from __future__ import annotations

from dataclasses import dataclass

_TERA = 1.0e12


@dataclass(frozen=True)
class DevicePeak:
    """One row: the device whose reported name holds all of `words`."""

    words: tuple[str, ...]
    half_flops_per_second: float
    """fp16, and bf16 where the device has it."""
    fp32_flops_per_second: float
    has_bf16: bool = True


def _row(words: str, half: float, fp32: float, has_bf16: bool = True) -> DevicePeak:
    return DevicePeak(tuple(words.lower().split()), half * _TERA, fp32 * _TERA, has_bf16)


DEVICE_PEAKS: tuple[DevicePeak, ...] = (
    # The first match counts, so the variant stands before its family, whose own row is the SXM module.
    _row("V100 PCIE", 112.0, 14.0, has_bf16=False),
    _row("V100", 125.0, 15.7, has_bf16=False),
    _row("A100", 312.0, 19.5),
    _row("H100 PCIe", 756.0, 51.0),
    _row("H100 NVL", 835.0, 60.0),
    _row("H100", 989.0, 67.0),
    _row("GH200", 990.0, 67.0),
    _row("H200 NVL", 835.0, 60.0),
    _row("H200", 989.0, 67.0),
    _row("GB200", 2500.0, 90.0),
    _row("B200", 2250.0, 80.0),
    _row("MI300X", 1307.4, 163.4),
)


def peak_flops_per_second(device_name: str, precision: str) -> float | None:
    """Look up the peak of one device in a precision.

    Args:
        device_name: as torch.cuda.get_device_name reports it ("NVIDIA H100 80GB HBM3"); its case does not matter.
        precision: fp32, fp16 or bf16.

    Returns:
        FLOP/s, or None where the device is unknown, a slice of one (MIG), or lacks the precision.
    """
    name = device_name.lower()
    # A slice reports the whole device's name with its share behind it; the share of the arithmetic is not in the name.
    if " mig " in f" {name} ":
        return None
    row = next((row for row in DEVICE_PEAKS if all(word in name for word in row.words)), None)
    if row is None or (precision == "bf16" and not row.has_bf16):
        return None
    peaks = {"fp32": row.fp32_flops_per_second, "fp16": row.half_flops_per_second, "bf16": row.half_flops_per_second}
    return peaks.get(precision)
