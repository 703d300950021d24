"""The page of the command line: every command as its own ``--help`` describes it."""

from __future__ import annotations

import functools
from typing import Any

import typer
from planish import cli

from .docstring import blocks, table

_INTRODUCTION = """\
`planish COMMAND --help` prints what is on this page. Errors are one line; the exit code is 0 when all went
well, 1 for an error of planish or of what it was given, 2 for wrong usage and 130 for Ctrl-C.
[Troubleshooting](troubleshooting.md) lists the errors."""


def page() -> str:
    """One section for each command, groups of commands one level down."""
    root = typer.main.get_command(cli.app)
    sections = [
        _section(f"planish {name}", command, "##") for name, command in sorted(_commands(root).items())
    ]
    options = table(("option", "takes", "default", "what it is"), [_row(one) for one in root.params])
    return blocks("# Command line", _INTRODUCTION, "Before the command:", options, *sections)


def _commands(group: Any) -> dict[str, Any]:
    return {name: command for name, command in group.commands.items() if not command.hidden}


def _section(words: str, command: Any, level: str) -> str:
    if hasattr(command, "commands"):
        inner = [
            _section(f"{words} {name}", one, level + "#") for name, one in sorted(_commands(command).items())
        ]
        return blocks(f"{level} {words}", command.help or "", *inner)
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option"]
    return blocks(
        f"{level} {words}",
        _fenced(command.help or ""),
        table(
            ("argument", "takes", "", "what it is"),
            [(f"`{one.name}`", _kind(one), _need(one), one.help or "") for one in arguments],
        ),
        table(("option", "takes", "default", "what it is"), [_row(one) for one in options]),
    )


def _fenced(text: str) -> str:
    """Opening fences say that they hold commands, which the site colours and the tests run."""
    parts = text.split("```")
    return "```".join(f"console{part}" if index % 2 else part for index, part in enumerate(parts))


def _row(option: Any) -> tuple[str, ...]:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    return names, _kind(option), _default(option), option.help or ""


def _kind(parameter: Any) -> str:
    if getattr(parameter, "is_flag", False):
        return ""
    return f"`{parameter.display_type(_context())}`"


@functools.cache
def _context() -> typer.Context:
    """What parameters are described for; building the commands anew for each takes long."""
    return typer.Context(typer.main.get_command(cli.app))


def _need(argument: Any) -> str:
    return "**must be given**" if argument.required else "may be left out"


def _default(option: Any) -> str:
    if option.required:
        return "**must be given**"
    if option.default is None or option.default is False or option.default == ():
        return ""
    return "on" if option.default is True else f"`{option.default}`"
