"""The device of this rank, and what the libraries below need to run where there is no GPU.

megatron-core and DeepSpeed run on a CPU over gloo but for three assumptions, all lifted here and nowhere else, and only
where no GPU is in use:

1. megatron-core asks `torch.cuda.current_device()` where to allocate communication buffers.
2. megatron-core's reusable gather buffer lives on that device as well; (1) covers it.
3. DeepSpeed's CPU accelerator calls fp16 unsupported without AVX512-FP16, though torch computes it on any CPU.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import torch

from lmscale.parallel.op_builds import mend_builds


def use_gpu() -> bool:
    """Tell whether this process trains on a GPU: one is there and DS_ACCELERATOR does not say cpu."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") != "cpu"


def local_device() -> torch.device:
    """Return the device of this rank (LOCAL_RANK's GPU, or the CPU)."""
    if use_gpu():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def describe_device(device: torch.device) -> dict[str, Any]:
    """Describe this rank's device for a manifest: its type, and of a GPU its name and memory."""
    if device.type != "cuda":
        return {"type": device.type}
    properties = torch.cuda.get_device_properties(device)
    return {"type": "cuda", "name": properties.name, "memory_bytes": properties.total_memory}


def prepare_device() -> torch.device:
    """Select this rank's device and, on a CPU, lift the assumptions named at the top of this module."""
    mend_builds()
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        return device
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.cuda.current_device = lambda: device  # type: ignore[assignment,return-value]
    _allow_fp16_on_cpu()
    _keep_freed_memory()
    return device


def multiplies_slowly(tensor: torch.Tensor) -> bool:
    """Tell whether torch has no matrix kernels for a tensor: half precision on a CPU without instructions for it."""
    return tensor.dtype in _SLOW_ON_CPU and tensor.device.type == "cpu"


def _slow_dtypes() -> frozenset[torch.dtype]:
    if not torch.backends.mkldnn.is_available():
        return frozenset((torch.bfloat16, torch.float16))
    has_kernels = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, is_fast in has_kernels.items() if not is_fast)


_SLOW_ON_CPU = _slow_dtypes()


def _keep_freed_memory() -> None:
    """Have glibc keep large blocks that are freed, for the next step.

    Left alone it maps each of them afresh and the kernel zeroes every page again: 5 to 15 % of a step. The process stays
    as large as its largest step, which training needs again in any case. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, -1)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt, from malloc.h; a threshold of -1 never trims."""


def _allow_fp16_on_cpu() -> None:
    from deepspeed.accelerator import get_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    accelerator = get_accelerator()
    if isinstance(accelerator, CPU_Accelerator) and not accelerator.is_fp16_supported():
        CPU_Accelerator.is_fp16_supported = _computes_fp16


def _computes_fp16(_: Any) -> bool:
    return True


def overrules_fp16() -> bool:
    """Tell whether fp16 runs on this CPU only because DeepSpeed's refusal is switched off."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    return CPU_Accelerator.is_fp16_supported is _computes_fp16
