"""The code of the README and of the site runs on small models, or says why not; so do its commands."""

import contextlib
import dataclasses
import functools
import json
import re
import shlex
import shutil
import unittest
from pathlib import Path
from typing import ClassVar

import checkpoints
import numpy as np
import onnx_ir as ir
import planish
import pytest
import tokenizers
import torch
import typer
from docs_helpers import PAGES, commands, example, inline_code
from generators import targets
from planish.cli import app
from planish.ir import clone
from planish.passes import PassContext, PassResult, Pipeline
from planish.passes.infrastructure import registry
from small_decoders import small_decoder
from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from typer.testing import CliRunner

VOCABULARY = 16384
GENERATED = {"docs/targets.md": targets.page}
"""Generated pages with code."""


class Encoder(torch.nn.Module):
    """Embeddings, one feed-forward block, the mean over what the mask shows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(256, 64)
        self.norm = torch.nn.LayerNorm(64)
        self.up, self.down = torch.nn.Linear(64, 256), torch.nn.Linear(256, 64)

    def forward(self, input_ids, attention_mask):
        hidden = self.embedding(input_ids)
        hidden = hidden + self.down(torch.nn.functional.gelu(self.up(self.norm(hidden))))
        weights = attention_mask[..., None].to(hidden.dtype)
        return {"embedding": (hidden * weights).sum(1) / weights.sum(1)}


def ids(*shape: int, seed: int = 0, below: int = 256) -> torch.Tensor:
    return torch.randint(3, below, shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def encoder() -> torch.nn.Module:
    torch.manual_seed(0)
    return Encoder().eval()


def encoder_inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": ids(4, 32), "attention_mask": torch.ones(4, 32, dtype=torch.int64)}


@functools.cache
def llama() -> torch.nn.Module:
    sizes = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256, "num_hidden_layers": 1}
    return small_decoder(**sizes, vocab_size=VOCABULARY, max_position_embeddings=512, eos_token_id=None)


TRACED: dict[tuple[torch.nn.Module, str], ir.Model] = {}


def trace_once(module, example_inputs=None, **options):
    """`planish.trace`, which takes seconds, once for the blocks that compile the same module."""
    if module is llama():
        example_inputs = None  # its inputs are known: the same graph for all blocks, with a cache
    shapes = torch.utils._pytree.tree_map_only(torch.Tensor, lambda one: one.shape, example_inputs)
    key = module, f"{shapes} {options}"
    if key not in TRACED:
        TRACED[key] = planish.trace(module, example_inputs, **options)
    return clone(TRACED[key])


checkpoint = functools.cache(planish.load_checkpoint)


def samples() -> list[torch.Tensor]:
    return [ids(1, 24, seed=seed, below=64) for seed in range(4)]


NAMES = {
    "README.md": {
        "torch": lambda: torch,
        "ir": lambda: ir,
        "dataclass": lambda: dataclasses.dataclass,
        "ClassVar": lambda: ClassVar,
        "PassContext": lambda: PassContext,
        "PassResult": lambda: PassResult,
        "model": llama,
        "llama": llama,
        "inputs": lambda: {"input_ids": ids(2, 9)},
        "samples": samples,
        "passes": lambda: "canonicalize,fuse",
        "tokenizer": lambda: "Llama-3-8B-GPTQ",
    },
    "docs/index.md": {"model": encoder, "inputs": encoder_inputs},
    "docs/choosing.md": {"model": encoder, "inputs": encoder_inputs},
    "docs/start_language_models.md": {
        "llama": llama,
        "samples": samples,
        "tokenizer": lambda: "Llama-3-8B-GPTQ",
    },
    "docs/planning.md": {"planish": lambda: planish, "model": encoder, "inputs": encoder_inputs},
    "docs/recipes_and_cache.md": {
        "batches": lambda: [{name: tensor.numpy() for name, tensor in encoder_inputs().items()}]
    },
    "docs/large_models.md": {
        "compiled": lambda: planish.compile(llama(), "canonicalize,fuse,raise-cache", target="portable")
    },
    "docs/ir.md": {"module": encoder, "x": encoder_inputs},
    "docs/targets.md": {"model": encoder, "inputs": encoder_inputs},
    "docs/writing_a_pass.md": {
        "planish": lambda: planish,
        "module": encoder,
        "x": encoder_inputs,
        "MultiplyByReciprocals": lambda: example("custom_pass").MultiplyByReciprocals,
    },
}
"""What a page takes for granted: names, and how they are made."""

FILES = {
    "README.md": ("model.onnx", "inputs.npz", "Llama-3-8B-GPTQ"),
    "docs/start_onnx.md": ("model.onnx",),
    "docs/start_language_models.md": ("Llama-3-8B-GPTQ",),
    "docs/choosing.md": ("model.onnx",),
    "docs/report.md": ("model.onnx",),
    "docs/recipes_and_cache.md": ("model.onnx",),
    "docs/ir.md": ("model.onnx",),
}
"""Files that a page takes for granted."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    planish.save(planish.trace(encoder(), encoder_inputs()), folder / "model.onnx")
    np.savez(folder / "inputs.npz", **{name: tensor.numpy() for name, tensor in encoder_inputs().items()})
    write_checkpoint(folder / "Llama-3-8B-GPTQ")
    return folder


