"""Memory that a training frees: it is there for what is asked for next, without the kernel's help."""

import os
import subprocess
import sys

from pipeline.cluster.ranks.allocator import KEEPS_FREED

ROUNDS, PIECES, PIECE = 10, 2, 80 << 20  # bytes
COUNTED = f"""
import resource, threading, torch

def rounds():
    for _ in range({ROUNDS}):
        [torch.ones({PIECE} // 4) for _ in range({PIECES})]

def train():
    rounds()  # until the heap has found its shape
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    rounds()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=train)  # as Ray has its ranks train
thread.start()
thread.join()
"""


def faults(**environment: str) -> int:
    """Pages that the kernel was asked for while a thread took and freed pieces over and over."""
    command, variables = [sys.executable, "-c", COUNTED], {**os.environ, **environment}
    return int(subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout)


def test_what_is_freed_is_kept_for_what_comes() -> None:
    assert faults(**KEEPS_FREED) < 0.05 * faults()
