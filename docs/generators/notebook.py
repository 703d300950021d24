"""The notebook as a page: its cells, and what they printed when they were last run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .docstring import blocks

NOTEBOOK = Path(__file__).parents[1] / "quick_start.ipynb"


def page() -> str:
    """The cells in order; the notebook itself is behind a link."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    title, *rest = (_cell(cell) for cell in cells)
    return blocks(title, "[Download this page as a notebook](quick_start.ipynb).", *rest)


def _cell(cell: dict[str, Any]) -> str:
    text = "".join(cell["source"])
    if cell["cell_type"] != "code":
        return text
    printed = "".join("".join(output.get("text", ())) for output in cell["outputs"])
    return blocks(f"```python\n{text}\n```", f"```text\n{printed.rstrip()}\n```" if printed else "")
