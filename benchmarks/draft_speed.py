"""What drafts from the text itself (prompt lookup) gain, and cost where they do not fit.

The small language model (`wikilm`), in float32 and with 4-bit weights, goes on for 96 tokens greedily, with
and without drafts in turns, from three kinds of prompts of 192 tokens: text as it comes, one passage of 48
tokens four times, and lines of one pattern with other numbers. The tokens must be the same; the median of the
ratios is the gain.

    python benchmarks/draft_speed.py          # writes results/draft_speed.md
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import planish
import tokenizers
import wikilm
from planish.ir import clone
from planish.runtime.compiled_model import CompiledModel
from planish.runtime.generate import Decoder, PromptLookup
from sentence_embeddings import processor

_PROMPT, _NEW, _PASSAGE, _TEXTS = 192, 96, 48, 5
SCHEMES: Mapping[str, str] = {
    "float32": "canonicalize,fuse,raise-cache",
    "W4A16": "canonicalize,fuse,quantize{scheme=W4A16,group_size=32,ignore=[],algorithm=rtn},raise-cache",
}
_RESULTS = Path(__file__).parent / "results" / "draft_speed.md"


@dataclasses.dataclass(frozen=True)
class Figure:
    """Of one kind of prompts.

    Attributes:
        plain, drafted: tokens per second, medians.
        gain: median of the ratios.
        tokens_per_run: of the model, with drafts.
        same: whether all tokens are the same.
    """

    plain: float
    drafted: float
    gain: float
    tokens_per_run: float
    same: bool


class Counter:
    """A decoder that counts its runs."""

    def __init__(self, decoder: Decoder) -> None:
        self.runs = 0
        run = decoder.forward

        def counted(*arguments: object, **settings: object) -> object:
            self.runs += 1
            return run(*arguments, **settings)  # type: ignore[arg-type]

        decoder.forward = counted  # type: ignore[method-assign]


def prompts(small: wikilm.WikiLM) -> dict[str, np.ndarray]:
    """By kind: [texts, 192]."""
    windows = small.evaluation_windows(_TEXTS)[:, :_PROMPT]
    tokenizer = tokenizers.Tokenizer.from_file(str(small.model / "tokenizer.json"))
    line = " In the {} season , the team won {} games and lost {} . \n"
    lines = [
        "".join(line.format(1900 + 7 * text + year, year, text) for year in range(3, 40))
        for text in range(_TEXTS)
    ]
    patterns = np.stack([tokenizer.encode(line).ids[:_PROMPT] for line in lines])
    return {
        "text as it comes": windows,
        "a passage four times": np.tile(windows[:, :_PASSAGE], (1, _PROMPT // _PASSAGE)),
        "lines of one pattern": patterns,
    }


def measure(compiled: CompiledModel, texts: np.ndarray, rounds: int) -> Figure:
    """All texts, with and without drafts in turns."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    found: dict[bool, list[list[int]]] = {False: [], True: []}
    runs = 0
    for turn in range(rounds + 1):
        for text in texts:
            for drafts in (False, True):
                decoder = compiled.decoder(capacity=_PROMPT + _NEW)
                counter = Counter(decoder)
                decoder.forward(text[None, :-1])
                draft = PromptLookup() if drafts else None
                start = time.perf_counter()
                tokens = compiled.generate(text[None], _NEW, decoder=decoder, draft=draft)
                if turn:  # The first one warms up.
                    seconds[drafts].append(time.perf_counter() - start)
                    found[drafts].append(tokens[0].tolist())
                    runs += counter.runs - 1 if drafts else 0
    return Figure(
        plain=_NEW / statistics.median(seconds[False]),
        drafted=_NEW / statistics.median(seconds[True]),
        gain=statistics.median(a / b for a, b in zip(seconds[False], seconds[True], strict=True)),
        tokens_per_run=_NEW * rounds * len(texts) / runs,
        same=found[False] == found[True],
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    wikilm.add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=5, help="of all texts")
    arguments = parser.parse_args()
    small = wikilm.WikiLM.find(arguments.shared)
    graph = planish.trace_causal_lm(small.load())
    lines = [
        "# What drafts gain",
        "",
        f"{_NEW} tokens behind prompts of {_PROMPT}, batch 1, {_TEXTS} texts of each kind, on {processor()}. "
        "Drafts are what followed the last two or three tokens earlier in the text. Written by "
        "`benchmarks/draft_speed.py`.",
        "",
        "| weights | prompt | tokens/s | with drafts | gain | tokens per run | same tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for scheme, passes in SCHEMES.items():
        compiled = planish.compile(clone(graph), passes)
        for kind, texts in prompts(small).items():
            one = measure(compiled, texts, arguments.rounds)
            lines.append(
                f"| {scheme} | {kind} | {one.plain:,.0f} | {one.drafted:,.0f} | {one.gain:.2f} × "
                f"| {one.tokens_per_run:.1f} | {'yes' if one.same else 'NO'} |"
            )
            print(lines[-1], flush=True)
    _RESULTS.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
