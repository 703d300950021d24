"""Real architectures, traced: what goes had no effect, and caches, files and shapes stay right."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import planish
import pytest
import torch
import transformers
from planish.ir import clone, infer_shapes, load, save, verify
from planish.ir.structure import Choice, Structure, discover, drop, shrink
from torch import nn

Anything = Callable[..., Any]
Arrays = dict[str, np.ndarray]

# Sums in single precision whose terms that are not zero are the same, in blocks of another size.
CLOSE = 1e-5

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**SIZES, **TOKENS, "num_key_value_heads": 3, "head_dim": 16}
GPT2 = {"vocab_size": 97, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64, **TOKENS}
OPT = {
    **{name: size for name, size in SIZES.items() if name != "intermediate_size"},
    **TOKENS,
    "ffn_dim": 80,
    "word_embed_proj_dim": 48,
}
VIT = {**SIZES, "image_size": 8, "patch_size": 4, "num_channels": 1}


def resnet() -> nn.Module:
    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(width, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
            self.conv2, self.bn2 = nn.Conv2d(5, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))

    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), Block(6), Block(6)),
        *(nn.Conv2d(6, 8, 3, padding=1, stride=2), Block(8)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
    )


def mobilenet() -> nn.Module:
    class InvertedResidual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                *(nn.Conv2d(6, 18, 1, bias=False), nn.BatchNorm2d(18), nn.ReLU6()),
                *(nn.Conv2d(18, 18, 3, padding=1, groups=18, bias=False), nn.BatchNorm2d(18), nn.Hardswish()),
                *(nn.Conv2d(18, 6, 1, bias=False), nn.BatchNorm2d(6)),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.layers(x)

    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3), InvertedResidual(), InvertedResidual()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10)),
    )


def densenet() -> nn.Module:
    class Layer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, self.conv(torch.relu(self.norm(x)))], dim=1)

    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3), Layer(6), Layer(10), Layer(14)),
        *(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(18 * 9, 10)),
    )


def squeeze_excite() -> nn.Module:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate = torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3))))))
            return x * gate[:, :, None, None]

    return nn.Sequential(nn.Conv2d(3, 8, 3), Gate(), nn.Conv2d(8, 10, 3), nn.Flatten(), nn.Linear(160, 10))


def _transformer(model: Any, config: Any, sizes: dict[str, Any]) -> nn.Module:
    return model(config(**sizes))  # type: ignore[no-any-return]


T = transformers
DECODERS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: _transformer(
        T.LlamaForCausalLM, T.LlamaConfig, {**GROUPED, "tie_word_embeddings": True}
    ),
    "qwen3": lambda: _transformer(T.Qwen3ForCausalLM, T.Qwen3Config, GROUPED),
    "phi3": lambda: _transformer(
        T.Phi3ForCausalLM, T.Phi3Config, {**SIZES, **TOKENS, "num_key_value_heads": 3}
    ),
    "gpt2": lambda: _transformer(T.GPT2LMHeadModel, T.GPT2Config, GPT2),
    "opt": lambda: _transformer(T.OPTForCausalLM, T.OPTConfig, OPT),
}
ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: _transformer(T.BertModel, T.BertConfig, SIZES),
    "vit": lambda: _transformer(T.ViTForImageClassification, T.ViTConfig, VIT),
    "resnet": resnet,
    "mobilenet": mobilenet,
    "densenet": densenet,
    "squeeze_excite": squeeze_excite,
}


def canonical(name: str, pipeline: str = "canonicalize") -> ir.Model:
    return traced(name) if pipeline == "canonicalize" else rewritten(name, pipeline)


@functools.cache
def rewritten(name: str, pipeline: str) -> ir.Model:
    return planish.compile(clone(traced(name)), pipeline).model


@functools.cache
def traced(name: str) -> ir.Model:
    torch.manual_seed(0)
    module = {**DECODERS, **ENCODERS}[name]().eval()
    for buffer_name, buffer in module.named_buffers():  # as if trained
        if buffer_name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand_like(buffer) + (0.5 if buffer_name.endswith("var") else -0.5))
    if name in DECODERS:
        return planish.compile(module, "canonicalize").model
    return planish.compile(module, "canonicalize", example_inputs=example(name)).model


@functools.cache
def structure_of(name: str, pipeline: str = "canonicalize") -> Structure:
    return discover(canonical(name, pipeline))


def example(name: str) -> Any:
    generator = torch.Generator().manual_seed(1)
    if name == "bert":
        ids = torch.randint(0, 97, (2, 7), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return (torch.rand((2, 1, 8, 8) if name == "vit" else (2, 3, 8, 8), generator=generator),)


def encoder_feeds(model: ir.Model, name: str) -> Arrays:
    tensors = example(name)
    given = tensors.values() if isinstance(tensors, dict) else tensors
    return {value.name or "": tensor.numpy() for value, tensor in zip(model.graph.inputs, given, strict=True)}


def step(
    model: ir.Model, run: Anything, ids: Sequence[Sequence[int]], past: Arrays | None
) -> tuple[np.ndarray, Arrays]:
    """One call of a decoder: its logits, and its cache as the next call's past."""
    tokens = np.array(ids)
    inputs = {value.name or "": value for value in model.graph.inputs}
    caches = [name for name in inputs if name.startswith("past_key_values.")]
    if past is None:
        past = {}
        for name in caches:
            shape = inputs[name].shape
            assert shape is not None
            past[name] = np.zeros((len(tokens), int(shape[1]), 0, int(shape[3])), np.float32)  # type: ignore[arg-type]
    length = past[caches[0]].shape[2]
    positions = np.tile(np.arange(length, length + tokens.shape[1]), (len(tokens), 1))
    attended = np.ones((len(tokens), length + tokens.shape[1]), np.int64)
    fed = {"input_ids": tokens, "attention_mask": attended, "position_ids": positions, **past}
    outputs = run(model, fed, doubles=False)
    cache = {name.replace("past_key_values", "present"): name for name in caches}
    return outputs["logits"], {cache[name]: array for name, array in outputs.items() if name in cache}


