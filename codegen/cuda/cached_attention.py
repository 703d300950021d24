"""onnxruntime's GroupQueryAttention, as bound graphs have it, in torch and with our kernel.

    present = [past; new],   y = softmax(scale · Q · presentᵀ + bias, of what is before each query) · present

Where the buffers of the past are longer than what is in them, new keys and values are written into them, and
they are the present: nothing is copied from token to token. Scales, integers and nibbles of a cache are as in
`planish.ir.ops.cached_attention`.

One new token is attended to by `planish.codegen.cuda.decode_attention`; several, and caches in float32, by
torch's own attention, on what the cache is dequantised to.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F

from ..torch_fx.registry import Integers, as_integers
from . import torch_ops  # noqa: F401 (registers the ops)
from .decode_attention import dequantized, pack_four_bits

Tensor = torch.Tensor

_LIMITS = {torch.int8: (-128, 127), torch.uint8: (-8, 7)}


def group_query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    last: Tensor,
    total: Integers,
    cosines: None = None,
    sines: None = None,
    positions: None = None,
    bias: Tensor | None = None,
    sink: None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    *,
    num_heads: int,
    kv_num_heads: int,
    scale: float = 0.0,
    local_window_size: int = -1,
    k_quant_type: str = "NONE",
    v_quant_type: str = "NONE",
    kv_cache_bit_width: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend to a cache and to new tokens, which all texts have as many of.

    Args:
        query: [batch, sequence, heads · size], rotated.
        key, value: [batch, sequence, kv_heads · size].
        past_key, past_value: [batch, kv_heads, past or more, size], or half the size for 4 bits; written to
            if there is room for the new tokens.
        last: [batch] int32, past + sequence − 1.
        total: past + sequence.
        cosines, sines, positions, sink: none: rotation stays outside.
        bias: [batch or 1, heads or 1, sequence, total], added to the scores.
        key_scale, value_scale: float32, one, or one for each head and channel.
        num_heads, kv_num_heads: heads.
        scale: of the scores; 0: one over the root of the size.
        local_window_size: tokens that a query sees, its own among them; all if not positive.
        k_quant_type, v_quant_type, kv_cache_bit_width: as the cache's type and its scales say.

    Returns:
        y, like the query; the present keys and values, which are the past's buffers where they had room.
    """
    new, length = query.shape[1], as_integers(total)[0]
    present = [
        _appended(past, _stored(_heads(added, kv_num_heads), each_scale, past.dtype), length)
        for past, added, each_scale in ((past_key, key, key_scale), (past_value, value, value_scale))
    ]
    attention = _Attention(
        _heads(query, num_heads), bias, (key_scale, value_scale), scale, max(local_window_size, 0)
    )
    if new == 1 and attention.has_kernel(present[0]):
        return attention.by_kernel(present[0], present[1], last + 1), present[0], present[1]
    new_positions = torch.arange(length - new, length, device=query.device)
    keys, values = (stored[:, :, :length] for stored in present)
    return attention.by_torch(keys, values, new_positions), present[0], present[1]


def attention_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_length: Tensor,
    cosines: None = None,
    sines: None = None,
    positions: None = None,
    bias: Tensor | None = None,
    sink: None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    *,
    num_heads: int,
    kv_num_heads: int,
    scale: float = 0.0,
    local_window_size: int = -1,
    k_quant_type: str = "NONE",
    v_quant_type: str = "NONE",
    kv_cache_bit_width: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`group_query_attention` of one new token, which asks the device alone for lengths.

    Args:
        past_length: [1] int64, how many tokens the buffers hold; they have room for one more.
        bias: [batch or 1, heads or 1, 1, capacity].
    """
    for past, added, each_scale in ((past_key, key, key_scale), (past_value, value, value_scale)):
        past.index_copy_(2, past_length, _stored(_heads(added, kv_num_heads), each_scale, past.dtype))
    attention = _Attention(
        _heads(query, num_heads), bias, (key_scale, value_scale), scale, max(local_window_size, 0)
    )
    if attention.has_kernel(past_key):
        lengths = (past_length + 1).to(torch.int32).expand(query.shape[0]).contiguous()
        return attention.by_kernel(past_key, past_value, lengths), past_key, past_value
    return attention.by_torch(past_key, past_value, past_length), past_key, past_value


@dataclasses.dataclass(frozen=True)
class _Attention:
    """Of new tokens to a cache that they are in.

    Attributes:
        query: [batch, heads, sequence, size].
        bias: [batch or 1, heads or 1, sequence, tokens], added to scores.
        scales: of keys and values.
        scale: of scores; 0: one over the root of the size.
        window: tokens that a query sees; 0 for all.
    """

    query: Tensor
    bias: Tensor | None
    scales: tuple[Tensor | None, Tensor | None]
    scale: float
    window: int

    @property
    def _factor(self) -> float:
        return self.scale or 1 / math.sqrt(self.query.shape[-1])

    def has_kernel(self, keys: Tensor) -> bool:
        """Whether ours runs one token."""
        one_bias = self.bias is None or self.bias.shape[1] == 1
        return one_bias and self.query.dtype != torch.float64 and keys.dtype != torch.float32

    def by_kernel(self, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        """One token to the first ``lengths`` of a cache."""
        bias = None if self.bias is None else self.bias[:, 0, 0].float()
        y: Tensor = torch.ops.planish.decode_attention(
            self.query[:, :, 0], keys, values, lengths, bias, *self.scales, self._factor, self.window
        )
        return y.flatten(1).unsqueeze(1)

    def by_torch(self, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """Tokens at positions [sequence] to what is before them and in their windows."""
        dtype = self.query.dtype
        keys, values = (
            stored if scale is None else dequantized(stored, scale).to(dtype)
            for stored, scale in zip((keys, values), self.scales, strict=True)
        )
        queries, at = positions[:, None], torch.arange(keys.shape[2], device=keys.device)
        shown = at <= queries
        if self.window:
            shown &= at > queries - self.window
        mask = shown if self.bias is None else torch.where(shown, self.bias.to(dtype), -math.inf)
        attended = F.scaled_dot_product_attention(
            self.query, keys, values, attn_mask=mask, scale=self._factor, enable_gqa=True
        )
        return attended.transpose(1, 2).flatten(2)


def _heads(packed: Tensor, count: int) -> Tensor:
    """[batch, heads, sequence, size]."""
    split: Tensor = packed.unflatten(-1, (count, -1))
    return split.transpose(1, 2)


def _stored(new: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """New keys or values as a cache of this type stores them."""
    if scale is None:
        return new
    rounded = torch.round(new.float() / _per_channel(scale, new.shape[1]))
    integers = rounded.clamp(*_LIMITS[dtype]).to(torch.int8)
    return pack_four_bits(integers) if dtype == torch.uint8 else integers


def _appended(past: Tensor, new: Tensor, length: int) -> Tensor:
    """A cache of ``length`` tokens, the new ones its last."""
    before = length - new.shape[2]
    if past.shape[2] < length:
        return torch.cat([past[:, :, :before], new], dim=2)
    past[:, :, before:length] = new
    return past


def _per_channel(scale: Tensor, heads: int) -> Tensor:
    return scale if scale.numel() == 1 else scale.reshape(heads, 1, -1)
