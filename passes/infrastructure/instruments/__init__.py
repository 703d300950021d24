"""What runs around the passes of a pipeline: checks, measurements, dumps, progress."""

from .base import Instrument, Invocation
from .contract import ContractBrokenError, ContractCheck
from .diff import PrintDiff
from .dump import DumpAfterEachPass
from .latency import LatencyAfterEachPass
from .limit import BisectLimit
from .outline import OutlineBefore
from .progress import ProgressBars
from .reproducer import CrashReproducer
from .statistics import RewriteStatistics
from .time_and_memory import TimeAndMemory, peak_memory_bytes
from .verify import VerifyAfterEachPass

__all__ = [
    "BisectLimit",
    "ContractBrokenError",
    "ContractCheck",
    "CrashReproducer",
    "DumpAfterEachPass",
    "Instrument",
    "Invocation",
    "LatencyAfterEachPass",
    "OutlineBefore",
    "PrintDiff",
    "ProgressBars",
    "RewriteStatistics",
    "TimeAndMemory",
    "VerifyAfterEachPass",
    "peak_memory_bytes",
]
