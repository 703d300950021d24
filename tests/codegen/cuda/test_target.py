"""The target cuda: what is bound to which kernel, and that models compute the same through them."""

import collections

import numpy as np
import onnx_ir as ir
import planish
import pytest
import torch
from cuda_simulator import Simulator, needs_compiler
from planish.codegen.cuda import torch_ops
from planish.codegen.cuda.hardware import GPUS
from planish.ir import clone
from planish.ir.errors import TargetError
from planish.runtime.calibration.data import completed
from small_decoders import VOCABULARY, small_decoder, traced_llama

IDS = np.random.default_rng(0).integers(1, VOCABULARY, (2, 11))
DATA = [{"input_ids": IDS}]
REFERENCES = planish.get_target("cuda", device="cpu", precision="float32")
# Without kernels that round activations on their own account, which others of 4-bit weights do.
ONNXRUNTIME = planish.get_target("onnxruntime-cpu", threads=1, max_error=1e-4)


def pipeline(scheme, others=""):
    return f"canonicalize,fuse,{others}quantize{{scheme={scheme},algorithm=rtn,ignore=[]}}"


W4A16 = pipeline("W4A16,group_size=32")
W4A4 = pipeline("W4A4,group_size=-1", "rotate,")
PIPELINES = {
    "W4A16 in groups": (W4A16, {"w4a16": 9, "normalize": 5, "swiglu": 2}),
    "W4A16 with zero points": (
        pipeline("W4A16,group_size=-1,symmetric=false"),
        {"w4a16": 9, "normalize": 5, "swiglu": 2},
    ),
    "W8A8": (
        pipeline("W8A8,activations=token"),
        # Attention's output is quantised on its own, norms and gates are with what makes them.
        {"w8a8": 9, "normalize_quantize": 7, "swiglu_quantize": 2},
    ),
    "W4A8 in groups, rotated, int8 cache": (
        pipeline("W4A8,group_size=32", "rotate,") + ",kv-cache{bits=8}",
        {"w8a8": 9, "normalize_quantize": 7, "swiglu": 2, "hadamard": 4, "hadamard_quantize": 2},
    ),
    "W4A4, rotated, int4 cache": (
        W4A4 + ",kv-cache{bits=4}",
        {"w8a8": 9, "normalize_quantize": 7, "swiglu": 2, "hadamard": 4, "hadamard_quantize": 2},
    ),
}


def compiled(passes, target):
    return planish.compile(clone(traced_llama()), passes, target=target, calibration=DATA)


def logits(model):
    return model.run(completed({"input_ids": IDS}, model.model))["logits"]


def calls(module):
    """How often each of our ops is called."""
    functions = [getattr(node.target, "__name__", "") for node in module.graph.nodes]
    return {name: count for name, count in collections.Counter(functions).items() if name in torch_ops.NAMES}


