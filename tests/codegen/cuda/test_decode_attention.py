"""Attention to a key-value cache: formats, plans, and the kernel on the host against float64."""

import dataclasses
import math

import onnx
import onnxruntime
import pytest
import torch
from cuda_simulator import Simulator, needs_compiler
from planish.codegen.cuda import decode_attention
from planish.codegen.cuda.hardware import GPUS, Gpu

H100 = GPUS["H100"]
ONE_PROCESSOR = dataclasses.replace(H100, processors=1)
MANY_PROCESSORS = dataclasses.replace(H100, processors=1024)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Queries, a cache with garbage behind each text, and the lengths of the texts."""

    query: torch.Tensor
    cache: decode_attention.Cache
    lengths: torch.Tensor
    softcap: float = 0.0
    window: int = 0
    bias: torch.Tensor | None = None

    @property
    def scale(self):
        return self.cache.head_size**-0.5


def problem(
    lengths, *, kv_heads=2, group=4, size=64, bits=8, dtype=torch.float16, spare=5, seed=0, **options
):
    """Keys and values that are wanted, scales that differ by channel, and scores of about −4 … 4."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), kv_heads, max(lengths) + spare, size)
    query = torch.randn(len(lengths), kv_heads * group, size, generator=generator).to(dtype)
    keys, values = (stored(shape, bits, dtype, lengths, generator) for _ in range(2))
    scales = [None, None]
    if bits != 16:
        spread = 2.0 ** (bits - 1) / 2
        scales = [(torch.rand(kv_heads, size, generator=generator) + 0.5) / spread for _ in range(2)]
    cache = decode_attention.Cache(keys, values, *scales)
    return Problem(query, cache, torch.tensor(lengths, dtype=torch.int32), **options)


def stored(shape, bits, dtype, lengths, generator):
    """Numbers in the tokens of each text, behind it NaN, or any byte."""
    if bits == 16:
        found = torch.randn(shape, generator=generator).to(dtype)
        for text, length in enumerate(lengths):
            found[text, :, length:] = math.nan
        return found
    half = 1 << (bits - 1)
    integers = torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)
    return decode_attention.pack_four_bits(integers) if bits == 4 else integers


