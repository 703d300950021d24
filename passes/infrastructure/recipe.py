"""Recipes: how a model is compiled, as YAML, so that it can be compiled again; and presets, which have names.

    planish: 0.1.0
    source: sha256:…          the model that it was made of, as `planish inspect` shows it
    target: onnxruntime-cpu
    seed: 0
    passes:
    - canonicalize
    - quantize: {scheme: W4A16}

A file with the list of passes alone is a recipe, too. A preset also has a ``description``.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ...ir.errors import PipelineError
from .pipeline import Pipeline

_KEYS = ("planish", "source", "target", "seed", "passes", "description")
_FORM = 'the form is "passes:" with a line for each pass, and, if wanted, "target:" and "seed:"'


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is compiled.

    Attributes:
        pipeline: the passes.
        target: the name of the target; None for the default.
        seed: of the passes; None for the default.
        source: content hash of the model that it was used on.
        description: what it is good for; of presets.
    """

    pipeline: Pipeline
    target: str | None = None
    seed: int | None = None
    source: str | None = None
    description: str = ""

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """A recipe from YAML.

        Raises:
            PipelineError: it is no recipe.
        """
        try:
            found = yaml.safe_load(text)
        except yaml.YAMLError as error:
            problem = " ".join(str(error).split())
            raise PipelineError(f"the recipe is not YAML: {problem}", hint=_FORM) from error
        if not isinstance(found, Mapping):
            return cls(Pipeline.from_yaml(text))
        unknown = [key for key in found if key not in _KEYS]
        if unknown or "passes" not in found:
            problem = f"key {unknown[0]!r} is not known" if unknown else "there is no key 'passes'"
            raise PipelineError(f"recipe: {problem}: expected some of {', '.join(_KEYS)}", hint=_FORM)
        return cls(
            Pipeline.from_yaml(yaml.safe_dump(found["passes"])),
            _typed(found, "target", str),
            _typed(found, "seed", int),
            _typed(found, "source", str),
            " ".join((_typed(found, "description", str) or "").split()),
        )

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """A recipe from a file.

        Raises:
            PipelineError: it cannot be read, or is no recipe.
        """
        try:
            return cls.parse(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise PipelineError(f"recipe {str(path)!r} cannot be read: {error}") from error

    def to_yaml(self) -> str:
        """What `parse` reads."""
        facts: dict[str, Any] = {
            "planish": importlib.metadata.version("planish"),
            "source": self.source,
            "target": self.target,
            "seed": self.seed,
            "passes": yaml.safe_load(self.pipeline.to_yaml()),
        }
        given = {key: value for key, value in facts.items() if value is not None}
        return str(yaml.safe_dump(given, sort_keys=False, allow_unicode=True))


def _typed(found: Mapping[str, Any], key: str, kind: type) -> Any:
    value = found.get(key)
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        raise PipelineError(f"recipe: {key}: expected {kind.__name__}, found {value!r}", hint=_FORM)
    return value


@functools.cache
def presets() -> Mapping[str, Recipe]:
    """The recipes that come with planish, by name."""
    folder = importlib.resources.files("planish.passes.presets")
    files = [file for file in folder.iterdir() if file.name.endswith(".yaml")]
    return {
        file.name.removesuffix(".yaml"): Recipe.parse(file.read_text(encoding="utf-8"))
        for file in sorted(files, key=lambda file: file.name)
    }


def preset(name: str) -> Recipe:
    """A recipe that comes with planish.

    Raises:
        PipelineError: there is none of this name.
    """
    known = presets()
    if name not in known:
        raise PipelineError(f"there is no preset {name!r}", hint=f"there are {', '.join(known)}")
    return known[name]
