"""Owns how this process gives freed memory back: not before the work is done, so that each step reuses pages instead of
faulting new ones."""

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_FROM_HEAP = 2**25  # glibc refuses more


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory of up to 32 MiB a piece; False where there is no glibc. For every attention alike.

    Without it a 4 MiB activation costs a thousand page faults in each step, as much time as reading it twice.
    """
    set_option = _of_glibc("mallopt")
    if set_option is None:
        return False
    return bool(set_option(_TRIM_THRESHOLD, 2**31 - 1) and set_option(_MMAP_THRESHOLD, _LARGEST_FROM_HEAP))


@contextmanager
def freed_memory_kept() -> Iterator[bool]:
    """From this block on freed memory is kept; what is free at its end goes back to the system, so that a process that does
    one run after another does not grow to the largest of each."""
    try:
        yield keep_freed_memory()
    finally:
        give_back_freed_memory()


def give_back_freed_memory() -> None:
    """What is free now; where there is no glibc, nothing."""
    give_back = _of_glibc("malloc_trim")
    if give_back is not None:
        gc.collect()
        give_back(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
