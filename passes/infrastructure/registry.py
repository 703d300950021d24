"""The passes that exist: found by entry points, planish's own and plug-ins' alike.

A distribution adds a pass by an entry point in the group ``planish.passes``::

    [project.entry-points."planish.passes"]
    my-pass = "my_package.my_module:MyPass"

Nothing is imported before it is asked for.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib.metadata
import inspect
import re
import textwrap
from collections.abc import Mapping
from typing import Any

from onnx_ir.passes import common

from ...ir.errors import PipelineError
from . import foreign
from .base import Contract, Fact, Pass
from .options import allowed, build_pass, format_value, option_types

GROUP = "planish.passes"


def available() -> tuple[str, ...]:
    """Names of all passes that are installed, planish's own and plug-ins', sorted."""
    return tuple(sorted(_entry_points()))


def find(name: str) -> type[Pass]:
    """The pass class of that name.

    Raises:
        PipelineError: there is none (with the closest name), or its plug-in cannot be loaded.
    """
    entry = _entry_points().get(name)
    if entry is None:
        raise PipelineError(f"unknown pass {name!r}", hint=_suggest(name))
    try:
        kind = entry.load()
    except (ImportError, AttributeError) as error:
        raise PipelineError(
            f"pass {name!r} cannot be loaded from {entry.value!r}: {error}",
            hint="reinstall the package that provides it",
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Pass) and dataclasses.is_dataclass(kind)):
        raise PipelineError(f"entry point {name!r} ({entry.value}) is not a planish Pass dataclass: {kind!r}")
    if kind.name != name:
        raise PipelineError(
            f"entry point {name!r} ({entry.value}) loads a pass that calls itself {kind.name!r}",
            hint="the two names must agree, so that a pipeline's text can be read back",
        )
    return kind


def build(name: str, options: Mapping[str, Any]) -> Pass:
    """A pass by name, with its options given as text or YAML data.

    Raises:
        PipelineError: the name or an option is unknown, or an option has the wrong type.
    """
    return foreign.build(name, options) or build_pass(find(name), options)


def establishing(fact: Fact) -> str | None:
    """Name of an installed pass that establishes ``fact``, planish's own first; None if there is none."""
    for name in sorted(_entry_points(), key=lambda name: (not _is_own(name), name)):
        try:
            kind = find(name)
        except PipelineError:
            continue  # this only looks for a suggestion: a broken plug-in cannot be one
        if fact in kind.establishes and fact not in kind.requires:
            return name
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptionDescription:
    """One option of a pass: its name, what it accepts, its default as text (None: required), what it does."""

    name: str
    accepts: str
    default: str | None
    doc: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassDescription:
    """What `planish passes` prints about a pass."""

    name: str
    summary: str
    doc: str
    contract: Contract
    requires: frozenset[Fact]
    establishes: frozenset[Fact]
    destroys: frozenset[Fact]
    forbids: frozenset[Fact]
    options: tuple[OptionDescription, ...]


def describe(kind: type[Pass]) -> PassDescription:
    """Everything a user needs in order to put a pass into a pipeline."""
    doc = inspect.cleandoc(kind.__doc__ or "")
    return PassDescription(
        name=kind.name,
        summary=_plain(doc.split("\n\n")[0]),
        doc=doc,
        contract=kind.contract,
        requires=kind.requires,
        establishes=kind.establishes,
        destroys=kind.destroys,
        forbids=kind.forbids,
        options=_describe_options(kind),
    )


def _describe_options(kind: type[Pass]) -> tuple[OptionDescription, ...]:
    docs = _field_docs(kind)
    types = option_types(kind)
    return tuple(
        OptionDescription(
            name=field.name,
            accepts=allowed(types[field.name]),
            default=_default_text(field),
            doc=docs.get(field.name, ""),
        )
        for field in dataclasses.fields(kind)
        if field.init
    )


def _default_text(field: dataclasses.Field[Any]) -> str | None:
    if field.default_factory is not dataclasses.MISSING:
        return format_value(field.default_factory())
    return None if field.default is dataclasses.MISSING else format_value(field.default)


def _field_docs(kind: type[Pass]) -> dict[str, str]:
    """What is written about each field: the string below it, or its line in the docstring's sections."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        docs.update(_section_docs(inspect.cleandoc(base.__doc__ or "")))
        docs.update(_attribute_docs(base))
    return docs


def _attribute_docs(kind: type) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(kind))
    except (OSError, TypeError):  # no source at hand: a class made at run time
        return {}
    definition = ast.parse(source).body[0]
    if not isinstance(definition, ast.ClassDef):
        return {}
    docs: dict[str, str] = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = _plain(text)
    return docs


_SECTION = re.compile(r"^(?:Args|Attributes|Options):\n((?:[ \t]+.*\n?|\n)+)", re.MULTILINE)
_ENTRY = re.compile(r"^(\w+)(?: \([^)]*\))?:[ \n]((?:.*\n?)(?:[ \t]+.*\n?)*)", re.MULTILINE)


def _section_docs(doc: str) -> dict[str, str]:
    return {
        name: _plain(text)
        for section in _SECTION.findall(doc)
        for name, text in _ENTRY.findall(textwrap.dedent(section))
    }


def _plain(text: str) -> str:
    """Docstring text as one line for a terminal, without the marks of code."""
    return " ".join(text.replace("``", "").split())


@functools.cache  # reading every installed distribution's metadata takes tens of milliseconds
def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}


def _is_own(name: str) -> bool:
    return _entry_points()[name].value.startswith("planish.")


def _suggest(name: str) -> str:
    names = [*available(), *common.__all__]
    close = difflib.get_close_matches(name, names, n=1)
    listed = f"`planish passes` lists them: {', '.join(available())}"
    return f"did you mean {close[0]!r}? {listed}" if close else listed
