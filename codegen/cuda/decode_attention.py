"""Attention of one new token to a key-value cache: how a cache is stored, which kernel runs, its meaning.

    out[b, h] = softmax(scale · q[b, h] · K[b, h / G]ᵀ) · V[b, h / G]
    K = key_scale · stored keys,   V = value_scale · stored values,   softmax over the tokens that are shown

q is [batch, heads, size] in float16 or bfloat16, rotated; G = heads / kv_heads queries share a head of the
cache. Shown are the first ``lengths[b]`` tokens of a buffer that may be longer, or the last ``window`` of
them. With a softcap c, scores are c · tanh(scale · q · k / c). A bias, if there is one, is added to the
scores of a token; one of −∞ hides it. This is what onnxruntime's GroupQueryAttention
computes, and a cache is stored as it stores it (see `planish.ir.ops.cached_attention`):

- 16 bits: in the type of q;
- 8 bits: int8;
- 4 bits: uint8, two channels to a byte, q + 8; the even channel has the low four bits.

The kernel (`kernels/decode_attention.cu`) follows Flash-Decoding (https://pytorch.org/blog/flash-decoding)
and FlashAttention-2 (https://arxiv.org/abs/2307.08691). One block has all queries of a head of the cache, so
that the cache is read once. The tokens are split over blocks where there are too few heads for the GPU;
`kernels/join_parts.cu` then joins their results.

- Scales cost no multiplication per number of the cache: q · key_scale is computed once per block, and
  value_scale multiplies the result.
- Integers and floats alike go through tensor cores, as 16-bit floats. CUDA cores would do for up to about
  four queries and 8 bits; beyond, counting instructions, products take longer than reading the cache.
- What is computed in float32, q · key_scale and the weights of the softmax, reaches the tensor cores as the
  sum of two 16-bit floats: 22 bits, or 16 of a weight beside a bfloat16 cache. Sums are in float32.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from .hardware import Gpu
from .kernel import ELEMENTS, Kernel, Launch, Launcher

Tensor = torch.Tensor

BITS = (16, 8, 4)
LARGEST_GROUP = 16
"""Queries that a block has at most."""
LARGEST_HEAD = 256
"""Channels of a head: a lane's share of the sums of two tiles of heads is in registers."""
_HEADS = 8
"""Of a tile."""
_CHANNELS = {16: 16, 8: 16, 4: 32}
"""What the size of a head must be a multiple of, by bits: lanes share a row evenly, in whole words."""
_MOST_BATCH = 65535
_WAYS = ((4, 4), (4, 3), (4, 2), (2, 2))
"""Warps of a block and stages of their rings, the best first."""
_RESIDENT = 2
"""Blocks that a processor is to have at once: one computes while the other waits."""
_RESERVED_BYTES = 1024
"""Of shared memory, that each block has beside its own."""
_FEWEST_TILES = 4
"""Of a warp, at least, when tokens are split."""
_GOOD_ENOUGH = 0.95
"""Of the best occupation of the GPU: fewer splits are joined sooner."""


