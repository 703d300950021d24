"""What a kernel of an op is, and choosing the fastest one by measurement."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import onnx_ir as ir

from ...ir import ops
from ...ir.errors import TargetError
from ...ir.graph_builder import CONTRIB, GraphBuilder
from ..microbenchmark import Candidate, Feeds, Measurement, Microbenchmark

OPSET = 23
IR_VERSION = 11
CHECKED_ROWS = 4
_TIE = 1.05
"""Times this close are not told apart: a kernel that is exact is then taken before one that is not."""
_ROUNDING = 1e-4
"""Relative error that float32 rounding explains; below it, and near the least error, a kernel is exact."""


class Op(Protocol):
    """An op with a choice of kernels: operands, and what its kernels' time depends on."""

    @property
    def inputs(self) -> Sequence[ir.Value]:
        """The operands that are not constant."""

    def subject(self) -> dict[str, object]:
        """All that the time of a kernel depends on but the rows; JSON."""

    def feeds(self, rows: int) -> Feeds:
        """Inputs of that many rows for a model of the op."""

    def label(self) -> str:
        """The op's name."""


OpT = TypeVar("OpT", bound=Op)


@dataclasses.dataclass(frozen=True)
class Kernel(Generic[OpT]):
    """One way to run an op.

    Attributes:
        name: as it appears in bindings.
        applies: whether the kernel takes this op.
        emit: appends the kernel's nodes to a builder and returns the result.
        session_options: onnxruntime configuration entries that it relies on.
    """

    name: str
    applies: Callable[[OpT], bool]
    emit: Callable[[GraphBuilder, OpT], ir.Value]
    session_options: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Choice(Generic[OpT]):
    """The kernel to bind, the measurement that speaks for it, and its geometric mean time over the rows."""

    kernel: Kernel[OpT]
    reason: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Chooser:
    """Chooses kernels for a deployment.

    Attributes:
        benchmark: measures.
        rows: the numbers of rows (batch × sequence) that the deployment runs; their geometric mean counts.
        max_error: kernels that differ more from the op's body (relative, Frobenius) are not used.
    """

    benchmark: Microbenchmark
    rows: tuple[int, ...]
    max_error: float

    def choose(
        self, op: OpT, kernels: Sequence[Kernel[OpT]], body: Kernel[OpT], baseline: str
    ) -> Choice[OpT]:
        """The fastest of ``kernels`` that applies to ``op``, a made-up op of the right size.

        Args:
            op: constants included; their values do not matter.
            kernels: in order of preference, should two take the same time.
            body: defines what is right.
            baseline: the name of the kernel that the reason compares with.

        Raises:
            TargetError: no kernel of this onnxruntime runs the op within ``max_error``.
        """
        applicable = {kernel.name: kernel for kernel in kernels if kernel.applies(op)}
        results = self.results(op, applicable, body)
        allowed = [name for name, result in results.items() if result.error <= self.max_error]
        if not allowed:
            found = ", ".join(f"{name}: {result.refusal or result.error}" for name, result in results.items())
            raise TargetError(
                f"onnxruntime-cpu: no kernel runs {op.label()} {op.subject()} within an error of "
                f"{self.max_error:g}; found {found or 'none that applies'}",
                hint="raise max_error, or take another scheme or float type",
            )
        fastest = min(results[name].seconds for name in allowed)
        exact = max(_ROUNDING, 2 * min(results[name].error for name in allowed))
        best = min(
            (name for name in allowed if results[name].seconds <= fastest * _TIE),
            key=lambda name: (results[name].error > exact, results[name].seconds),
        )
        where = f"at {', '.join(str(rows) for rows in self.rows)} rows"
        reason = _reason(best, baseline, where, results, allowed)
        return Choice(applicable[best], reason, results[best].seconds)

    def results(
        self, op: OpT, kernels: Mapping[str, Kernel[OpT]], body: Kernel[OpT]
    ) -> dict[str, Measurement]:
        """Each kernel's geometric mean time over the rows, and its largest error."""
        rounds = [self._measure(op, kernels, body, rows) for rows in self.rows]
        return {
            name: Measurement(
                _geometric_mean([measured[name].seconds for measured in rounds]),
                max(measured[name].error for measured in rounds),
                rounds[0][name].refusal,
            )
            for name in kernels
        }

    def _measure(
        self, op: OpT, kernels: Mapping[str, Kernel[OpT]], body: Kernel[OpT], rows: int
    ) -> dict[str, Measurement]:
        return self.benchmark.measure(
            {"op": op.label(), "rows": rows, **op.subject()},
            {name: functools.partial(_candidate, op, kernel) for name, kernel in kernels.items()},
            lambda: _candidate(op, body).model,
            lambda: op.feeds(rows),
            lambda: op.feeds(CHECKED_ROWS),
        )


def _reason(
    best: str, baseline: str, where: str, results: Mapping[str, Measurement], allowed: Sequence[str]
) -> str:
    """Why ``best`` was chosen: its time relative to the baseline, and what was ruled out."""
    chosen = results[best]
    others = sorted((name for name in allowed if name != best), key=lambda name: results[name].seconds)
    if not others:
        text = f"the only kernel {where}"
    elif best == baseline or baseline not in allowed:
        ratio = results[others[0]].seconds / chosen.seconds
        text = f"no other kernel beats it {where}: the next, {others[0]}, takes {ratio:.2f} × as long"
    else:
        ratio = chosen.seconds / results[baseline].seconds
        text = f"{ratio:.2f} × the time of {baseline} {where}, error {chosen.error:.1e}"
    for name, result in results.items():
        if result.refusal:
            text += f"; onnxruntime refuses {name}: {result.refusal}"
        elif name not in allowed and result.seconds < chosen.seconds:
            text += f"; {name} is faster, but its error on this machine is {result.error:.1e}"
    return text


def _geometric_mean(values: Sequence[float]) -> float:
    if any(math.isinf(value) for value in values):
        return math.inf
    return math.exp(sum(math.log(value) for value in values) / len(values))


def _candidate(op: OpT, kernel: Kernel[OpT]) -> Candidate:
    """A model of ``op`` alone, run by ``kernel``."""
    build = GraphBuilder("op")
    result = kernel.emit(build, op)
    result.name = "result"
    used = {value for node in build.nodes for value in node.inputs if value is not None}
    constants = [value for value in used if value.const_value is not None]
    # Fresh values for the operands: a value belongs to one graph, and each candidate is a graph of its own.
    own = {
        value: ir.Value(name=value.name, shape=value.shape, type=value.type, const_value=value.const_value)
        for value in (*op.inputs, *constants)
    }
    for node in build.nodes:
        for index, value in enumerate(node.inputs):
            if value in own:
                node.replace_input_with(index, own[value])
    graph = ir.Graph(
        [own[value] for value in op.inputs],
        [result],
        nodes=build.nodes,
        initializers=[own[value] for value in constants],
        opset_imports={"": OPSET, CONTRIB: 1},
        name="candidate",
    )
    model = ir.Model(graph, ir_version=IR_VERSION)
    for definition in build.definitions:
        ops.define(model, definition)
    if build.definitions:
        ops.inline(model)
    return Candidate(model, kernel.session_options)
