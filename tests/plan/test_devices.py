"""Peaks by the names that devices report."""

import pytest

from lmscale.plan.devices import peak_flops_per_second


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A100-PCIE-40GB", 312e12, 19.5e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H100 NVL", 835e12, 60e12),
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA H200 NVL", 835e12, 60e12),
        ("NVIDIA GH200 480GB", 990e12, 67e12),
        ("NVIDIA B200", 2250e12, 80e12),
        ("NVIDIA GB200", 2500e12, 90e12),
        ("AMD Instinct MI300X", 1307.4e12, 163.4e12),
    ],
)
def test_reported_names_are_known(name, bf16, fp32):
    assert peak_flops_per_second(name, "bf16") == pytest.approx(bf16)
    assert peak_flops_per_second(name, "fp16") == pytest.approx(bf16)
    assert peak_flops_per_second(name, "fp32") == pytest.approx(fp32)


def test_v100_has_fp16_and_no_bf16():
    assert peak_flops_per_second("Tesla V100-SXM2-32GB", "fp16") == pytest.approx(125e12)
    assert peak_flops_per_second("Tesla V100-PCIE-16GB", "fp16") == pytest.approx(112e12)
    assert peak_flops_per_second("Tesla V100-SXM2-32GB", "bf16") is None


@pytest.mark.parametrize("name", ["cpu", "NVIDIA GeForce RTX 4090", "NVIDIA A10G", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"])
def test_unknown_devices_and_slices_have_no_peak(name):
    assert peak_flops_per_second(name, "bf16") is None


def test_an_unknown_precision_has_no_peak():
    assert peak_flops_per_second("NVIDIA H100 PCIe", "fp8") is None
