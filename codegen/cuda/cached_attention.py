"""onnxruntime's GroupQueryAttention, as bound graphs have it, in torch and with our kernel.

    present = [past; new],   y = softmax(scale · Q · presentᵀ + bias, of what is before each query) · present

Where the buffers of the past are longer than what is in them, new keys and values are written into them, and
they are the present: nothing is copied from token to token. Scales, integers and nibbles of a cache are as in
`planish.ir.ops.cached_attention`.

One new token is attended to by `planish.codegen.cuda.decode_attention`; several, and caches in float32, by
torch's own attention, on what the cache is dequantised to.
"""

from __future__ import annotations

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
    batch, new, _ = query.shape
    length = as_integers(total)[0]
    present = [
        _appended(past, _heads(added, kv_num_heads), each_scale, length)
        for past, added, each_scale in ((past_key, key, key_scale), (past_value, value, value_scale))
    ]
    split = _heads(query, num_heads)
    factor = scale or 1 / math.sqrt(split.shape[-1])
    window = max(local_window_size, 0)
    one_bias = bias is None or bias.shape[1] == 1
    if new == 1 and one_bias and query.dtype != torch.float64 and present[0].dtype != torch.float32:
        y: Tensor = torch.ops.planish.decode_attention(
            split[:, :, 0],
            *present,
            last + 1,
            None if bias is None else bias[:, 0, 0].float(),
            key_scale,
            value_scale,
            factor,
            window,
        )
        return y.reshape(batch, new, -1), present[0], present[1]
    keys, values = (
        _wide(stored[:, :, :length], each_scale, query.dtype)
        for stored, each_scale in zip(present, (key_scale, value_scale), strict=True)
    )
    shown = _shown(new, length, window, query.device)
    mask = shown if bias is None else torch.where(shown, bias.to(query.dtype), -math.inf)
    attended = F.scaled_dot_product_attention(
        split, keys, values, attn_mask=mask, scale=factor, enable_gqa=True
    )
    return attended.transpose(1, 2).reshape(batch, new, -1), present[0], present[1]


def _heads(packed: Tensor, count: int) -> Tensor:
    """[batch, heads, sequence, size]."""
    split: Tensor = packed.unflatten(-1, (count, -1))
    return split.transpose(1, 2)


def _appended(past: Tensor, new: Tensor, scale: Tensor | None, length: int) -> Tensor:
    """A cache of ``length`` tokens, the new ones its last."""
    if scale is not None:
        rounded = torch.round(new.float() / _per_channel(scale, new.shape[1]))
        new = rounded.clamp(*_LIMITS[past.dtype]).to(torch.int8)
        new = pack_four_bits(new) if past.dtype == torch.uint8 else new
    before = length - new.shape[2]
    if past.shape[2] < length:
        return torch.cat([past[:, :, :before], new], dim=2)
    past[:, :, before:length] = new
    return past


def _per_channel(scale: Tensor, heads: int) -> Tensor:
    return scale if scale.numel() == 1 else scale.reshape(heads, 1, -1)


def _wide(stored: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return stored if scale is None else dequantized(stored, scale).to(dtype)


def _shown(new: int, length: int, window: int, device: torch.device) -> Tensor:
    """[sequence, total]: what is not behind a query, and in its window."""
    queries = torch.arange(length - new, length, device=device)[:, None]
    keys = torch.arange(length, device=device)
    shown = keys <= queries
    return shown & (keys > queries - window) if window else shown
