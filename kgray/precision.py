"""Which arithmetic a machine is quick in. Floor 2, standard library only."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path


@cache
def computes_bfloat16() -> bool:
    """Whether this machine's processor multiplies bfloat16 natively (AVX512-BF16, AMX, or Arm's BF16).

    Elsewhere bfloat16 is emulated and slower than float32; where it cannot be told (no /proc/cpuinfo), the answer is
    no. torch's own question says yes of every AVX-512 processor.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    lines = [line for line in text.splitlines() if line.lower().startswith(("flags", "features"))]
    flags = {word for line in lines for word in line.split()}
    arm = platform.machine() in ("aarch64", "arm64") and "bf16" in flags
    return arm or bool(flags & {"avx512_bf16", "amx_bf16"})
