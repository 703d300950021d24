"""The policies of eviction, one file each."""

from __future__ import annotations

from collections.abc import Mapping

from .expected_attention import EXPECTED_ATTENTION
from .h2o import H2O
from .keydiff import KEYDIFF
from .knorm import KNORM
from .policy import ALL, OP_TYPE, Policy
from .random import RANDOM
from .recent import RECENT
from .snapkv import SNAPKV
from .tova import TOVA

__all__ = ["ALL", "OP_TYPE", "POLICIES", "Policy"]

POLICIES: Mapping[str, Policy] = {
    policy.name: policy for policy in (RANDOM, RECENT, KNORM, KEYDIFF, SNAPKV, TOVA, H2O, EXPECTED_ATTENTION)
}