def attended(problem):
    """[batch, heads, size] in float64, one head at a time, and how far float32 may be away from it."""
    size, dtype = problem.cache.head_size, problem.query.dtype
    exact, bound = (torch.zeros(problem.query.shape, dtype=torch.float64) for _ in range(2))
    group = problem.query.shape[1] // problem.cache.kv_heads
    for text, head in torch.cartesian_prod(*map(torch.arange, problem.query.shape[:2])).tolist():
        end = int(problem.lengths[text])
        shown = slice(max(0, end - problem.window) if problem.window else 0, end)
        if end == 0:
            continue
        keys, key_scale = rows(problem.cache.keys, problem.cache.key_scale, text, head // group, shown)
        values, value_scale = rows(
            problem.cache.values, problem.cache.value_scale, text, head // group, shown
        )
        folded = problem.query[text, head].double() * key_scale
        scores = problem.scale * (keys @ folded)
        # q · key_scale is rounded to 24 bits and then to two floats of 11, in units of its largest number;
        # products are summed in float32.
        products = problem.scale * (keys.abs() @ folded.abs())
        error = (size + 4) * 2.0**-24 * products
        if problem.cache.bits != 16:
            error += 2.0**-22 * products + 2.0**-25 * problem.scale * folded.abs().max() * keys.abs().sum(1)
        if problem.softcap:
            scores = problem.softcap * torch.tanh(scores / problem.softcap)
            error += problem.softcap * 2.0**-22
        if problem.bias is not None:
            added = problem.bias[min(text, len(problem.bias) - 1), shown].double()
            scores = scores + added
            error += 2.0**-23 * added.masked_fill(added.isinf(), 0).abs()
            error, scores = error[~added.isinf()], scores.masked_fill(added.isinf(), -math.inf)
        # The largest is subtracted, exp2 is exact to 2 units of 24 bits; so is each change of the largest.
        seen = scores[~scores.isinf()]
        error += 2.0**-23 * (seen.max() - seen.min() + seen.abs().max())
        weights = torch.softmax(scores, dim=0)
        relative = 2 * error.max() + (len(scores) / 16 + 4) * 2.0**-21
        # Weights, too, are two floats, of 11 or 8 bits; sums are in float32.
        split = 2.0**-16 if problem.cache.bits == 16 and dtype == torch.bfloat16 else 2.0**-22
        relative += split + (2 * len(scores) + 8) * 2.0**-24
        summed = weights @ values.abs() * relative + 2.0**-25 * values.abs().sum(0)
        exact[text, head] = weights @ values * value_scale
        bound[text, head] = summed * value_scale
    return exact, bound


def rows(numbers, scale, text, kv_head, shown):
    """Stored numbers [tokens, size] and scales [size] or 1, in float64."""
    found = numbers[text, kv_head, shown]
    if numbers.dtype == torch.uint8:
        found = torch.stack([found % 16, found // 16], dim=-1).flatten(1).double() - 8
    if scale is None:
        return found.double(), 1.0
    return found.double(), (
        scale if scale.numel() == 1 else scale.view(numbers.shape[1], -1)[kv_head]
    ).double()


def steps_between(found, expected):
    """How many numbers of their type lie between two tensors'."""
    ordered = []
    for tensor in (found, expected):
        bits = tensor.view(torch.int16).int()
        ordered.append(torch.where(bits < 0, -(bits & 0x7FFF), bits))
    return (ordered[0] - ordered[1]).abs()


def assert_rounded(found, problem):
    exact, bound = attended(problem)
    assert (found >= (exact - bound).to(found.dtype)).all()
    assert (found <= (exact + bound).to(found.dtype)).all()
    assert (steps_between(found, exact.to(found.dtype)) <= 1).double().mean() >= 0.999


def planned(problem, *, tokens=None, gpu=ONE_PROCESSOR):
    batch, heads, size = problem.query.shape
    plan = decode_attention.plan(
        batch,
        heads,
        problem.cache.kv_heads,
        size,
        tokens or problem.cache.capacity,
        bits=problem.cache.bits,
        dtype=problem.query.dtype,
        scale=problem.scale,
        gpu=gpu,
        softcap=problem.softcap,
        window=problem.window,
        bias=problem.bias is not None,
    )
    assert isinstance(plan, decode_attention.Plan)
    return plan


def run(simulator, problem, **options):
    plan = planned(problem, **options)
    return decode_attention.run(plan, simulator, problem.query, problem.cache, problem.lengths, problem.bias)


# ---------------------------------------------------------------------------------------------------- formats


def test_four_bits_lie_as_onnxruntime_has_them():
    packed = decode_attention.pack_four_bits(torch.tensor([[-8, 7, 0, -1]], dtype=torch.int8))
    assert packed.tolist() == [[0xF0, 0x78]]
    cache = decode_attention.Cache(
        packed.view(1, 1, 1, 2).repeat(1, 1, 8, 8),
        packed.new_zeros(1, 1, 8, 16),
        *[torch.full((1,), 0.5)] * 2,
    )
    assert (cache.bits, cache.head_size, cache.capacity, cache.bytes) == (4, 32, 8, 2 * 8 * 16 + 8)
    found = decode_attention.dequantized(cache.keys, cache.key_scale)
    assert found[0, 0, 0, :4].tolist() == [-4.0, 3.5, 0.0, -0.5]


@pytest.mark.parametrize("bits", [8, 4])
def test_caches_are_those_of_group_query_attention(bits):
    """onnxruntime appends a token and attends; the reference says the same of the cache that it leaves."""
    heads, kv_heads, size, past, window = 4, 2, 32, 9, 5
    generator = torch.Generator().manual_seed(bits)
    query, key, value = (
        torch.randn(2, 1, count * size, generator=generator).half() for count in (heads, kv_heads, kv_heads)
    )
    caches = [stored((2, kv_heads, past, size), bits, None, (), generator) for _ in range(2)]
    scales = [(torch.rand(1, kv_heads, 1, size, generator=generator) + 0.5) / 2**bits for _ in range(2)]
    feeds = {"query": query.float(), "key": key.float(), "value": value.float()}
    feeds |= dict(zip(["past_key", "past_value", "key_scale", "value_scale"], caches + scales, strict=True))
    feeds |= {"last": torch.full((2,), past).int(), "total": torch.tensor(past + 1).int()}
    attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": 0.2, "local_window_size": window}
    y, *present = group_query_attention(feeds, bits, attributes)
    lengths = torch.full((2,), past + 1, dtype=torch.int32)
    found = decode_attention.reference(
        query.view(2, heads, size),
        decode_attention.Cache(*present, *scales),
        lengths,
        scale=0.2,
        window=window,
    )
    torch.testing.assert_close(found.float(), y.view(found.shape), rtol=1e-3, atol=1e-3)


def group_query_attention(feeds, bits, attributes):
    """Its outputs, by onnxruntime."""
    types = {torch.float32: onnx.TensorProto.FLOAT, torch.int32: onnx.TensorProto.INT32}
    types |= {torch.int8: onnx.TensorProto.INT8, torch.uint8: onnx.TensorProto.UINT8}
    inputs = ["query", "key", "value", "past_key", "past_value", "last", "total", *[""] * 5]
    outputs = {
        "y": torch.float32,
        "present_key": feeds["past_key"].dtype,
        "present_value": feeds["past_key"].dtype,
    }
    node = onnx.helper.make_node(
        "GroupQueryAttention",
        [*inputs, "key_scale", "value_scale"],
        list(outputs),
        domain="com.microsoft",
        k_quant_type="PER_CHANNEL",
        v_quant_type="PER_CHANNEL",
        kv_cache_bit_width=bits,
        **attributes,
    )
    graph = onnx.helper.make_graph(
        [node],
        "attention",
        [onnx.helper.make_tensor_value_info(name, types[x.dtype], x.shape) for name, x in feeds.items()],
        [onnx.helper.make_tensor_value_info(name, types[dtype], None) for name, dtype in outputs.items()],
    )
    versions = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=versions, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return list(map(torch.from_numpy, session.run(None, {name: x.numpy() for name, x in feeds.items()})))


def cache_of(keys, values=None, *scales):
    return decode_attention.Cache(keys, keys if values is None else values, *scales)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: cache_of(torch.zeros(1, 1, 8, 16).half(), torch.zeros(1, 1, 8, 32).half()), "differ"),
        (lambda: cache_of(torch.zeros(1, 1, 8, 16)), "a cache of torch.float32: expected"),
        (
            lambda: cache_of(torch.zeros(1, 8, 1, 16).half().transpose(1, 2)[..., :8]),
            "contiguous, has four axes",
        ),
        (lambda: cache_of(torch.zeros(129).half()[1:].view(1, 1, 8, 16)), "a multiple of 16 bytes"),
        (lambda: cache_of(torch.zeros(1, 1, 8, 16).to(torch.int8)), "a cache of 8 bits has two scales"),
        (lambda: cache_of(torch.zeros(1, 1, 8, 16).half(), None, torch.ones(1)), "16 bits has no scales"),
        (
            lambda: cache_of(torch.zeros(1, 1, 8, 16).char(), None, *[torch.ones(1).half()] * 2),
            "contiguous float32",
        ),
        (
            lambda: cache_of(torch.zeros(1, 2, 8, 16).char(), None, *[torch.ones(16)] * 2),
            "expected 1 or 2 x 16",
        ),
    ],
)
def test_caches_that_do_not_go_together(build, reason):
    with pytest.raises(ValueError, match=reason):
        build()


