"""What the tests of documentation and examples share."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import planish

ROOT = Path(planish.__file__).parent
DOCS = ROOT / "docs"
PAGES = {
    "README.md": ROOT / "README.md",
    **{path.relative_to(ROOT).as_posix(): path for path in sorted(DOCS.glob("*.md"))},
}
"""Written pages, by their path in the repository."""


def example(name: str) -> ModuleType:
    """The module of a file in examples/."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def fences(text: str, *languages: str) -> list[str]:
    """The contents of fenced blocks of some languages; an empty language is a fence without one."""
    found = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [body for language, body in found if language in languages]


def commands(text: str) -> list[list[str]]:
    """The words behind ``planish`` of each command in the text of a fence."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words[1:] for line in lines if (words := shlex.split(line, comments=True))[:1] == ["planish"]]


def inline_code(text: str) -> list[str]:
    """What stands between single backticks, outside of fences."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]
