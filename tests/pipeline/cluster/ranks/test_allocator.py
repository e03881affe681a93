"""Memory that a training frees: it is there for what is asked for next, without the kernel's help."""

import multiprocessing
import resource

import pytest
import torch

from pipeline.cluster.ranks import allocator

PIECE = 64 << 20  # bytes
ROUNDS = 20


def _faults(keeps: bool) -> int:
    """Pages that the kernel was asked for while pieces were taken and freed over and over."""
    if keeps:
        allocator.keep_freed()
    for _ in range(ROUNDS):  # until the heap has found its shape
        torch.ones(PIECE // 4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(ROUNDS):
        torch.ones(PIECE // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.parametrize("keeps", [False, True])
def test_what_is_freed_is_kept_for_what_comes(keeps: bool) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        faults = pool.apply(_faults, (keeps,))
    pages = ROUNDS * PIECE // resource.getpagesize()
    assert faults < pages / 20 if keeps else faults > pages / 2


def test_a_c_library_without_such_settings_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    allocator.keep_freed()