@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of one layer.

    Attributes:
        keys, values: [batch, kv_heads, capacity, size] float16, bfloat16 or int8; of 4 bits
            [batch, kv_heads, capacity, size / 2] uint8.
        key_scale, value_scale: float32, one number for all or one for each head and channel
            ([kv_heads, size], with any axes of length 1); None for 16 bits.
    """

    keys: Tensor
    values: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    def __post_init__(self) -> None:
        """Check that everything goes together.

        Raises:
            ValueError: it does not; the text says what does not.
        """
        if self.keys.shape != self.values.shape or self.keys.dtype != self.values.dtype:
            raise ValueError(
                f"keys {list(self.keys.shape)} {self.keys.dtype} and values {list(self.values.shape)} "
                f"{self.values.dtype} differ"
            )
        if self.keys.dtype not in (torch.float16, torch.bfloat16, torch.int8, torch.uint8):
            raise ValueError(f"a cache of {self.keys.dtype}: expected float16, bfloat16, int8 or uint8")
        for tensor in (self.keys, self.values):
            if tensor.dim() != 4 or not tensor.is_contiguous() or tensor.data_ptr() % 16:
                raise ValueError("a cache is contiguous, has four axes, and begins at a multiple of 16 bytes")
        for scale in (self.key_scale, self.value_scale):
            if (scale is None) != (self.bits == 16):
                raise ValueError(
                    f"a cache of {self.bits} bits has {'no' if self.bits == 16 else 'two'} scales"
                )
            if scale is not None and (scale.dtype != torch.float32 or not scale.is_contiguous()):
                raise ValueError("scales are contiguous float32")
            if scale is not None and scale.numel() not in (1, self.kv_heads * self.head_size):
                raise ValueError(
                    f"expected 1 or {self.kv_heads} x {self.head_size} scales, found {list(scale.shape)}"
                )

    @property
    def bits(self) -> int:
        """Of a stored number."""
        dtype = self.keys.dtype
        return 4 if dtype == torch.uint8 else dtype.itemsize * 8

    @property
    def batch(self) -> int:
        """Texts."""
        return self.keys.shape[0]

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return self.keys.shape[2]

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.keys.shape[3] * (2 if self.bits == 4 else 1)

    @property
    def bytes(self) -> int:
        """Of memory."""
        tensors = (self.keys, self.values, self.key_scale, self.value_scale)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def pack_four_bits(integers: Tensor) -> Tensor:
    """Integers −8 … 7 [..., size] as a cache of 4 bits has them, [..., size / 2] uint8."""
    nibbles = (integers + 8).to(torch.uint8)
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def dequantized(stored: Tensor, scale: Tensor | None) -> Tensor:
    """Keys or values [batch, kv_heads, capacity, size] in float32."""
    if scale is None:
        return stored.float()
    if stored.dtype == torch.uint8:
        stored = torch.stack([stored & 15, stored >> 4], dim=-1).flatten(-2).to(torch.int8) - 8
    return stored.float() * (scale if scale.numel() == 1 else scale.view(stored.shape[1], 1, -1))


def reference(
    query: Tensor,
    cache: Cache,
    lengths: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    bias: Tensor | None = None,
) -> Tensor:
    """The same [batch, heads, size] by plain torch, in float32, rounded once; see `plan` and `run`.

    A text without tokens has zeros.
    """
    batch, heads, size = query.shape
    grouped = query.float().view(batch, cache.kv_heads, heads // cache.kv_heads, size)
    token = torch.arange(cache.capacity, device=query.device)
    shown = token < lengths[:, None]
    if window:
        shown &= token >= lengths[:, None] - window
    shown = shown[:, None, :, None]
    # What lies beyond a text may be anything, NaN included.
    keys = dequantized(cache.keys, cache.key_scale).masked_fill(~shown, 0)
    values = dequantized(cache.values, cache.value_scale).masked_fill(~shown, 0)
    scores = grouped @ keys.mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + torch.nn.functional.pad(bias, (0, cache.capacity - bias.shape[1]))[:, None, None]
    weights = torch.softmax(scores.masked_fill(~shown.mT, -math.inf), dim=-1).nan_to_num(0.0)
    return (weights @ values).view(batch, heads, size).to(query.dtype)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How an attention is run.

    Attributes:
        attention: the launch of the attention.
        splits: parts that the tokens are split into.
        joining: the launch that joins the parts; None if there is one.
        scale, softcap, window: see `plan`.
    """

    attention: Launch
    splits: int
    joining: Launch | None
    scale: float
    softcap: float
    window: int


@dataclasses.dataclass(frozen=True)
class Fallback:
    """Why no kernel runs an attention: it is run on a dequantised cache."""

    reason: str