# --------------------------------------------------------------------------------------------------- numbers


def padding(rows, tokens, hidden):
    """Random numbers for each token, and −∞ for the first ones, of each row so many."""
    found = torch.randn(rows, tokens, generator=torch.Generator().manual_seed(tokens))
    for row, count in enumerate(hidden):
        found[row, :count] = -math.inf
    return found


CASES = {
    "fp16": (torch.float16, {"lengths": [1, 15, 16, 17, 64], "group": 3, "size": 64, "bits": 16}),
    "bf16, a window": (torch.bfloat16, {"lengths": [200, 130, 7], "size": 128, "bits": 16, "window": 129}),
    "int8": (torch.float16, {"lengths": [31, 32, 33, 100], "group": 8, "size": 128}),
    "int8, 16 queries": (torch.bfloat16, {"lengths": [150, 1], "group": 16, "size": 80, "softcap": 2.5}),
    "int8, 1 query": (torch.float16, {"lengths": [77, 0], "group": 1, "size": 128, "window": 33}),
    "int4": (torch.float16, {"lengths": [63, 128, 129, 300], "group": 4, "size": 96, "bits": 4}),
    "int8, left padding": (
        torch.float16,
        {"lengths": [160, 90], "group": 4, "size": 64, "bias": padding(2, 160, [70, 1])},
    ),
    "int4, one bias for all": (
        torch.bfloat16,
        {"lengths": [90, 90], "group": 2, "size": 64, "bits": 4, "bias": padding(1, 95, [3])},
    ),
    "int4, 11 queries": (torch.bfloat16, {"lengths": [40, 65], "group": 11, "size": 256, "bits": 4}),
}