def write_checkpoint(folder: Path) -> None:
    """A decoder with GPTQ's weights, and a tokenizer that knows a few words."""
    module = small_decoder(num_hidden_layers=1)
    layers = {}
    for seed, (name, shape) in enumerate(checkpoints.quantised_layers(module).items()):
        layer = checkpoints.random_layer(shape, bits=4, group_size=16, seed=seed)
        layers[name] = (layer, checkpoints.gptq(layer, 4))
    config = {"quant_method": "gptq", "bits": 4, "group_size": 16, "checkpoint_format": "gptq"}
    checkpoints.write(folder, module, layers, config)
    words = ["<unk>", "Once", "upon", "a", "time", *(f"w{number}" for number in range(VOCABULARY - 5))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"})
    )


def run_commands(fence: Example) -> None:
    for words in commands(fence.parsed):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"planish {shlex.join(words)}\n{result.output}"


def document(page: str) -> Document:
    parsers = [PythonCodeBlockParser(), CodeBlockParser("console", run_commands), SkipParser()]
    text = GENERATED[page]() if page in GENERATED else PAGES[page].read_text("utf-8")
    found = Document(text, page)
    for parser in parsers:
        for region in parser(found):
            found.add(region)
    return found


@pytest.mark.parametrize("page", [*PAGES, *GENERATED])
def test_code_runs(page, files, tmp_path, monkeypatch):
    examples = list(document(page).examples())
    if not examples:
        pytest.skip("it has no code")
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "cache"
    monkeypatch.setattr("planish.runtime.work_cache.cache_directory", lambda: cache)
    monkeypatch.setattr("planish.compiler.trace", trace_once)
    monkeypatch.setattr("planish.compiler.load_checkpoint", lambda name: clone(checkpoint(files / name)))
    for name in FILES.get(page, ()):
        copy = shutil.copytree if (files / name).is_dir() else shutil.copy
        copy(files / name, tmp_path / name)
    examples[0].namespace.update({name: make() for name, make in NAMES.get(page, {}).items()})
    for one in examples:
        with contextlib.suppress(unittest.SkipTest):  # the page says why, behind the word skip
            one.evaluate()


def command_of(words: list[str]):
    """The command that words call, and the rest of the words."""
    command = typer.main.get_command(app)
    while words and hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    return command, words


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_prose_exist(page):
    for text in inline_code(PAGES[page].read_text("utf-8")):
        if not text.startswith("planish ") or "COMMAND" in text:
            continue
        words = [word for word in text.split()[1:] if word != "…"]
        command, rest = command_of(words[1:] if words[0] == "--traceback" else words)
        known = {
            name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)
        }
        assert {word for word in rest if word.startswith("-")} <= known | {"--help"}, text


@pytest.mark.parametrize("page", PAGES)
def test_pipelines_in_prose_can_be_read(page):
    names = "|".join(registry.available())
    step = rf"(?:{names})(?:\{{[^}}]*\}})?"
    for text in inline_code(PAGES[page].read_text("utf-8")):
        if (
            "{" in text
            and "…" not in text
            and "=}" not in text
            and re.fullmatch(rf"{step}(?:,{step})*", text)
        ):
            Pipeline.parse(text)
