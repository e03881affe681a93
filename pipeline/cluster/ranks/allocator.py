"""How glibc holds the memory of a process that trains on CPUs; other C libraries pass over what is said here."""

KEEPS_FREED = {
    "MALLOC_ARENA_MAX": "1",  # one heap for all threads: those of others are small, and given back
    "MALLOC_TRIM_THRESHOLD_": f"{2**31 - 1}",  # bytes at the heap's end that stay
    "MALLOC_MMAP_MAX_": "0",  # pieces that lie outside of the heap
}
"""Environment in which what is freed is kept for what is asked for next.

By default large pieces go back to the kernel, which clears every page anew: a step frees and asks for the same gigabyte
each time, and takes about a tenth longer by that.
"""