def plan(
    batch: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    tokens: int,
    *,
    bits: int,
    dtype: torch.dtype,
    scale: float,
    gpu: Gpu,
    softcap: float = 0.0,
    window: int = 0,
    bias: bool = False,
) -> Plan | Fallback:
    """Choose warps, stages and splits for one shape.

    Args:
        batch: texts.
        heads, kv_heads: of queries, and of keys and values.
        head_size: channels of a head.
        tokens: of the longest text, about: its attention is split so that the GPU has enough to do. Longer
            texts are run as well.
        bits: of a stored number: 16, 8 or 4.
        dtype: of queries and results, and of a cache of 16 bits.
        scale: of the products of queries and keys.
        gpu: where it runs.
        softcap: limit of the scores; 0 for none.
        window: tokens that a query sees, the newest among them; 0 for all.
        bias: whether there is one.
    """
    reason = _reason_not_to(batch, heads, kv_heads, head_size, tokens, bits, dtype)
    if softcap < 0 or window < 0:
        reason = f"a softcap of {softcap} and a window of {window}: the kernel takes none below 0"
    if gpu.capability < (8, 0):
        reason = f"the GPU has capability {gpu.capability[0]}.{gpu.capability[1]}: the kernel needs 8.0"
    if reason:
        return Fallback(reason)
    head_tiles = -(-heads // kv_heads // _HEADS)
    needed = {way: shared_bytes(head_size, bits, head_tiles, *way) for way in _WAYS}
    resident = {way: _resident(count, gpu) for way, count in needed.items()}
    way = max(_WAYS, key=resident.__getitem__)  # the first of the best
    if not resident[way]:
        return Fallback(f"{min(needed.values())} bytes of shared memory, and the GPU has {gpu.shared_bytes}")
    (warps, stages), tile_tokens = way, _tile_tokens(head_size, bits)
    shown = min(tokens, window) if window else tokens
    most = shown // (tile_tokens * warps * _FEWEST_TILES)
    splits = _splits(batch * kv_heads, gpu.processors * resident[way], most)
    element = ELEMENTS[dtype]
    kernel = Kernel(
        "decode_attention",
        (
            ("ELEMENT", element),
            ("CACHE_BITS", bits),
            ("HEAD_SIZE", head_size),
            ("HEAD_TILES", head_tiles),
            ("TOKENS", tile_tokens),
            ("WARPS", warps),
            ("STAGES", stages),
            ("SOFTCAP", int(softcap > 0)),
            ("BIAS", int(bias)),
        ),
    )
    attention = Launch(kernel, (kv_heads, batch, splits), 32 * warps, needed[way])
    joining = None
    if splits > 1:
        grid = (batch * heads, 1, 1)
        joining = Launch(Kernel("join_parts", (("ELEMENT", element),)), grid, head_size // 2)
    # Whole numbers would be passed as integers.
    return Plan(attention, splits, joining, float(scale), float(softcap), window)


def _reason_not_to(
    batch: int, heads: int, kv_heads: int, head_size: int, tokens: int, bits: int, dtype: torch.dtype
) -> str:
    if dtype not in (torch.float16, torch.bfloat16):
        return f"queries are {dtype}: the kernel takes float16 and bfloat16"
    if bits not in BITS:
        return f"a cache of {bits} bits: the kernel has {', '.join(map(str, BITS))}"
    if not batch or not heads or not kv_heads or not tokens:
        return "no queries, or no tokens"
    if heads % kv_heads:
        return f"{heads} heads of queries do not share {kv_heads} of keys evenly"
    if heads // kv_heads > LARGEST_GROUP:
        return f"{heads // kv_heads} queries share a head of keys: the kernel takes {LARGEST_GROUP}"
    if head_size % _CHANNELS[bits] or not 0 < head_size <= LARGEST_HEAD:
        return (
            f"heads of {head_size} channels: with {bits} bits the kernel takes multiples of "
            f"{_CHANNELS[bits]}, up to {LARGEST_HEAD}"
        )
    if batch > _MOST_BATCH:
        return f"{batch} texts: the kernel takes {_MOST_BATCH}"
    return ""


def _resident(block_bytes: int, gpu: Gpu) -> int:
    """Blocks that a processor has at once, and no more than it needs."""
    return min(_RESIDENT, (gpu.shared_bytes + _RESERVED_BYTES) // (block_bytes + _RESERVED_BYTES))


def _splits(blocks: int, places: int, most: int) -> int:
    """As few as keep the GPU about as busy as any number does; ``places`` blocks run at once."""
    busy = {}
    for splits in range(1, max(1, min(most, places)) + 1):
        waves = splits * blocks / places
        busy[splits] = waves / math.ceil(waves)
    enough = _GOOD_ENOUGH * max(busy.values())
    return next(splits for splits, share in busy.items() if share >= enough)


def _tile_tokens(head_size: int, bits: int) -> int:
    """Of a stage: about 4 KB of keys, and as many values."""
    return 32 if head_size * bits <= 1024 else 16


def shared_bytes(head_size: int, bits: int, head_tiles: int, warps: int, stages: int) -> int:
    """Of a block: its queries, and for each warp the stages, in whose place it leaves its results."""
    row = head_size * bits // 8
    stage = 2 * _tile_tokens(head_size, bits) * (row if row % 32 else row + 16)
    heads = head_tiles * _HEADS
    queries = heads * (head_size * 4 + 4)
    return queries + warps * max(stages * stage, heads * (head_size + 2) * 4)


def run(
    plan: Plan,
    launcher: Launcher,
    query: Tensor,
    cache: Cache,
    lengths: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """The attention [batch, heads, size] by the kernels of a plan.

    Args:
        plan: for these shapes.
        launcher: where it runs.
        query: [batch, heads, size], contiguous.
        cache: the new token's key and value among its own.
        lengths: [batch] int32, tokens in the cache; a text without any has zeros.
        bias: [batch or 1, tokens] float32, contiguous, of at least as many tokens as the longest text has.

    Raises:
        ValueError: types that do not go together.
    """
    if lengths.dtype != torch.int32 or (cache.bits == 16 and cache.keys.dtype != query.dtype):
        raise ValueError(
            f"queries {query.dtype}, a cache of {cache.keys.dtype}, lengths {lengths.dtype}: 16-bit caches "
            "are of the type of the queries, lengths are int32"
        )
    batch, heads, size = query.shape
    out = torch.empty_like(query)
    parts = None
    if plan.splits > 1:
        parts = torch.empty(plan.splits, batch, heads, size + 2, dtype=torch.float32, device=query.device)
    launcher.launch(
        plan.attention,
        [
            query,
            cache.keys,
            cache.values,
            cache.key_scale,
            cache.value_scale,
            lengths,
            bias,
            out,
            parts,
            cache.capacity,
            heads // cache.kv_heads,
            plan.window,
            _distance(cache.key_scale),
            _distance(cache.value_scale),
            0 if bias is None or len(bias) == 1 else bias.shape[1],
            plan.scale,
            plan.softcap,
        ],
    )
    if plan.joining is not None:
        launcher.launch(plan.joining, [parts, out, size, plan.splits])
    return out


def _distance(scale: Tensor | None) -> int:
    """Of one channel's scale to the next one's: none if all have the same."""
    return 0 if scale is None or scale.numel() == 1 else 1
