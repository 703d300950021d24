"""Freed memory goes back to the system."""

import platform
import subprocess
import sys

import pytest

# A block of 8 MB that is freed is kept for the next one by default, and its pages stay resident.
PROGRAM = """
import ctypes
from pathlib import Path
from planish.runtime.heap import give_back_large_blocks

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) // 1024

def grown():
    before = resident()
    blocks = [libc.malloc(8 << 20) for _ in range(8)]
    for block in blocks:
        ctypes.memset(block, 1, 8 << 20)
    for block in blocks[:-1]:
        libc.free(block)
    return resident() - before

libc.free(libc.malloc(16 << 20))  # from now on such blocks are kept
kept = grown()
give_back_large_blocks()
print(kept, grown())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_large_blocks_are_given_back():
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    kept, left = map(int, found.stdout.split())
    assert kept >= 60
    assert left < 12
