"""What the C library does with memory that is freed.

glibc keeps freed blocks of up to 32 MB for those that come next. Reading and packing a model leaves hundreds
of MB of them behind, in pieces, of which a process that generates touches ever more.
"""

from __future__ import annotations

import contextlib
import ctypes

_M_MMAP_THRESHOLD = -3
_LARGE = 1 << 20


def give_back_large_blocks() -> None:
    """From now on, give blocks of 1 MiB or more back to the system as soon as they are freed.

    For a whole process, so for a program to call and not for a library. With glibc alone, whose variable
    ``MALLOC_MMAP_THRESHOLD_`` does the same from outside; other C libraries are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)
