"""What the machine this process runs on has, and which arithmetic it is quick in. Floor 2, standard library only."""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """memory_gib: what this process may use."""

    gpus: int
    cores: int
    memory_gib: float

    def __str__(self) -> str:
        gpus = "no GPU" if not self.gpus else "1 GPU" if self.gpus == 1 else f"{self.gpus} GPUs"
        return f"{gpus}, {self.cores} core{'s' if self.cores != 1 else ''}, {self.memory_gib:.1f} GiB"


def this_machine() -> Machine:
    """Asked anew each time."""
    return Machine(local_gpus(), local_cores(), physical_memory() / 2**30)


def local_gpus() -> int:
    """NVIDIA GPUs this process may use: those of the driver, as far as CUDA_VISIBLE_DEVICES lets them be seen.

    Neither torch nor CUDA is loaded. 0 where there is no driver.
    """
    found = _driver_gpus()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    seen = set()
    for name in (part.strip() for part in visible.split(",")):
        there = int(name) < found if name.isdecimal() else name.startswith(("GPU-", "MIG-"))
        if not there or name in seen:
            break  # CUDA itself stops at the first it does not know
        seen.add(name)
    return min(len(seen), found)


def _driver_gpus() -> int:
    """What NVIDIA's management library counts; the same that Ray asks."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    count = ctypes.c_uint()
    if library.nvmlInit_v2():
        return 0
    failed = library.nvmlDeviceGetCount_v2(ctypes.byref(count))
    library.nvmlShutdown()
    return 0 if failed else count.value


def local_cores() -> int:
    """Cores this process may use: affinity and the container's CPU quota (cgroup v2) respected."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return cores


def physical_memory() -> int:
    """Bytes of memory, the container's limit (cgroup v2) respected."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return memory
    return min(memory, int(limit)) if limit.isdigit() else memory


def available_memory() -> int:
    """Bytes of memory that a new process could have, the container's limit (cgroup v2) respected; all there is where
    the system does not say."""
    available = physical_memory()
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as lines:
            free = next(line for line in lines if line.startswith("MemAvailable:"))
        available = min(available, int(free.split()[1]) << 10)
    except (OSError, StopIteration, ValueError):
        pass
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return available
    return min(available, max(0, int(limit) - int(used))) if limit.isdigit() else available


def resident_memory() -> int:
    """Bytes of memory this process holds now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


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