def assert_close(result: np.ndarray, expected: np.ndarray) -> None:
    assert result.shape == expected.shape
    assert np.abs(result - expected).max() <= CLOSE * np.abs(expected).max()


def prepared(
    name: str, pipeline: str, choices_of: Anything, zeroed: Anything
) -> tuple[ir.Model, ir.Model, list[Choice]]:
    """The model with zeros at what goes, and shrunk."""
    choices = choices_of([group for group in structure_of(name, pipeline).groups if group.kind != "hidden"])
    dense = zeroed(canonical(name, pipeline), choices)
    shrunk = clone(dense)
    shrink(shrunk, choices)
    verify(shrunk)
    return dense, shrunk, choices


@pytest.mark.parametrize(
    ("name", "pipeline"),
    [
        *(("llama", "canonicalize"), ("llama", "canonicalize,fuse")),
        *(("gpt2", "canonicalize"), ("gpt2", "canonicalize,fuse")),
        *(
            pytest.param(name, "canonicalize", marks=pytest.mark.exhaustive)
            for name in ("qwen3", "phi3", "opt")
        ),
        pytest.param("qwen3", "canonicalize,fuse", marks=pytest.mark.exhaustive),
    ],
)
def test_decoder(run: Anything, choices_of: Anything, zeroed: Anything, name: str, pipeline: str) -> None:
    """Every layer shrunk differently: a prompt, and one more token that reads the smaller cache."""
    dense, shrunk, choices = prepared(name, pipeline, choices_of, zeroed)
    assert [choice.group.kind for choice in choices] == ["attention", "ffn"] * 2
    kept = [len(choice.keep) for choice in choices]
    prompt, token = [[5, 17, 3, 90], [8, 8, 41, 2]], [[33], [7]]
    expected, past = step(dense, run, prompt, None)
    logits, smaller_past = step(shrunk, run, prompt, None)
    assert_close(logits, expected)
    for layer in range(2):
        assert smaller_past[f"past_key_values.{layer}.key"].shape[1] == kept[2 * layer]
    expected, _ = step(dense, run, token, past)
    logits, _ = step(shrunk, run, token, smaller_past)
    assert_close(logits, expected)
    # Had what went counted, it would show.
    untouched, _ = step(canonical(name, pipeline), run, prompt, None)
    assert np.abs(untouched - step(dense, run, prompt, None)[0]).max() > 100 * CLOSE * np.abs(untouched).max()


@pytest.mark.parametrize(
    ("name", "pipeline"),
    [(name, "canonicalize") for name in ENCODERS]
    + [(name, "canonicalize,fuse") for name in ("bert", "vit", "resnet")],
)
def test_encoder(run: Anything, choices_of: Anything, zeroed: Anything, name: str, pipeline: str) -> None:
    dense, shrunk, choices = prepared(name, pipeline, choices_of, zeroed)
    fed = encoder_feeds(dense, name)
    expected = next(iter(run(dense, fed, doubles=False).values()))
    assert_close(next(iter(run(shrunk, fed, doubles=False).values())), expected)
    untouched = next(iter(run(canonical(name, pipeline), fed, doubles=False).values()))
    assert np.abs(untouched - expected).max() > 100 * CLOSE * np.abs(untouched).max()
    assert sum(value.const_value.size for value in shrunk.graph.initializers.values()) < sum(  # type: ignore[union-attr]
        value.const_value.size  # type: ignore[union-attr]
        for value in dense.graph.initializers.values()
    )
    assert choices


