"""Options of a pass as text and as YAML: one schema, the pass's dataclass fields.

Text of a value, inside ``name{option=value,...}``::

    value  :=  word | "quoted" | [value, ...] | {key=value, ...}
    word   :=  any run of characters without whitespace , = [ ] { } " '

A word is read by the field's type: ``128``, ``1e-3``, ``true``, ``none``, ``W4A16``, ``re:.*down_proj``.
Quoted text is always a string; inside quotes a backslash before a quote or a backslash is the only escape, so
that regular expressions need no doubled backslashes. Supported types: ``int float bool str None Path``,
enums, ``Literal``, unions, ``tuple``, ``list``, ``frozenset``, and mappings of them.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import enum
import functools
import pathlib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from ...ir.errors import PipelineError
from .base import Pass

_WORD = re.compile(r"""[^\s,=\[\]{}"']+""")
_QUOTED = re.compile(r""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*\'""", re.DOTALL)


class Word(str):
    """Unquoted text: what it means is decided by the type of the option it is given to."""

    __slots__ = ()


class MismatchError(Exception):
    """A value does not fit a type. Caught in this module and told with the pass and option it was for."""


class Scanner:
    """Reads pipeline text token by token; errors name the column and what was expected there."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    def skip_space(self) -> None:
        """Move past whitespace."""
        while self.position < len(self.text) and self.text[self.position].isspace():
            self.position += 1

    def accept(self, symbol: str) -> bool:
        """Consume ``symbol`` if it comes next."""
        self.skip_space()
        if not self.text.startswith(symbol, self.position):
            return False
        self.position += len(symbol)
        return True

    def word(self, expected: str) -> Word:
        """Consume a word; ``expected`` says in the error what it should have been."""
        self.skip_space()
        match = _WORD.match(self.text, self.position)
        if match is None:
            raise self.error(expected)
        self.position = match.end()
        return Word(match.group())

    def value(self) -> Any:
        """Consume a value: a `Word`, a plain (quoted) string, a list or a dict of values."""
        if self.accept("["):
            return self._items("]", self.value)
        if self.accept("{"):
            return self._entries()
        self.skip_space()
        match = _QUOTED.match(self.text, self.position)
        if match is None:
            return self.word("a value")
        self.position = match.end()
        quote = match.group()[0]
        return re.sub(rf"\\([\\{quote}])", r"\1", match.group()[1:-1])

    def options(self) -> dict[str, Any]:
        """Consume ``{key=value,...}`` if it comes next."""
        return self._entries() if self.accept("{") else {}

    def error(self, expected: str) -> PipelineError:
        """What was expected at the current column, and what is there."""
        found = repr(self.text[self.position]) if self.position < len(self.text) else "the end"
        return PipelineError(
            f"pipeline text {self.text!r}, column {self.position + 1}: expected {expected}, found {found}",
            hint='the form is "name,name{option=value,option=[a,b]}"; quote text with , = [ ] { } or spaces',
        )

    def _entries(self) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for key, value in self._items("}", self._entry):
            if key in entries:
                raise PipelineError(f"pipeline text {self.text!r}: {str(key)!r} is given twice")
            entries[key] = value
        return entries

    def _entry(self) -> tuple[str, Any]:
        self.skip_space()
        key = (
            self.value()
            if self.text[self.position : self.position + 1] in ("'", '"')
            else self.word("a name")
        )
        if not self.accept("="):
            raise self.error(f"'=' after {str(key)!r}")
        return key, self.value()

    def _items(self, end: str, item: typing.Callable[[], Any]) -> list[Any]:
        items: list[Any] = []
        if self.accept(end):
            return items
        while True:
            items.append(item())
            if self.accept(end):
                return items
            if not self.accept(","):
                raise self.error(f"',' or '{end}'")


def format_value(value: object) -> str:
    """The text that `Scanner.value` reads back as ``value``.

    A value of a type without text form (an array, a function) is written as its quoted ``repr``, for people:
    reading that back ends in a clear error about its type.
    """
    match value:
        case None:
            return "none"
        case bool():
            return "true" if value else "false"
        case enum.Enum():
            return format_value(value.value)
        case int() | float():
            return repr(value)
        case str() | pathlib.PurePath():
            return _format_string(str(value))
        case frozenset() | set():
            return f"[{','.join(sorted(format_value(item) for item in value))}]"
        case tuple() | list():
            return f"[{','.join(format_value(item) for item in value)}]"
        case collections.abc.Mapping():
            entries = (f"{_format_string(str(key))}={format_value(item)}" for key, item in value.items())
            return f"{{{','.join(entries)}}}"
    return _format_string(repr(value))


def _format_string(text: str) -> str:
    if _WORD.fullmatch(text) and not any(_fits(Word(text), kind) for kind in (int, float, bool, type(None))):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def plain_value(value: object) -> Any:
    """``value`` in the types that YAML and JSON have: enums, paths and tuples become text and lists."""
    match value:
        case enum.Enum():
            return plain_value(value.value)
        case None | bool() | int() | float() | str():
            return value
        case frozenset() | set():
            return sorted((plain_value(item) for item in value), key=repr)
        case tuple() | list():
            return [plain_value(item) for item in value]
        case collections.abc.Mapping():
            return {str(key): plain_value(item) for key, item in value.items()}
    return str(value) if isinstance(value, pathlib.PurePath) else repr(value)


def convert(value: object, annotation: Any) -> Any:
    """``value``, from text, YAML or Python, as the type that ``annotation`` asks for.

    Raises:
        MismatchError: it does not fit.
    """
    if annotation is Any or annotation is object:
        return plain_value(value)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Union or origin is types.UnionType:
        return _convert_union(value, arguments)
    if origin is Literal:
        return _convert_literal(value, arguments)
    if origin is not None and issubclass(origin, Mapping):
        return _convert_mapping(value, arguments)
    if origin is not None and issubclass(origin, collections.abc.Collection):
        return _convert_collection(value, origin, arguments)
    if annotation is None or annotation is type(None):
        return _convert_none(value)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return _convert_enum(value, annotation)
    if annotation in _SCALARS:
        return _SCALARS[annotation](value)
    if isinstance(annotation, type) and isinstance(value, annotation):
        return value
    raise MismatchError


def _fits(value: object, annotation: Any) -> bool:
    try:
        convert(value, annotation)
    except MismatchError:
        return False
    return True


def _convert_none(value: object) -> None:
    if value is None or (isinstance(value, Word) and value.lower() in ("none", "null")):
        return
    raise MismatchError


def _convert_bool(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, Word) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise MismatchError


def _convert_int(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, Word) and re.fullmatch(r"[+-]?\d+", value, re.ASCII):
        return int(value)
    raise MismatchError


def _convert_float(value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    # YAML 1.1 reads 1e-4 as a string; a float was asked for, so it is one.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise MismatchError from None
    raise MismatchError


def _convert_str(value: object) -> str:
    if isinstance(value, str):
        return str(value)
    raise MismatchError


def _convert_path(value: object) -> pathlib.Path:
    if isinstance(value, str | pathlib.PurePath):
        return pathlib.Path(value)
    raise MismatchError


_SCALARS: dict[Any, typing.Callable[[object], Any]] = {
    bool: _convert_bool,
    int: _convert_int,
    float: _convert_float,
    str: _convert_str,
    pathlib.Path: _convert_path,
}
# A word such as 8 or true in a union with str means the number or the truth value; text must be quoted.
# Lists come last: one word fits them too, as a list of one.
_UNION_ORDER = {type(None): 0, bool: 1, int: 2, float: 3, pathlib.Path: 8, str: 9}
_CHOICE_ORDER, _LIST_ORDER = 5, 10


def _convert_union(value: object, members: Iterable[Any]) -> Any:
    exact = [member for member in members if type(value) is member]
    for member in exact or sorted(members, key=_union_order):
        try:
            return convert(value, member)
        except MismatchError:
            continue
    raise MismatchError


def _union_order(member: Any) -> int:
    is_list = get_origin(member) not in (None, Literal)
    return _LIST_ORDER if is_list else _UNION_ORDER.get(member, _CHOICE_ORDER)


def _convert_literal(value: object, choices: Iterable[Any]) -> Any:
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return choice
    if isinstance(value, Word):
        for choice in choices:
            if _fits(value, type(choice)) and convert(value, type(choice)) == choice:
                return choice
    raise MismatchError


def _convert_enum(value: object, kind: type[enum.Enum]) -> enum.Enum:
    if isinstance(value, kind):
        return value
    for member in kind:
        if value == member.name or str(value) == str(member.value):
            return member
    raise MismatchError


def _convert_collection(value: object, origin: type, arguments: tuple[Any, ...]) -> Any:
    if isinstance(value, Mapping):
        raise MismatchError
    if isinstance(value, str) or not isinstance(value, collections.abc.Iterable):
        value = (value,)
    items = list(value)
    if origin is tuple and Ellipsis not in arguments:
        if len(items) != len(arguments):
            raise MismatchError
        return tuple(convert(item, member) for item, member in zip(items, arguments, strict=True))
    converted = [convert(item, arguments[0]) for item in items]
    return origin(converted) if origin in (list, frozenset, set) else tuple(converted)


def _convert_mapping(value: object, arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise MismatchError
    key_type, item_type = arguments
    return {
        convert(Word(key) if isinstance(key, str) else key, key_type): convert(item, item_type)
        for key, item in value.items()
    }


def allowed(annotation: Any) -> str:
    """What a type accepts, in words, for error messages and help."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Union or origin is types.UnionType:
        return " or ".join(allowed(member) for member in arguments)
    if origin is Literal:
        return f"one of {', '.join(format_value(choice) for choice in arguments)}"
    if origin is not None and issubclass(origin, Mapping):
        return f"a mapping of {allowed(arguments[0])} to {allowed(arguments[1])}"
    if origin is tuple and Ellipsis not in arguments:
        return f"[{', '.join(allowed(argument) for argument in arguments)}]"
    if origin is not None and issubclass(origin, collections.abc.Collection):
        return f"a list, each item {allowed(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return f"one of {', '.join(format_value(member) for member in annotation)}"
    return _WORDS_FOR.get(annotation, getattr(annotation, "__name__", str(annotation)))


_WORDS_FOR: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    pathlib.Path: "a path",
    type(None): "none",
    None: "none",
    Any: "anything",
}


