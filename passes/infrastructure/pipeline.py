"""Pipelines: an ordered list of passes, as Python objects, as one line of text, or as YAML.

Text: ``canonicalize,fuse,quantize{scheme=W4A16,group_size=128,ignore=[lm_head,re:.*down_proj]}``.

YAML (``recipe.yaml``): a list whose items are names, or one name with its options::

    - canonicalize
    - quantize: {scheme: W4A16, group_size: 128}

Both forms leave out options that have their default, and both read back to an equal pipeline.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import onnx_ir as ir
import yaml

from ...ir.errors import PipelineError
from . import foreign, registry
from .base import Fact, Pass
from .facts import check_order
from .options import Scanner, build_pass, check_options, format_pass, plain_value


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """An ordered list of passes. ``str()`` is its text form."""

    passes: tuple[Pass, ...]

    @classmethod
    def of(cls, passes: Any) -> Pipeline:
        """A pipeline from whatever names passes.

        Args:
            passes: pipeline text, the path (`pathlib.Path`) of a YAML recipe, a pass object or class, an
                `onnx_ir` pass, another pipeline, a name with options
                (``{"quantize": {"scheme": "W8A8"}}``), or a list that mixes those.

        Raises:
            PipelineError: a name or option is unknown, a value has the wrong type, or an item is no pass.
        """
        return cls(tuple(_collect(passes)))

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """A pipeline from its text form; empty text is the empty pipeline."""
        scanner = Scanner(text)
        passes: list[Pass] = []
        scanner.skip_space()
        if scanner.position == len(text):
            return cls(())
        while True:
            name = scanner.word("the name of a pass")
            passes.append(registry.build(name, scanner.options()))
            scanner.skip_space()
            if scanner.position == len(text):
                return cls(tuple(passes))
            if not scanner.accept(","):
                raise scanner.error("',' or the end")

    @classmethod
    def from_yaml(cls, text: str) -> Pipeline:
        """A pipeline from the text of a YAML recipe."""
        try:
            items = yaml.safe_load(text)
        except yaml.YAMLError as error:
            problem = " ".join(str(error).split())
            raise PipelineError(f"the recipe is not YAML: {problem}", hint=_RECIPE_FORM) from error
        if items is None:
            return cls(())
        if not isinstance(items, list):
            raise PipelineError(f"recipe: expected a list, found {type(items).__name__}", hint=_RECIPE_FORM)
        return cls(tuple(_from_recipe_item(item, number) for number, item in enumerate(items, start=1)))

    def to_yaml(self) -> str:
        """The recipe that `from_yaml` reads back to an equal pipeline."""
        items: list[Any] = []
        for pass_ in self.passes:
            options = {name: plain_value(value) for name, value in pass_.changed_options().items()}
            items.append({pass_.name: options} if options else pass_.name)
        return str(yaml.safe_dump(items, sort_keys=False, allow_unicode=True))

    def check_legal(self, facts: frozenset[Fact] = frozenset()) -> None:
        """Check the order of the passes against what they require, establish, destroy and forbid.

        Raises:
            PipelineError: with the pass, the fact, who establishes it, and a corrected pipeline.
        """
        check_order(self.passes, facts)

    def __str__(self) -> str:
        return ",".join(format_pass(pass_) for pass_ in self.passes)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)


_RECIPE_FORM = 'the form is "- canonicalize" and "- quantize: {scheme: W4A16}", one line for each pass'


def _collect(passes: Any) -> Iterator[Pass]:
    match passes:
        case str():
            yield from Pipeline.parse(passes)
        case pathlib.Path():
            yield from Pipeline.from_yaml(_read(passes))
        case Pass():
            check_options(passes)
            yield passes
        case ir.passes.PassBase():
            yield foreign.adapt(passes)
        case type() if issubclass(passes, Pass):
            yield build_pass(passes, {})
        case Mapping():
            yield _from_recipe_item(dict(passes), 1)
        case Iterable():
            for item in passes:
                yield from _collect(item)
        case _:
            raise PipelineError(
                f"expected a pass, its name or pipeline text, found {passes!r} ({type(passes).__name__})",
                hint="`planish passes` lists the passes",
            )


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PipelineError(f"recipe {str(path)!r} cannot be read: {error}") from error


def _from_recipe_item(item: Any, number: int) -> Pass:
    match item:
        case str():
            return registry.build(item, {})
        case dict() if len(item) == 1:
            (name, options), *_ = item.items()
            if isinstance(name, str) and (options is None or isinstance(options, Mapping)):
                return registry.build(name, {str(key): value for key, value in (options or {}).items()})
    raise PipelineError(
        f"recipe, item {number}: expected the name of a pass, found {item!r}", hint=_RECIPE_FORM
    )
