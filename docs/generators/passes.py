"""A page for every pass that comes with planish, and one that lists them."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from types import ModuleType

from planish.passes.infrastructure import registry
from planish.passes.infrastructure.base import Contract, Fact, Pass
from planish.passes.infrastructure.registry import OptionDescription, PassDescription

from .docstring import blocks, code, markdown, table

FAMILIES: dict[str, tuple[str, ...]] = {
    "Form": ("canonicalize", "fuse", "last-logits"),
    "Pruning and training": ("prune", "drop-blocks", "two-stage", "distill", "sparsify"),
    "Before quantising": ("fold-norms", "rotate", "scale", "allocate"),
    "Quantising": ("quantize",),
    "Key-value cache": (
        "raise-cache",
        "kv-cache",
        "center-cache",
        "window",
        "evict",
        "shrink-heads",
        "group-queries",
    ),
}
"""The order of the pages. A pass that no family names comes last, under `OTHERS`."""
OTHERS = "Others"

_STEPS = frozenset({"canonicalize", "fuse"})
"""Passes whose own module only lists steps: what they do is written in the modules of these."""

_INTRODUCTION = """\
Every pass has a page with what it does to the graph, what it asks of it, and its options; `planish passes`
prints the same. [Choosing](../choosing.md) says which to take.

*Exact* passes leave the function as it is, to rounding; *approximate* ones change it on purpose, and report
by how much. `check="contract"` checks both claims on real inputs."""


def own_passes() -> list[str]:
    """Names of the passes that come with planish; other distributions may have added more."""
    return [name for name in registry.available() if registry.find(name).__module__.startswith("planish.")]


def families() -> dict[str, list[str]]:
    """The passes by what they are for."""
    names = own_passes()
    known = {name for family in FAMILIES.values() for name in family}
    grouped = {title: [name for name in family if name in names] for title, family in FAMILIES.items()}
    return grouped | ({OTHERS: others} if (others := [name for name in names if name not in known]) else {})


def pages() -> dict[str, str]:
    """The overview and the page of each pass, by path."""
    return {
        "passes/index.md": _overview(),
        **{f"passes/{name}.md": _page(registry.find(name)) for name in own_passes()},
    }


def _overview() -> str:
    parts = ["# Passes", _INTRODUCTION]
    for title, names in families().items():
        rows = [_overview_row(registry.describe(registry.find(name))) for name in names]
        parts += [f"## {title}", table(("pass", "", "needs", "what it does"), rows)]
    return blocks(*parts)


def _overview_row(description: PassDescription) -> tuple[str, ...]:
    name = description.name
    return (
        f"[`{name}`]({name}.md)",
        description.contract.value,
        _facts(description.requires),
        markdown(description.doc).split("\n\n")[0],
    )


def _page(kind: type[Pass]) -> str:
    description = registry.describe(kind)
    module = inspect.getmodule(kind)
    assert module is not None
    summary, _, more = markdown(description.doc).partition("\n\n")
    about = markdown(module.__doc__) if description.name not in _STEPS else ""
    return blocks(
        f"# {description.name}",
        _linked(summary, description.name),
        _linked(more, description.name),
        _contract(kind, description),
        "## What it does" if about else "",
        _linked(about, description.name),
        _options(description),
        _parts(module, description.name),
    )


def _contract(kind: type[Pass], description: PassDescription) -> str:
    promise = "approximate: the error that it causes is measured and reported"
    if description.contract is Contract.EXACT:
        promise = f"exact: outputs stay within {kind.tolerance:g} of their largest value"
    rows = [
        ("contract", promise),
        ("needs", _facts(description.requires) or "nothing"),
        ("establishes", _facts(description.establishes)),
        ("ends", _facts(description.destroys)),
        ("must not come after", ", ".join(_establisher(fact) for fact in _sorted(description.forbids))),
        ("compares with the model before the pipeline", "yes" if kind.uses_original else ""),
    ]
    return table(("", ""), [(f"**{left}**", right) for left, right in rows if right])


def _options(description: PassDescription) -> str:
    if not description.options:
        return blocks("## Options", "It has none.")
    rows = [(f"`{one.name}`", one.accepts, _default(one), code(one.doc)) for one in description.options]
    return blocks(
        "## Options",
        f"In a pipeline they are written behind the name: `{description.name}{{option=value}}`.",
        table(("option", "takes", "default", "what it is"), rows),
    )


def _default(option: OptionDescription) -> str:
    return "**must be given**" if option.default is None else f"`{option.default}`"


def _facts(facts: frozenset[Fact]) -> str:
    return ", ".join(f"[{fact.value}](../ir.md#{fact.value})" for fact in _sorted(facts))


def _sorted(facts: frozenset[Fact]) -> list[Fact]:
    return sorted(facts, key=lambda fact: fact.value)


def _establisher(fact: Fact) -> str:
    name = registry.establishing(fact)
    return f"[`{name}`]({name}.md)" if name else fact.value


def _parts(module: ModuleType, name: str) -> str:
    """The docstrings of the modules beside it that its own docstring speaks of, or whose steps it runs."""
    parts = ["## Its steps" if name in _STEPS else "## In detail"]
    for part in _neighbours(module, every_import=name in _STEPS):
        title, _, text = markdown(part.__doc__).partition("\n\n")
        heading = part.__name__.rpartition(".")[2].replace("_", " ").capitalize()
        parts += [f"### {heading}", _linked(_one_line(title), name), _linked(text, name)]
    return blocks(*parts) if len(parts) > 1 else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _neighbours(module: ModuleType, *, every_import: bool) -> list[ModuleType]:
    package = module.__name__.rpartition(".")[0]
    mentioned = re.findall(r"(?<!`)`(\w+)`(?!`)", module.__doc__ or "")
    names = _imported(module) if every_import else dict.fromkeys(mentioned)
    found = [
        importlib.import_module(f"{package}.{name}")
        for name in names
        if name != module.__name__.rpartition(".")[2] and importlib.util.find_spec(f"{package}.{name}")
    ]
    return [part for part in found if not every_import or "\n    " in (part.__doc__ or "")]


def _imported(module: ModuleType) -> dict[str, None]:
    """Modules beside it that a module imports, in order."""
    tree = ast.parse(inspect.getsource(module))
    names: dict[str, None] = {}
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom) and statement.level == 1:
            wanted = [statement.module] if statement.module else [alias.name for alias in statement.names]
            names |= dict.fromkeys(wanted)
    return names


def _linked(text: str, page: str) -> str:
    """Names of passes in prose become links to their pages."""
    lines = text.split("\n")
    return "\n".join(line if line.startswith("    ") else _link_line(line, page) for line in lines)


def _link_line(line: str, page: str) -> str:
    def link(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"[`{name}`]({name}.md)" if name in own_passes() and name != page else match.group()

    return re.sub(r"`([a-z0-9-]+)`", link, line)
