"""How 2SSP divides a sparsity between FFN widths and attention modules.

With N attention modules of P_attn weights each and FFNs of P_mlp weights each, of a sparsity s

    N_attn = round(N · s^((P_mlp / P_attn) / α)),      α = 1.5

attention modules go, and the rest of the budget s · (all weights) comes from the FFNs: from each the same
share of its neurons. The larger FFNs are, the later attention goes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What can go.

    Attributes:
        attention: weights of each attention module.
        droppable: how many of them can go together.
        ffn: weights of each FFN that go with its neurons, by group name.
        neurons: of each FFN, by group name.
    """

    attention: tuple[int, ...]
    droppable: int
    ffn: Mapping[str, int]
    neurons: Mapping[str, int]

    @property
    def total(self) -> int:
        """Weights of all attention modules and FFNs."""
        return sum(self.attention) + sum(self.ffn.values())


@dataclasses.dataclass(frozen=True)
class Plan:
    """How many attention modules go, and how many neurons of each FFN stay, by group name."""

    attention: int
    widths: Mapping[str, int]

    def sparsity(self, sizes: Sizes) -> float:
        """The share of the weights that goes, if all attention modules are equally large."""
        left = sum(sizes.ffn[name] * width / sizes.neurons[name] for name, width in self.widths.items())
        attention = sum(sizes.attention)
        gone = attention * self.attention / max(len(sizes.attention), 1) + sum(sizes.ffn.values()) - left
        return gone / sizes.total


def attention_count(sparsity: float, sizes: Sizes, alpha: float) -> int:
    """N_attn of the formula."""
    count = len(sizes.attention)
    if not count:
        return 0
    ratio = (sum(sizes.ffn.values()) / len(sizes.ffn)) / (sum(sizes.attention) / count)
    return round(count * float(sparsity ** (ratio / alpha)))


def make_plan(sparsity: float, sizes: Sizes, *, alpha: float, multiple: int) -> Plan:
    """The plan for a sparsity; where it asks for more than there is, what comes nearest.

    As many attention modules go as the formula says; fewer where that alone would be more than the budget,
    more where the FFNs have no more to give.

    Args:
        sparsity: the share of the weights that goes, 0 to 1.
        sizes: what there is.
        alpha: of the formula.
        multiple: FFN widths become multiples of it, or stay as they are; one multiple stays at least.
    """
    smallest = {name: min(multiple, count) for name, count in sizes.neurons.items()}
    ffn = sum(sizes.ffn.values())
    available = ffn - sum(sizes.ffn[name] * least / sizes.neurons[name] for name, least in smallest.items())
    budget, number, each = sparsity * sizes.total, 0, 0.0
    if sizes.attention:
        each = sum(sizes.attention) / len(sizes.attention)
        most, least = math.floor(budget / each), math.ceil((budget - available) / each)
        number = min(max(min(attention_count(sparsity, sizes, alpha), most), least), sizes.droppable)
    share = min(max((budget - number * each) / ffn, 0.0), 1.0)
    widths = {
        name: max(_rounded(count * (1 - share), multiple, count), smallest[name])
        for name, count in sizes.neurons.items()
    }
    return Plan(number, widths)


def _rounded(width: float, multiple: int, most: int) -> int:
    """The nearest multiple, or ``most`` where that is nearer."""
    lower = math.floor(width / multiple) * multiple
    upper = min(lower + multiple, most)
    return lower if width - lower < upper - width else upper
