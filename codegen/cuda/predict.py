"""How long a product takes, predicted from its plan, and how long it would take at best: the roofline.

    roofline     max(bytes / bandwidth, operations / rate)
    prediction   launches + fill + max(bytes / reached bandwidth, bytes through the cache / its bandwidth,
                                       rounds of blocks · max(operations / rate, lane operations / rate))
                 + a tenth of what that hides

Bytes are those that go to and from memory once; what is read again comes from the cache. Operations count
padding. By Little's law a GPU reaches its bandwidth only while enough bytes are on their way, which is what
the stages of a block are for; its processors work only where there is a block.

The constants are orders of magnitude of current GPUs, not fits: predictions choose between kernels, and say
where a plan leaves time on the table. They were never compared with a clock.
"""

from __future__ import annotations

import dataclasses

from .hardware import Gpu

_LAUNCH = 2e-6
"""Seconds from one kernel to the next on a stream."""
_LATENCY = 0.7e-6
"""Seconds until bytes from memory arrive."""
_LIBRARY_SHARE = 0.75
"""Of the tensor cores' rate, what cuBLAS reaches with large products."""
_LANES = 128
"""Of a processor."""
_CACHE_BYTES = 32
"""That a processor gets from the cache in a clock, with all of them at it."""
_NOT_HIDDEN = 0.1
_BLOCKS_OF_A_PROCESSOR = 8
_THREADS_OF_A_PROCESSOR = 1536


@dataclasses.dataclass(frozen=True)
class Work:
    """What a kernel does.

    Attributes:
        bytes: to and from memory.
        cached_bytes: from the cache, read by several blocks.
        operations: on tensor cores; a product and its addition are two.
        lane_operations: instructions of single lanes, beside those.
        blocks: that share it evenly.
        threads: of a block.
        shared_bytes: of a block.
        flying_bytes: that a block has asked for at any time.
    """

    bytes: float
    cached_bytes: float
    operations: float
    lane_operations: float
    blocks: int
    threads: int
    shared_bytes: int
    flying_bytes: int


def roofline(byte_count: float, operations: float, rate: float, gpu: Gpu) -> float:
    """Seconds at best."""
    return max(byte_count / gpu.bandwidth, operations / rate)


def seconds(work: Work, rate: float, gpu: Gpu) -> float:
    """Of a kernel whose warps multiply on tensor cores of this rate, without its launch."""
    resident = max(
        1,
        min(
            _BLOCKS_OF_A_PROCESSOR,
            _THREADS_OF_A_PROCESSOR // work.threads,
            gpu.shared_bytes // max(work.shared_bytes, 1),
        ),
    )
    at_once = min(work.blocks, gpu.processors * resident)
    bandwidth = min(gpu.bandwidth, at_once * work.flying_bytes / _LATENCY)
    by_cache = work.cached_bytes / (_CACHE_BYTES * gpu.clock * min(at_once, gpu.processors))
    rounds = -(-work.blocks // gpu.processors) / work.blocks
    by_cores = rounds * work.operations / (rate * gpu.warp_share / gpu.processors)
    by_lanes = rounds * work.lane_operations / (_LANES * gpu.clock)
    times = (work.bytes / bandwidth, by_cache, by_cores, by_lanes)
    return _LATENCY + max(times) + _NOT_HIDDEN * (sum(times) - max(times))


def launched(*kernels: float) -> float:
    """Seconds of kernels one behind the other."""
    return sum(kernels) + _LAUNCH * len(kernels)


def copied(byte_count: float, gpu: Gpu) -> float:
    """Seconds of a kernel that only moves bytes."""
    return _LATENCY + byte_count / gpu.bandwidth


def by_library(m: int, n: int, k: int, item_bytes: int, rate: float, gpu: Gpu) -> float:
    """Seconds of a dense product by cuBLAS."""
    byte_count = item_bytes * (m * k + k * n + m * n)
    return _LATENCY + max(byte_count / gpu.bandwidth, 2.0 * m * n * k / (rate * _LIBRARY_SHARE))
