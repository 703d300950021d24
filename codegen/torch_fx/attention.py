"""Attention and rotary position embedding (opset 23)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .registry import Lowering, standard

Tensor = torch.Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    *,
    is_causal: int = 0,
    q_num_heads: int | None = None,
    kv_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``softmax(softcap(scale · Q Kᵀ) + bias) V`` with grouped key and value heads and a cache.

    Q, K and V are [batch, heads, sequence, size], or [batch, sequence, heads · size] with the numbers of
    heads as attributes; the result has the layout of Q. The cache comes before K and V. A mask is boolean
    (True: attend) or added; a causal query i sees the keys up to i + past. A query that may see no key gives
    zeros.

    Returns:
        The result, the cache with K and V appended (key, value), and what ``qk_matmul_output_mode`` asks for:
        0 scores, 1 after softcap, 2 with the bias, 3 probabilities.
    """
    packed = query.ndim == 3
    q, k, v = _heads(query, q_num_heads), _heads(key, kv_num_heads), _heads(value, kv_num_heads)
    k = k if past_key is None else torch.cat([past_key, k], dim=2)
    v = v if past_value is None else torch.cat([past_value, v], dim=2)
    present_key, present_value = k, v
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    # Both factors are scaled, as the op prescribes, so that the products do not overflow.
    factor = math.sqrt(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    scores = (q * factor) @ (k * factor).mT
    capped = softcap * torch.tanh(scores / softcap) if softcap else scores
    bias = _bias(mask, capped, bool(is_causal), 0 if past_key is None else past_key.shape[2])
    hidden = None if bias is None else torch.isneginf(bias).all(-1, keepdim=True)
    probabilities = _softmax(capped, bias, hidden, softmax_precision)
    result = probabilities @ v
    if hidden is not None:
        result = result.masked_fill(hidden, 0)
    if packed:
        result = result.transpose(1, 2).flatten(2)
    match qk_matmul_output_mode:
        case 0:
            shown = scores
        case 1:
            shown = capped
        case 2:
            shown = capped if bias is None else capped + bias
        case _:
            shown = probabilities if hidden is None else probabilities.masked_fill(hidden, 0)
    return result, present_key, present_value, shown


def _heads(x: Tensor, heads: int | None) -> Tensor:
    """[batch, heads, sequence, size] from either layout."""
    return x if x.ndim == 4 or heads is None else x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def _bias(mask: Tensor | None, scores: Tensor, is_causal: bool, past: int) -> Tensor | None:
    """What is added to the scores: 0 where allowed and −∞ where not, or the mask's own numbers."""
    queries, keys = scores.shape[-2:]
    bias: Tensor | None = None
    if mask is not None:
        missing = keys - mask.shape[-1]  # keys beyond a short mask are hidden
        if mask.dtype == torch.bool:
            mask = F.pad(mask, (0, missing), value=False)
            bias = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device)
            bias = bias.masked_fill(~mask, -math.inf)
        else:
            bias = F.pad(mask, (0, missing), value=-math.inf)
    if is_causal:
        future = torch.full((queries, keys), -math.inf, dtype=scores.dtype, device=scores.device)
        future = future.triu(past + 1)
        bias = future if bias is None else bias + future
    return bias


def _softmax(
    scores: Tensor, bias: Tensor | None, hidden: Tensor | None, precision: torch.dtype | None
) -> Tensor:
    if bias is not None and hidden is not None:
        # A row that sees nothing is opened, and its result set to zero: its own gradient would be NaN. The
        # bias is smaller than the scores, so it is done here.
        scores = scores + bias.masked_fill(hidden, 0)
    wide = scores if precision is None else scores.to(precision)
    return torch.softmax(wide, -1).to(scores.dtype)


def rotary_embedding(
    x: Tensor,
    cosines: Tensor,
    sines: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """Turn pairs of channels by the angle of their position.

    x is [batch, heads, sequence, size], or [batch, sequence, heads · size] with ``num_heads``. The caches are
    [positions, d/2] and read at ``position_ids`` [batch, sequence], or [batch, sequence, d/2] without them.
    Pairs are channels i and i + d/2, or 2i and 2i + 1 if ``interleaved``; d is ``rotary_embedding_dim`` or
    the head's size. The channels after d stay.
    """
    heads = _heads(x, num_heads)
    if position_ids is not None:
        cosines, sines = cosines[position_ids.long()], sines[position_ids.long()]
    cosines, sines = cosines.unsqueeze(1), sines.unsqueeze(1)
    size = rotary_embedding_dim or heads.shape[-1]
    turned, rest = heads[..., :size], heads[..., size:]
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    real, imaginary = cosines * first - sines * second, sines * first + cosines * second
    if interleaved:
        turned = torch.stack([real, imaginary], dim=-1).flatten(-2)
    else:
        turned = torch.cat([real, imaginary], dim=-1)
    result = torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
    return result.transpose(1, 2).flatten(2) if x.ndim == 3 else result


OPS = standard({"Attention": Lowering(attention, several=True), "RotaryEmbedding": rotary_embedding})
