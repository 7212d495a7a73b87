"""Which arithmetic a run computes in."""

from __future__ import annotations

import torch

from kgray.machine import computes_bfloat16


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """bfloat16 or None for plain float32."""
    if precision == "float32" or (precision == "auto" and device.type == "cpu" and not computes_bfloat16()):
        return None
    return torch.bfloat16
