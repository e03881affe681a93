"""How a process that trains on CPUs holds its memory."""

import ctypes

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # glibc's numbers of the two settings, from malloc.h


def keep_freed() -> None:
    """Have glibc keep what is freed for what is asked for next.

    By default it gives large pieces back to the kernel, which clears every page anew: a step frees and asks for the
    same gigabyte each time, and takes about a tenth longer by that. C libraries without such settings stay as they are.
    """
    settings = getattr(ctypes.CDLL(None), "mallopt", None)
    if settings is not None:
        settings(TRIM_THRESHOLD, 2**31 - 1)  # bytes at the heap's end that are kept
        settings(MMAP_MAX, 0)  # pieces that lie outside of the heap
