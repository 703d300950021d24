"""How often each rewrite of each pass was tried, hit, nearly hit, and how long that took."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator

import onnx_ir as ir
from rich.table import Table

from ..base import PassResult
from ..rewriter import MatchStatistics, RuleStatistics, match_statistics
from .base import Instrument, Invocation


class RewriteStatistics(Instrument):
    """Collects statistics of every rewrite rule; `table` shows them.

    Attributes:
        by_pass: for each pass (numbered label), the statistics of its rules by name.
    """

    def __init__(self) -> None:
        self.by_pass: dict[str, MatchStatistics] = {}

    @contextlib.contextmanager
    def around(self, invocation: Invocation) -> Iterator[None]:
        """Collect what the pass's rules do."""
        with match_statistics() as collected:
            self.by_pass[invocation.label] = collected
            yield

    def after(self, invocation: Invocation, model: ir.Model, result: PassResult) -> None:
        """Add what the pass counted by itself, for rewrites that are not rules."""
        del model
        collected = self.by_pass[invocation.label]
        for name, count in result.statistics.items():
            if name not in collected:
                collected[name] = RuleStatistics(hits=count)

    def table(self) -> Table:
        """One row for each rule that hit or nearly did, with its commonest reason for not hitting."""
        table = Table("pass", "rewrite", title="Rewrites", title_justify="left")
        for heading in ("hits", "tries", "ms"):
            table.add_column(heading, justify="right")
        table.add_column("nearly, but")
        for label, rules in self.by_pass.items():
            for name, row in sorted(rules.items(), key=lambda item: -item[1].hits):
                if row.hits or row.misses:
                    tries, ms = (str(row.tries), f"{row.seconds * 1e3:.1f}") if row.tries else ("", "")
                    table.add_row(label, name, str(row.hits), tries, ms, _commonest_miss(row))
        return table

    def __rich__(self) -> Table:
        return self.table()


def _commonest_miss(row: RuleStatistics) -> str:
    if not row.misses:
        return ""
    reasons = collections.Counter(row.misses.values()).most_common()
    reason, count = reasons[0]
    return f"{reason} ({count})" + (f" and {len(reasons) - 1} other reasons" if len(reasons) > 1 else "")
