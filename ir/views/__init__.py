"""Views: what a pass asks about a model, whichever way its graph spells it.

Each view is one pass over the graph that changes nothing and keeps nothing: make it again after a change.
They look at the main graph, and expect the canonical form with shapes inferred; what they do not recognise is
left out.
"""

from .attention import AttentionBlock, attentions
from .blocks import Block, blocks
from .convolutions import Convolution, convolutions
from .linears import Linear, linears
from .norms import Norm, norms
from .shared_inputs import SharedInput, shared_inputs

__all__ = [
    "AttentionBlock",
    "Block",
    "Convolution",
    "Linear",
    "Norm",
    "SharedInput",
    "attentions",
    "blocks",
    "convolutions",
    "linears",
    "norms",
    "shared_inputs",
]