@needs_compiler
@pytest.mark.parametrize("name", list(CASES))
def test_the_kernel_gives_the_rounded_attention(name):
    dtype, options = CASES[name]
    case = problem(dtype=dtype, seed=len(name), **options)
    found = run(Simulator(order="shuffled"), case)
    assert_rounded(found, case)
    reference = decode_attention.reference(
        case.query,
        case.cache,
        case.lengths,
        scale=case.scale,
        softcap=case.softcap,
        window=case.window,
        bias=case.bias,
    )
    torch.testing.assert_close(reference, found, rtol=1e-2, atol=1e-4)


@needs_compiler
def test_one_scale_for_all():
    case = problem([70], size=128)
    keys, values = torch.tensor([0.01]), torch.tensor([0.03])
    cache = dataclasses.replace(case.cache, key_scale=keys, value_scale=values)
    case = dataclasses.replace(case, cache=cache)
    assert_rounded(run(Simulator(), case), case)


@needs_compiler
def test_scores_far_apart_and_queries_of_every_size():
    """The largest score grows from tile to tile; queries times scales lie beyond what float16 holds."""
    case = problem([400, 290], size=128, group=8)
    growing = torch.linspace(0.1, 1.0, case.cache.capacity)[:, None]
    keys = (case.cache.keys * growing).round().to(torch.int8)
    query = case.query * (10.0 ** torch.linspace(-6, 3.5, 16))[:, None].half()
    scale = case.cache.key_scale * torch.logspace(-3, 0, 128)
    cache = dataclasses.replace(case.cache, keys=keys, key_scale=scale)
    case = dataclasses.replace(case, query=query, cache=cache)
    assert_rounded(run(Simulator(order="backward"), case), case)


@needs_compiler
@pytest.mark.parametrize("late", [True, False], ids=["late", "early"])
@pytest.mark.parametrize("tiles", range(1, 8))
def test_every_number_of_tiles_goes_through_the_rings(tiles, late):
    """Of three stages: every residue, fewer tiles than stages, and warps that have one more than others."""
    case = problem([128 * tiles - 50, 128 * tiles], kv_heads=1, size=128, seed=tiles)
    for order in ("forward", "backward", "shuffled"):
        assert_rounded(run(Simulator(order=order, late=late, seed=tiles), case), case)


@needs_compiler
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_parts_are_joined(dtype):
    """Texts of very different lengths: most parts of the short ones have no token."""
    if dtype == "fp16":
        case = problem([1500, 100, 1, 0], size=128, group=8)
    else:
        case = problem([700, 64, 300], size=128, bits=16, dtype=torch.bfloat16, window=500)
    plan = planned(case, gpu=MANY_PROCESSORS, tokens=1536)
    assert plan.splits == 3 if dtype == "fp16" else 2
    assert plan.attention.grid == (2, len(case.lengths), plan.splits)
    assert_rounded(run(Simulator(order="shuffled"), case, gpu=MANY_PROCESSORS, tokens=1536), case)


