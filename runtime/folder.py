"""A model as a folder: the ONNX file, and beside it what a decoder's runtime and its tokenizer need."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..codegen.target import BoundModel
from ..ir import save
from ..ir.decoder_facts import DecoderFacts
from ..ir.errors import InputError, ModelError
from ..ir.files import folder_beside, move_all, unwritable
from .generate.genai import CONFIG_FILE, genai_config

MODEL_FILE, EVICTION_FILE, PREFILL_FILE = "model.onnx", "evict.onnx", "prefill.onnx"
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
)


def save_folder(
    bound: BoundModel,
    folder: Path,
    *,
    eviction: ir.Model | None = None,
    prefill: BoundModel | None = None,
    tokenizer: Any = None,
    external_data: bool | None = None,
) -> None:
    """Write a bound model as ``model.onnx`` with all that belongs to it.

    A decoder that was traced from transformers gets a ``genai_config.json``, unless tokens of its cache are
    evicted, which onnxruntime-genai cannot do: then the eviction is written beside it. All files are written
    to a folder beside this one first and moved when they are complete.

    Args:
        bound: the model.
        folder: made if it is not there; other files in it stay.
        eviction: the graph that evicts, for decoders that have it.
        prefill: the same model with kernels for prompts, if it is to be written beside; without it, one that
            an earlier model left there is removed.
        tokenizer: one of transformers, or a folder that has its files.
        external_data: as of `planish.ir.save`.

    Raises:
        ModelError: the folder cannot be written.
        InputError: there is no tokenizer in what was given.
    """
    if not folder.parent.is_dir():
        raise ModelError(
            f"{folder} cannot be made: the folder {folder.parent} does not exist", hint="create it"
        )
    try:
        with folder_beside(folder) as made:
            save(bound.model, made / MODEL_FILE, external_data=external_data)
            if eviction is None:
                _write_config(bound, made)
            else:
                save(eviction, made / EVICTION_FILE)
            if prefill is not None:
                save(prefill.model, made / PREFILL_FILE, external_data=external_data)
            if tokenizer is not None:
                write_tokenizer(tokenizer, made)
            _move_into(folder, sorted(made.iterdir()), stale=PREFILL_FILE if prefill is None else None)
    except OSError as error:
        raise unwritable(folder, error) from error


def _move_into(folder: Path, files: Sequence[Path], *, stale: str | None) -> None:
    """Move all files, and let one that an earlier model left there go; or leave the folder as it was."""
    is_new = not folder.exists()
    try:
        folder.mkdir(exist_ok=True)
        removed = [] if stale is None else [folder / stale]
        move_all(files, [folder / file.name for file in files], removed=removed)
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):  # not empty: it is complete, and what came afterwards failed
                folder.rmdir()
        raise


def _write_config(bound: BoundModel, folder: Path) -> None:
    facts = DecoderFacts.read(bound.model)
    if facts is not None:
        config = genai_config(bound.model, facts, MODEL_FILE, bound.session_options)
        text = json.dumps(config, indent=2)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer of transformers, or the files of the folder that one was loaded from.

    Raises:
        InputError: there is none in what was given.
    """
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
        return
    source = Path(tokenizer)
    files = list(_tokenizer_files(source)) if source.is_dir() else []
    if not files:
        raise InputError(
            f"tokenizer: expected a folder with tokenizer.json or the like, found {source}",
            hint="give the folder that the tokenizer was loaded from, or the tokenizer itself",
        )
    for file in files:
        shutil.copy(file, folder / file.name)


def _tokenizer_files(folder: Path) -> Iterator[Path]:
    for pattern in _TOKENIZER_FILES:
        yield from sorted(file for file in folder.glob(pattern) if file.is_file())
