"""At which sizes prunable groups are looked at: the grid of database, latency table and search."""

from __future__ import annotations

import itertools

_ONE_BY_ONE = "attention"


def level_counts(
    structures: int, *, kind: str, factor: float = 0.9, smallest: float = 0.01, multiple: int = 1
) -> list[int]:
    """How many structures are kept at each level, descending; the first level is the dense one.

    Heads (and groups of heads that share keys and values) go one by one; other structures geometrically, as
    in ZipLM (Kurtic et al., 2023): 3072 channels with the defaults are 3072, 2765, 2488, …, 37, 33.

    Args:
        structures: of the group, at least 1.
        kind: of the group: "attention" for heads.
        factor: of one level's density to the one before, between 0 and 1.
        smallest: densities down to this one are levels.
        multiple: what counts are rounded to a multiple of, except for the dense one.
    """
    if kind == _ONE_BY_ONE:
        return list(range(structures, 0, -1))
    counts = {structures}
    for power in itertools.count(1):
        density = factor**power
        if density <= smallest:
            break
        count = max(multiple, multiple * round(structures * density / multiple))
        counts.add(min(count, structures))
    return sorted(counts, reverse=True)