@pytest.mark.parametrize("name", ["llama", "bert", "mobilenet"])
def test_shapes_are_those_that_inference_finds(choices_of: Anything, zeroed: Anything, name: str) -> None:
    _, shrunk, _ = prepared(name, "canonicalize", choices_of, zeroed)
    inferred = clone(shrunk)
    for node in inferred.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    infer_shapes(inferred)
    for node, written in zip(inferred.graph, shrunk.graph, strict=True):
        for found, value in zip(node.outputs, written.outputs, strict=True):
            assert found.shape is not None
            assert value.shape is not None
            known = [(a, b) for a, b in zip(found.shape, value.shape, strict=True) if isinstance(a, int)]
            assert all(a == b for a, b in known), f"{value.name}: {found.shape} and {value.shape}"


def test_saved_and_loaded(run: Anything, choices_of: Anything, zeroed: Anything, tmp_path: Path) -> None:
    _, shrunk, _ = prepared("llama", "canonicalize", choices_of, zeroed)
    drop(shrunk, [structure_of("llama").module("model.layers.0.self_attn")])
    save(shrunk, tmp_path / "shrunk.onnx")
    loaded = load(tmp_path / "shrunk.onnx")
    prompt = [[5, 17, 3, 90]]
    np.testing.assert_array_equal(step(loaded, run, prompt, None)[0], step(shrunk, run, prompt, None)[0])


@pytest.mark.parametrize("name", ["llama", pytest.param("qwen3", marks=pytest.mark.exhaustive)])
def test_width_of_the_stream(run: Anything, choices_of: Anything, zeroed: Anything, name: str) -> None:
    """Channels of the residual stream that are zero go, and the RMS norms are corrected for it."""
    choices = choices_of([structure_of(name).group("hidden")])
    dense = zeroed(canonical(name), choices, ["producer"])
    shrunk = clone(dense)
    shrink(shrunk, choices)
    verify(shrunk)
    prompt = [[5, 17, 3, 90]]
    assert_close(step(shrunk, run, prompt, None)[0], step(dense, run, prompt, None)[0])


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_modules_of_a_transformer(name: str) -> None:
    structure = structure_of(name)
    assert [module.kind for module in structure.modules] == ["attention", "ffn"] * 2
    inside = [name for module in structure.modules for name in module.groups]
    assert inside == [group.name for group in structure.groups if group.kind != "hidden"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dropped_layers_of_a_decoder(run: Anything, name: str) -> None:
    """A dropped branch is one whose last weight and bias are zero."""
    model, structure = canonical(name), structure_of(name)
    for modules in (structure.modules[:2], structure.modules[1:3]):
        dropped, silent = clone(model), clone(model)
        for module in modules:
            for node in silent.graph:
                if node.outputs[0].name == module.branch:
                    _silence(silent, node)
        drop(dropped, modules)
        verify(dropped)
        prompt, token = [[5, 17, 3, 90]], [[33]]
        expected, past = step(silent, run, prompt, None)
        logits, smaller_past = step(dropped, run, prompt, None)
        assert_close(logits, expected)
        assert set(smaller_past) < set(past)
        assert_close(step(dropped, run, token, smaller_past)[0], step(silent, run, token, past)[0])


def _silence(model: ir.Model, node: ir.Node) -> None:
    """Zero the weights of the linear that makes a branch."""
    for value in node.inputs:
        if value is not None and value.is_initializer():
            assert value.const_value is not None
            value.const_value = ir.tensor(np.zeros_like(value.const_value.numpy()), name=value.name)
        elif value is not None and node.op_type == "Add":
            producer = value.producer()
            assert producer is not None
            _silence(model, producer)


def test_bert_without_an_attention(run: Anything) -> None:
    """Post-norm: the norm behind the dropped branch stays, and norms the stream."""
    model, structure = canonical("bert"), structure_of("bert")
    module = structure.module("encoder.layer.1.attention")
    dropped = clone(model)
    drop(dropped, [module])
    verify(dropped)
    silent = clone(model)
    _silence(silent, next(node for node in silent.graph if node.outputs[0].name == module.branch))
    fed = encoder_feeds(model, "bert")
    expected = next(iter(run(silent, fed, doubles=False).values()))
    assert_close(next(iter(run(dropped, fed, doubles=False).values())), expected)


def test_heads_of_bert_are_those_of_the_module() -> None:
    group = structure_of("bert").group("encoder.layer.0.attention")
    for member in group.members:
        np.testing.assert_array_equal(member.indices, np.arange(48).reshape(6, 8))
    assert len(group.members) == 7
