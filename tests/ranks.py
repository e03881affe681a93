"""Ranks of a training, each a process of its own that is forked from one with torch: importing it takes each seconds.

That one has neither threads nor what this process has opened, and stays for the ranks of other tests. What ranks import
beside torch they import themselves.
"""

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["torch._dynamo", "torchvision"])  # the first of which every optimizer imports


def start(work: Callable[..., None], arguments: tuple[Any, ...], ranks: int) -> mp.ProcessContext:
    """`work(rank, *arguments)` in each; `join` waits for all, and raises what one of them raised."""
    context = mp.start_processes(work, arguments, ranks, join=False, start_method="forkserver")
    assert context is not None
    return context


def together(work: Callable[..., None], arguments: tuple[Any, ...], ranks: int) -> None:
    """Start them, and wait until all have ended well."""
    context = start(work, arguments, ranks)
    while not context.join():
        pass
