"""Which floating point types a device computes in by instructions of its own."""

from __future__ import annotations

import torch


def is_native(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrix products in ``dtype`` are fast on ``device``, and not merely possible.

    A CPU without the instructions converts each operand, and is slower than in float32.
    """
    if dtype == torch.bfloat16 and device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if dtype == torch.bfloat16 and device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # PyTorch's products in float16 use no CPU's instructions but those of Intel's AMX-FP16.
    return dtype != torch.float16 or device.type != "cpu" or torch.cpu._is_amx_fp16_supported()
