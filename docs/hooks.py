"""What mkdocs calls while it builds the site: generated pages join the written ones."""

from __future__ import annotations

from typing import Any

from generators import pages, pictures
from generators.passes import families
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PASSES = "passes/"
"""The entry of the navigation that stands for the pages of all passes."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put a page for each pass, and for each result, where the navigation leaves room for them."""
    config.nav = [_filled(entry) for entry in config.nav or ()]
    return config


def _filled(entry: Any) -> Any:
    if isinstance(entry, dict):
        return {title: _filled(inner) for title, inner in entry.items()}
    if not isinstance(entry, list):
        return entry
    return [one for inner in entry for one in (_passes() if inner == PASSES else [_filled(inner)])]


def _passes() -> list[Any]:
    return [{title: [{name: f"{PASSES}{name}.md"} for name in names]} for title, names in families().items()]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is generated."""
    for path, content in pages().items():
        files.append(File.generated(config, path, content=content))
    for path, source in pictures().items():
        files.append(File.generated(config, path, abs_src_path=source))
    return files
