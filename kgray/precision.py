"""Which arithmetic a machine is quick in. Floor 2; torch is imported only when asked."""

from __future__ import annotations

from functools import cache


@cache
def computes_bfloat16() -> bool:
    """Whether this machine's processor multiplies bfloat16 natively (AVX512-BF16, AMX, or their like).

    Elsewhere bfloat16 is emulated and slower than float32.
    """
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and "AVX512" in torch.backends.cpu.get_cpu_capability()
