"""The pages of measured results: every table of ``benchmarks/results``, and the command that writes it."""

from __future__ import annotations

import re
from pathlib import Path

from .docstring import blocks, table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"

_INTRODUCTION = """\
Each table was written by a script in `benchmarks/`, with the machine it was measured on. The command behind
it measures the same again and writes the file anew. `make benchmark` sets up what the scripts need, other
implementations to compare with among it, and runs the main ones."""

_SCRIPTS = {
    "first_token": "decode_speed",
}
"""Results whose script has another name than theirs."""


def pages() -> dict[str, str]:
    """The list and each result, by path."""
    return {"results/index.md": _index()} | {
        f"results/{path.name}": _page(path) for path in sorted(RESULTS.glob("*.md"))
    }


def pictures() -> dict[str, str]:
    """Pictures that results show."""
    return {f"results/{path.name}": str(path) for path in sorted(RESULTS.glob("*.svg"))}


def script(result: Path) -> Path:
    """The script that writes a result, relative to the repository."""
    return Path("benchmarks") / f"{_SCRIPTS.get(result.stem, result.stem)}.py"


def _index() -> str:
    rows = [
        (f"[{_title(path)}]({path.name})", f"`python {script(path)}`")
        for path in sorted(RESULTS.glob("*.md"))
    ]
    return blocks("# Results", _INTRODUCTION, table(("what was measured", "command"), rows))


def _title(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ").strip()


def _page(path: Path) -> str:
    title, _, text = path.read_text(encoding="utf-8").partition("\n")
    return blocks(title, f"Reproduce with `python {script(path)}`.", _listed(text))


def _listed(text: str) -> str:
    """A list that follows a paragraph at once is a list in GitHub's Markdown, and needs a gap in others."""
    return re.sub(r"^(?![-*|] )(.+)\n(?=[-*] )", r"\1\n\n", text, flags=re.MULTILINE)
