"""Count the rewrites inside a pass and stop after so many, so that bisection can go down to one rewrite.

The rewriting driver asks `current_limit` before it tries a rule and tells it every hit. Outside a
``with limit_rewrites(RewriteLimit(n)):`` block nothing is counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from contextvars import ContextVar


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """One application of one rule: the rule's name, and the name of the node that it started from."""

    rule: str
    node: str


@dataclasses.dataclass
class RewriteLimit:
    """How many rewrites may still happen, and which one happened last."""

    limit: int
    count: int = 0
    last: Rewrite | None = None

    @property
    def is_reached(self) -> bool:
        """Whether no further rewrite may happen."""
        return self.count >= self.limit

    def record(self, rule: str, node: str) -> None:
        """Note a rewrite that happened."""
        self.count += 1
        self.last = Rewrite(rule, node)


_limit: ContextVar[RewriteLimit | None] = ContextVar("rewrite_limit", default=None)


@contextlib.contextmanager
def limit_rewrites(limit: RewriteLimit) -> Iterator[None]:
    """Put ``limit`` in force inside the block; it counts the rewrites there."""
    token = _limit.set(limit)
    try:
        yield
    finally:
        _limit.reset(token)


def current_limit() -> RewriteLimit | None:
    """The innermost limit that is in force, if any."""
    return _limit.get()
