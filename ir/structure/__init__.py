"""Structures that can be pruned: finding them, and removing them physically.

`discover` finds the groups of channels and heads that must go together, and the branches of the residual
stream; `shrink` and `drop` remove them, so that no mask is left.
"""

from .discover import discover
from .drop import drop
from .groups import ChannelGroup, Choice, Member, ResidualModule, Structure, Unprunable, new_weights
from .modules import layers_of
from .shrink import shrink

__all__ = [
    "ChannelGroup",
    "Choice",
    "Member",
    "ResidualModule",
    "Structure",
    "Unprunable",
    "discover",
    "drop",
    "layers_of",
    "new_weights",
    "shrink",
]