@functools.cache
def option_types(kind: type[Pass]) -> Mapping[str, Any]:
    """The options of a pass class: field name → resolved annotation, in order of definition."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}


def build_pass(kind: type[Pass], options: Mapping[str, Any]) -> Pass:
    """A pass from its class and options given as text (`Scanner.options`) or as YAML data.

    Raises:
        PipelineError: an option is unknown, missing or of the wrong type, or the pass itself rejects it.
    """
    known = option_types(kind)
    for name in options:
        if name not in known:
            raise PipelineError(
                f"pass {kind.name!r} has no option {name!r}", hint=_suggest_option(kind, name, known)
            )
    arguments = {name: _convert_option(kind, name, value) for name, value in options.items()}
    missing = [
        field.name
        for field in dataclasses.fields(kind)
        if field.init
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and field.name not in arguments
    ]
    if missing:
        raise PipelineError(
            f"pass {kind.name!r} needs option {missing[0]!r}: {allowed(known[missing[0]])}",
            hint=f'write "{kind.name}{{{missing[0]}=...}}"',
        )
    try:
        return kind(**arguments)
    except (ValueError, TypeError) as error:
        raise PipelineError(f"pass {kind.name!r}: {error}") from error


def check_options(pass_: Pass) -> None:
    """Check the option values of a pass object made in Python against its fields' types.

    Raises:
        PipelineError: a value has the wrong type, such as ``ignore="lm_head"`` where a tuple is expected.
    """
    for name, annotation in option_types(type(pass_)).items():
        value = getattr(pass_, name)
        is_loose_string = isinstance(value, str) and not _accepts_string(annotation)
        if is_loose_string or not _fits(value, annotation):
            raise _wrong_type(type(pass_), name, annotation, value)


def format_pass(pass_: Pass) -> str:
    """One pass as text: its name and the options that differ from their defaults."""
    options = [f"{name}={format_value(value)}" for name, value in pass_.changed_options().items()]
    return f"{pass_.name}{{{','.join(options)}}}" if options else pass_.name


def _accepts_string(annotation: Any) -> bool:
    """Whether a Python string is itself a value of the type (not an item of a list of it)."""
    origin = get_origin(annotation)
    if origin is Union or origin is types.UnionType:
        return any(_accepts_string(member) for member in get_args(annotation))
    if origin is Literal:
        return True
    return origin is None and annotation is not float


def _convert_option(kind: type[Pass], name: str, value: object) -> Any:
    annotation = option_types(kind)[name]
    try:
        return convert(value, annotation)
    except MismatchError:
        raise _wrong_type(kind, name, annotation, value) from None


def _wrong_type(kind: type[Pass], name: str, annotation: Any, value: object) -> PipelineError:
    found = str(value) if isinstance(value, Word) else repr(value)
    return PipelineError(
        f"pass {kind.name!r}, option {name!r}: expected {allowed(annotation)}, found {found}",
        hint=f"`planish passes {kind.name}` describes the options",
    )


def _suggest_option(kind: type[Pass], name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    options = ", ".join(known)
    if close:
        return f"did you mean {close[0]!r}? options: {options}"
    return f"options: {options}" if options else "it takes no options"
