"""onnx_ir's own passes in a planish pipeline, as they are.

Any `onnx_ir.passes.PassBase` instance becomes a `Pass` whose name is its class's name. It promises what
onnx_ir's passes promise: the model computes the same function (`Contract.EXACT`). Its options are the
parameters of its constructor that it keeps under the same name, so that those of `onnx_ir.passes.common` have
a text form:
``CommonSubexpressionEliminationPass{size_limit=100}``.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Mapping
from typing import Any, ClassVar

import onnx_ir as ir
from onnx_ir.passes import common

from ...ir.errors import PipelineError
from .base import Pass, PassContext, PassResult
from .options import MismatchError, allowed, convert


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class OnnxIrPass(Pass):
    """A pass of onnx_ir, run as it is. `adapt` makes one subclass for each class of onnx_ir pass."""

    name: ClassVar[str] = "onnx_ir"
    inner_kind: ClassVar[type[ir.passes.PassBase]]

    inner: ir.passes.PassBase

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        """Run the pass; a functional one's result is moved into ``model``."""
        del ctx
        result = self.inner(model)
        if result.model is not model:
            _move(result.model, model)
        return PassResult(modified=result.modified)

    def changed_options(self) -> dict[str, Any]:
        """The constructor parameters whose values differ from their defaults."""
        parameters = constructor_parameters(self.inner_kind)
        return {
            name: getattr(self.inner, name)
            for name, parameter in parameters.items()
            if hasattr(self.inner, name) and getattr(self.inner, name) != parameter.default
        }

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.changed_options() == other.changed_options()

    def __hash__(self) -> int:
        return hash(type(self))


def adapt(inner: ir.passes.PassBase) -> OnnxIrPass:
    """A planish pass that runs an onnx_ir pass."""
    return _adapter(type(inner))(inner=inner)


def build(name: str, options: Mapping[str, Any]) -> OnnxIrPass | None:
    """The pass of `onnx_ir.passes.common` of that name, with options as text or YAML data; None if none is.

    Raises:
        PipelineError: an option is unknown or has the wrong type.
    """
    if name not in common.__all__:
        return None
    kind: type[ir.passes.PassBase] = getattr(common, name)
    parameters = constructor_parameters(kind)
    hints = typing.get_type_hints(kind.__init__)
    arguments: dict[str, Any] = {}
    for option, value in options.items():
        if option not in parameters:
            raise PipelineError(
                f"pass {name!r} has no option {option!r}",
                hint=f"options: {', '.join(parameters)}" if parameters else "it takes no options",
            )
        try:
            arguments[option] = convert(value, hints[option])
        except MismatchError:
            raise PipelineError(
                f"pass {name!r}, option {option!r}: expected {allowed(hints[option])}, found {value}"
            ) from None
    return adapt(kind(**arguments))


def constructor_parameters(kind: type[ir.passes.PassBase]) -> dict[str, inspect.Parameter]:
    """The named parameters of an onnx_ir pass's constructor."""
    return {
        name: parameter
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


@functools.cache
def _adapter(kind: type[ir.passes.PassBase]) -> type[OnnxIrPass]:
    return type(
        kind.__name__, (OnnxIrPass,), {"name": kind.__name__, "inner_kind": kind, "__doc__": kind.__doc__}
    )


def _move(source: ir.Model, target: ir.Model) -> None:
    """Make ``target`` hold what ``source`` holds; both keep their identity."""
    target.graph = source.graph
    target.functions.clear()
    target.functions.update(source.functions)
    target.ir_version = source.ir_version
    target.metadata_props.clear()
    target.metadata_props.update(source.metadata_props)