@pytest.mark.parametrize("name", list(PIPELINES))
def test_models_compute_what_onnxruntime_does(name):
    passes, expected_calls = PIPELINES[name]
    found = compiled(passes, REFERENCES)
    assert calls(found.module) == expected_calls
    expected = logits(compiled(passes, ONNXRUNTIME))
    # Float32 sums of up to 64 terms in another order.
    np.testing.assert_allclose(logits(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "passes",
    [
        "canonicalize,fuse,raise-cache",
        W4A16 + ",kv-cache{bits=8}",
        W4A16 + ",kv-cache{bits=4}",
        "canonicalize,fuse,raise-cache,window{tokens=8}",
    ],
    ids=["floats", "int8", "int4", "a window"],
)
def test_generation(passes):
    """Also of prompts of two lengths, which are padded."""
    found, expected = (compiled(passes, target) for target in (REFERENCES, ONNXRUNTIME))
    assert all(slot.in_place for slot in found.decoder(capacity=40).cache.slots)
    for prompts in (IDS, [IDS[0, :4].tolist(), IDS[1].tolist()]):
        np.testing.assert_array_equal(found.generate(prompts, 12), expected.generate(prompts, 12))


def test_generation_with_evictions():
    passes = "canonicalize,fuse,evict{policy=snapkv,window=4,keep=0.5,recent=4}"
    found, expected = (compiled(passes, target) for target in (REFERENCES, ONNXRUNTIME))
    tokens = (model.generate(IDS[:1], 16, evict_every=4) for model in (found, expected))
    np.testing.assert_array_equal(*tokens)


@pytest.mark.parametrize("bits", [8, 4])
def test_tokens_are_written_into_the_buffers_of_the_cache(bits):
    """Which are of the module's precision, and stay where they are."""
    model = compiled(f"canonicalize,fuse,kv-cache{{bits={bits}}}", planish.get_target("cuda", device="cpu"))
    decoder = model.decoder(capacity=40)
    tensors = {name: value.tensor for name, value in decoder.cache.buffers.items()}
    model.generate(IDS[:1], 12, decoder=decoder)
    for name, value in decoder.cache.buffers.items():
        assert value.tensor is tensors[name]
        assert value.tensor[:, :, : decoder.length].any()
        assert not value.tensor[:, :, decoder.length :].any()


@pytest.mark.slow
@needs_compiler
def test_weights_that_are_sparse_have_a_kernel_of_their_own(monkeypatch):
    module = small_decoder()
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            fours = layer.weight.data.view(len(layer.weight), -1, 4)
            fours.scatter_(2, fours.abs().topk(2, largest=False).indices, 0)
    traced = planish.trace_causal_lm(module)
    model, reference = (
        planish.compile(clone(traced), W4A16, target=target)
        for target in (planish.get_target("cuda", device="cpu"), planish.get_target("torch"))
    )
    assert calls(model.module) == {"sparse_w4a16": 9, "normalize": 5, "swiglu": 2}
    expected = logits(reference)
    for launcher in (None, SimulatedGpu()):
        monkeypatch.setattr(torch_ops, "_launcher_of", lambda _tensor, launcher=launcher: launcher)
        # Each step is rounded to 11 bits.
        np.testing.assert_allclose(logits(model), expected, rtol=0, atol=8e-3 * np.abs(expected).max())


class SimulatedGpu(Simulator):
    """A simulator that says what GPU it is."""

    gpu = GPUS["H100"]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("passes", [W4A16, W4A4], ids=["W4A16", "W4A4, rotated"])
def test_a_model_runs_through_the_kernels(passes, monkeypatch):
    """On the host: every kernel that is bound, in float16, as a GPU would be given them."""
    exact = logits(compiled(passes, REFERENCES))
    model = compiled(passes, planish.get_target("cuda", device="cpu"))
    by_references = logits(model)
    monkeypatch.setattr(torch_ops, "_launcher_of", lambda _tensor: SimulatedGpu())
    by_kernels = logits(model)
    assert by_kernels.dtype == np.float16
    # Each step is rounded to 11 bits, on either way. Four-bit activations that a rounding moves to the next
    # integer move the result by more: those of the references by as much as those of the kernels.
    scale = np.abs(exact).max()
    allowed = 8e-3 * scale + 2 * np.abs(by_references - exact).max()
    assert np.abs(by_kernels - exact).max() < allowed


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("bits", [8, *(pytest.param(bits, marks=pytest.mark.exhaustive) for bits in (16, 4))])
def test_a_decoder_generates_through_the_kernel_of_attention(bits, monkeypatch):
    traced = planish.trace_causal_lm(small_decoder(head_dim=32))
    cache = "raise-cache" if bits == 16 else f"kv-cache{{bits={bits}}}"
    target = planish.get_target("cuda", device="cpu")
    model = planish.compile(traced, f"canonicalize,fuse,{cache}", target=target, calibration=DATA)
    launched = []

    class Recording(SimulatedGpu):
        def launch(self, launch, arguments):
            launched.append(launch.kernel.name)
            super().launch(launch, arguments)

    # The greedy tokens of a random model lie far enough apart for float16.
    expected = model.generate(IDS, 4)
    monkeypatch.setattr(torch_ops, "_launcher_of", lambda _tensor: Recording())
    np.testing.assert_array_equal(model.generate(IDS, 4), expected)
    # Of two layers, for three tokens, the first of them once more when the step is made.
    assert launched.count("decode_attention") == 2 * (3 + 1)


def test_bindings_say_what_runs_each_op_and_why():
    rows = compiled(W4A16, REFERENCES).bound.bindings
    assert collections.Counter(row.kernel for row in rows) == {"w4a16": 9, "normalize": 5, "swiglu": 2}
    wide = compiled(pipeline("W8A16,group_size=-1"), REFERENCES)
    reasons = {row.reason for row in wide.bound.bindings if row.kernel == "body"}
    assert reasons == {"weights of 8 bits: the kernel of float activations takes up to 4"}
    assert "w4a16" not in calls(wide.module)


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("W4A16,group_size=16", "groups of 16 rows: the kernel has (32, 64, 128), or one for all"),
        ("NF4,group_size=32", "there is no kernel of code books, second levels and outliers"),
        ("W4A8,group_size=16", "groups of 16 rows: the kernel takes multiples of 32"),
        (
            "W4A8,group_size=-1,symmetric=false",
            "weights have zero points: the kernel takes signed ones around 0",
        ),
    ],
)
def test_what_has_no_kernel_runs_as_it_is(scheme, reason):
    found = compiled(pipeline(scheme), REFERENCES)
    linears = [row for row in found.bound.bindings if row.op.endswith("Linear")]
    assert {(row.kernel, row.reason) for row in linears} == {("body", reason)}
    expected = logits(compiled(pipeline(scheme), planish.get_target("torch")))
    np.testing.assert_allclose(logits(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_module_can_be_compiled_by_torch():
    model = compiled(PIPELINES["W4A8 in groups, rotated, int8 cache"][0], REFERENCES)
    names = model.module.meta["planish.inputs"]
    tensors = {
        names[name]: torch.as_tensor(array)
        for name, array in completed({"input_ids": IDS}, model.model).items()
    }
    with torch.no_grad():
        expected = model.module(**tensors)["logits"]
        found = torch.compile(model.module, backend="aot_eager", fullgraph=True)(**tensors)["logits"]
    torch.testing.assert_close(found, expected)


def test_files_keep_the_planish_ops(tmp_path):
    model = compiled(W4A16, REFERENCES)
    path = model.save(tmp_path / "model.onnx")
    domains = {node.domain for node in ir.load(path).graph}
    assert domains == {"", "planish"}
    opened = planish.CompiledModel.open(path, target=REFERENCES)
    assert calls(opened.module) == calls(model.module)
    np.testing.assert_array_equal(logits(opened), logits(model))


def test_what_is_refused():
    with pytest.raises(TargetError, match="the kernels have no gradients"):
        planish.get_target("cuda", device="cpu", trainable=True)
    if not torch.cuda.is_available():
        with pytest.raises(TargetError, match="torch finds no CUDA device"):
            planish.get_target("cuda")


EXAMPLES = {
    "w4a16": lambda: (
        torch.randn(2, 3, 64),
        torch.zeros(4, 4, 32, 4, dtype=torch.int32),
        torch.ones(2, 256),
        None,
        torch.ones(40),
        64,
        40,
        32,
    ),
    "sparse_w4a16": lambda: (
        torch.randn(2, 3, 64),
        torch.zeros(2, 4, 3, 32, 4, dtype=torch.int32),
        torch.ones(4, 256),
        None,
        64,
        40,
        32,
    ),
    "w8a8": lambda: (
        torch.ones(2, 3, 64, dtype=torch.int8),
        torch.ones(2, 3),
        torch.zeros(4, 4, 4, 32, 4, dtype=torch.int32),
        torch.ones(1, 256),
        None,
        64,
        40,
        0,
        8,
        torch.float16,
    ),
    "decode_attention": lambda: (
        torch.randn(2, 4, 32).half(),
        torch.zeros(2, 2, 8, 32, dtype=torch.int8),
        torch.zeros(2, 2, 8, 32, dtype=torch.int8),
        torch.tensor([3, 8], dtype=torch.int32),
        None,
        torch.ones(1),
        torch.ones(1),
        0.2,
        0,
    ),
    "normalize": lambda: (torch.randn(2, 3, 64), torch.ones(64), None, "rms", 1e-5),
    "normalize_quantize": lambda: (torch.randn(2, 3, 64), None, None, "none", 0.0, 127, 1.0),
    "swiglu": lambda: (torch.randn(2, 3, 64),),
    "swiglu_quantize": lambda: (torch.randn(2, 3, 64), 127, 1.0),
    "hadamard": lambda: (torch.randn(2, 3, 64), None, 0.125),
    "hadamard_quantize": lambda: (torch.randn(2, 3, 64), None, 0.125, 7, 0.9),
}


@pytest.mark.parametrize("name", torch_ops.NAMES)
def test_torch_accepts_each_op(name):
    """Schema, fake implementation, and tracing with fixed and free sizes."""
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.planish, name).default, EXAMPLES[name](), test_utils=tests)
