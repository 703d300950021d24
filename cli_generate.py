"""The command that generates text with a compiled decoder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import typer

from .ir.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .runtime.generate import Sampling

_TOKENIZER = "tokenizer.json"
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Tokenizer(Protocol):
    """What this command asks of one."""

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt."""

    def decode(self, ids: list[int]) -> str:
        """The text of some ids."""


def generate(
    model: Annotated[Path, typer.Argument(help="An ONNX decoder, or its folder.", show_default=False)],
    prompt: Annotated[str | None, typer.Argument(help="Text to go on from; needs a tokenizer.")] = None,
    tokens: Annotated[str | None, typer.Option(help='Ids to go on from instead, such as "1,15043".')] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json; the one beside the model if absent.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", help="Tokens at most.", min=1)
    ] = 128,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token, 1 draws as the model says.", min=0.0)
    ] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many likeliest tokens; 0: all.", min=0)] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest with this probability.")] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Draw from those with this share of the likeliest one's.")
    ] = 0.0,
    mirostat: Annotated[float, typer.Option(help="Aim at this surprise in bits; 0: off.", min=0.0)] = 0.0,
    draft: Annotated[bool, typer.Option(help="Draft from the text itself: same tokens, fewer runs.")] = False,
    fast_prefill: Annotated[
        bool, typer.Option(help="Run the prompt by prefill.onnx, if that is beside the model.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
) -> None:
    """Generate text with a decoder.

    ```
    planish generate llama-int4/ "Once upon a time" --temperature 0.8 --top-p 0.95
    planish generate model.onnx --tokens 1,15043,3186 -n 20
    ```

    Ctrl-C ends the text.
    """
    from .ir.decoder_facts import DecoderFacts
    from .runtime.compiled_model import CompiledModel
    from .runtime.generate import PromptLookup
    from .runtime.heap import give_back_large_blocks

    if (prompt is None) == (tokens is None):
        raise InputError("generate: expected a prompt or --tokens, and not both")
    words = None if prompt is None else _tokenizer(tokenizer or _beside(model))
    ids = _ids(tokens) if words is None else words.encode(prompt or "")
    give_back_large_blocks()
    compiled = CompiledModel.open(model)
    facts = DecoderFacts.read(compiled.model)
    printer = _Printer(words)
    try:
        compiled.generate(
            [ids],
            max_new_tokens,
            stream=printer,
            sampling=_sampling(temperature, top_k, top_p, min_p, mirostat),
            stop_tokens=() if facts is None else facts.end_tokens,
            draft=PromptLookup() if draft else None,
            fast_prefill=fast_prefill and compiled.has_fast_prefill,
            seed=seed,
        )
    finally:
        printer.finish()


def _beside(model: Path) -> Path:
    return (model if model.is_dir() else model.parent) / _TOKENIZER


def _tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise InputError(
            f"generate: no tokenizer at {path}", hint="give --tokenizer tokenizer.json, or ids by --tokens"
        )
    try:
        import tokenizers
    except ImportError as error:
        raise InputError(
            "generate: the package tokenizers is not installed",
            hint="pip install tokenizers, or give --tokens",
        ) from error
    try:
        found = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        raise InputError(f"generate: {path} is no tokenizer: {error}") from error
    return _HuggingFace(found)


class _HuggingFace:
    def __init__(self, found: object) -> None:
        self._found = found

    def encode(self, text: str) -> list[int]:
        return list(self._found.encode(text).ids)  # type: ignore[attr-defined]

    def decode(self, ids: list[int]) -> str:
        return str(self._found.decode(ids))  # type: ignore[attr-defined]


def _ids(text: str | None) -> list[int]:
    try:
        return [int(word) for word in (text or "").replace(",", " ").split()]
    except ValueError as error:
        raise InputError(f"--tokens: expected ids such as 1,15043, found {text!r}") from error


def _sampling(temperature: float, top_k: int, top_p: float, min_p: float, mirostat: float) -> Sampling | None:
    from .runtime.generate import Sampling

    if temperature == 0:
        if top_k or top_p < 1 or min_p or mirostat:
            raise InputError(
                "generate: at temperature 0 the likeliest token is taken, and nothing is drawn",
                hint="give --temperature, for example 0.8",
            )
        return None
    return Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, mirostat_tau=mirostat)


class _Printer:
    """Prints what is generated as it comes: text if there is a tokenizer, else ids."""

    def __init__(self, words: Tokenizer | None) -> None:
        self._words = words
        self._ids: list[int] = []
        self._printed = ""

    def __call__(self, new: npt.NDArray[np.int64]) -> None:
        self._ids.append(int(new[0]))
        if self._words is None:
            self._print(f"{self._ids[-1]} ")
            return
        # A character may take several tokens, and a token's text may depend on the one before it.
        text = self._words.decode(self._ids)
        if not text.endswith(_UNFINISHED) and text.startswith(self._printed):
            self._print(text[len(self._printed) :])
            self._printed = text

    def finish(self) -> None:
        """End the line."""
        self._print("\n")

    def _print(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
