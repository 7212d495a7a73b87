"""When memory ran out: how that looks, on a GPU, a CPU, in numpy, and in what Ray tells of a worker it killed."""

from __future__ import annotations

import errno
import gc
import re

import torch

from kgray.errors import OutOfMemoryError

_CPU = re.compile(r"DefaultCPUAllocator: (can't allocate|not enough) memory.*", re.IGNORECASE)
_MONITOR = re.compile(r"killed.*(?:running low on memory|memory monitor|out of memory)|OutOfMemoryError", re.I | re.S)
_WRAPPED = ("cause", "_base_exc", "health_check_failure")
"""Where Ray keeps the error it wraps."""

_TRIED = re.compile(r"tried to allocate (\d+) bytes", re.IGNORECASE)


def out_of_memory(error: BaseException) -> str | None:
    """What ran out, in a few words, where ``error`` or anything it was caused by says so; else None.

    A process that the kernel killed leaves no such word: to its survivors it died like any other.
    """
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or one in seen:
            continue
        seen.append(one)
        if isinstance(one, OutOfMemoryError):
            return None  # it says what to lower: halves would not help
        inner = [found for name in _WRAPPED if isinstance(found := getattr(one, name, None), BaseException)]
        # What wraps an error quotes it whole, and only says that there was one.
        if not inner and (told := _reason(one)):
            return told
        waiting += [one.__cause__, *inner]
    return None


def _reason(error: BaseException) -> str | None:
    text = str(error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return f"the GPU has no room: {text.partition('. GPU')[0].removeprefix('CUDA out of memory. ')}"
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return f"no memory left: {text or 'an allocation failed'}"
    if isinstance(error, RuntimeError) and _CPU.search(text):
        tried = _TRIED.search(text)
        wanted = f" for {int(tried.group(1)) / 2**20:,.0f} MiB more" if tried else ""
        return f"no memory left{wanted}"
    if type(error).__module__.startswith("ray.") and _MONITOR.search(f"{type(error).__name__}: {text}"):
        return "Ray's memory monitor killed the worker, as its node ran low on memory"
    return None


def freed() -> None:
    """Give back what a broken step had in memory, once nothing refers to it any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
