"""The page of planish's own ops: what each computes, and the standard ops that say so."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import planish.ir.ops
from planish.ir.ops import OpDefinition

from .docstring import blocks, markdown, table

_INTRODUCTION = """\
A compressed operation is an ONNX *function* in the domain `planish`. Its body, in standard ops, is its
meaning: a runtime that inlines functions runs it, and a target may bind it to a faster kernel, which is
tested against the body. An op has *overloads*, bodies for different ways to store the same thing."""


def page() -> str:
    """One section for each op."""
    return blocks("# The planish ops", _INTRODUCTION, *map(_section, modules()))


def modules() -> list[ModuleType]:
    """The modules that define an op each."""
    package = planish.ir.ops
    found = [
        importlib.import_module(f"{package.__name__}.{one.name}")
        for one in pkgutil.iter_modules(package.__path__)
    ]
    return [module for module in found if hasattr(module, "OP_TYPE")]


def _section(module: ModuleType) -> str:
    title, _, text = markdown(module.__doc__).partition("\n\n")
    overloads: list[OpDefinition] = list(module.DEFINITIONS.values())
    rows = [(f"`{one.overload or 'plain'}`", f"`{' '.join(one.signature.split())}`") for one in overloads]
    return blocks(
        f"## {module.OP_TYPE}",
        " ".join(title.split()),
        text,
        table(("overload", "signature"), rows),
        _body(overloads[0]),
    )


def _body(definition: OpDefinition) -> str:
    """The body, folded away: an admonition's text is indented by four."""
    lines = [f"    {line.strip()}" for line in definition.body.strip().splitlines()]
    name = f"the overload `{definition.overload}`" if definition.overload else "the plain overload"
    return "\n".join([f'??? note "The body of {name}"', "", "    ```text", *lines, "    ```"])