@needs_compiler
def test_lengths_beyond_the_buffer_end_with_it():
    case = problem([100], size=128, spare=0)
    longer = dataclasses.replace(case, lengths=torch.tensor([1000], dtype=torch.int32))
    assert_rounded(run(Simulator(), longer), case)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", pytest.param("thread", marks=pytest.mark.exhaustive)])
def test_sanitizers_find_nothing(sanitizer):
    case = problem([1100, 13], size=64, bits=4, kv_heads=1, spare=0)
    simulator = Simulator(order="shuffled", sanitizer=sanitizer)
    assert_rounded(run(simulator, case, gpu=MANY_PROCESSORS), case)


# ----------------------------------------------------------------------------------------------------- plans


def plan_of(
    batch=4, heads=32, kv_heads=8, size=128, tokens=8192, bits=8, dtype=torch.float16, gpu=H100, **options
):
    return decode_attention.plan(
        batch, heads, kv_heads, size, tokens, bits=bits, dtype=dtype, scale=1.0, gpu=gpu, **options
    )


def test_plans():
    plan = plan_of()
    # Two blocks for each of 132 processors: 32 heads of 4 texts in eight parts are 256 of 264.
    assert plan.attention.grid == (8, 4, 8)
    assert plan.joining is not None
    assert plan.joining.grid == (128, 1, 1)
    short = plan_of(tokens=500)
    assert (short.splits, short.joining) == (1, None)
    assert plan_of(window=500).splits == 1
    assert plan_of(batch=132).splits == 1
    assert 2 * (plan.attention.shared_bytes + 1024) <= H100.shared_bytes + 1024
    whole = plan_of(softcap=2)
    assert (type(whole.scale), type(whole.softcap)) == (float, float)


@pytest.mark.parametrize("gpu", list(GPUS))
@pytest.mark.parametrize("bits", decode_attention.BITS)
def test_every_gpu_has_a_plan_for_every_head(gpu, bits):
    for size in (64, 96, 128, 256):
        for heads in (8, 128):
            plan = plan_of(size=size, bits=bits, heads=heads, gpu=GPUS[gpu])
            assert isinstance(plan, decode_attention.Plan)
            assert plan.attention.shared_bytes <= GPUS[gpu].shared_bytes


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float32}, "takes float16 and bfloat16"),
        ({"bits": 2}, "a cache of 2 bits: the kernel has 16, 8, 4"),
        ({"heads": 30}, "30 heads of queries do not share 8 of keys"),
        ({"heads": 136}, "17 queries share a head of keys: the kernel takes 16"),
        ({"size": 72}, "heads of 72 channels: with 8 bits the kernel takes multiples of 16, up to 256"),
        ({"size": 80, "bits": 4}, "with 4 bits the kernel takes multiples of 32"),
        ({"size": 512}, "up to 256"),
        ({"tokens": 0}, "no tokens"),
        ({"batch": 1 << 16}, "the kernel takes 65535"),
        ({"softcap": -1.0}, "none below 0"),
        ({"window": -1}, "none below 0"),
        ({"gpu": Gpu("T4", (7, 5), 40, 64 * 1024, 3e11, 65e12, 130e12, 1e9)}, "capability 7.5"),
        ({"gpu": Gpu("small", (8, 0), 40, 24 * 1024, 3e11, 65e12, 130e12, 1e9)}, "bytes of shared memory"),
    ],
)
def test_reasons_to_fall_back(options, reason):
    found = plan_of(**options)
    assert isinstance(found, decode_attention.Fallback)
    assert reason in found.reason


def test_types_that_do_not_go_together():
    case = problem([5], bits=16)
    plan = planned(case)
    for query, lengths in ((case.query.bfloat16(), case.lengths), (case.query, case.lengths.long())):
        with pytest.raises(
            ValueError, match="16-bit caches are of the type of the queries, lengths are int32"
        ):
            decode_attention.run(plan, Simulator(), query, case.cache, lengths)
