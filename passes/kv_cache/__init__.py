"""Passes that make the key-value cache of a decoder smaller, or faster to read."""

from .center_cache import CenterCache
from .evict import Evict
from .group_queries import GroupQueries
from .kv_cache import KVCache
from .last_logits import LastLogits
from .raise_cache import RaiseCache
from .shrink_heads import ShrinkHeads
from .window import Window

__all__ = [
    "CenterCache",
    "Evict",
    "GroupQueries",
    "KVCache",
    "LastLogits",
    "RaiseCache",
    "ShrinkHeads",
    "Window",
]
