"""Attention by plain matrix products, on a CPU faster than torch's kernel for short texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# Name among transformers' attention implementations.
NAME = "dmgen"
# With more keys, a fused kernel is faster, since it keeps no matrix of weights.
_MOST_KEYS = 256
# Options of some models that `attend` does not implement.
_EXTRA = ("softcap", "position_bias", "cache", "s_aux")


def use_fast_attention(model: Any) -> None:
    """Replace `scaled_dot_product_attention` by `attend` in a model that uses it."""
    if model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
        model.set_attn_implementation(NAME)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return causal attention, `softmax(scaling · Q Kᵀ) V`, with the signature of transformers.

    The heads that share keys are rows of one product, so that keys are never repeated. On other
    devices, for more than 256 keys, and for anything but causal attention, torch's kernel is used.

    `query` is `(n, heads, t, d)`, where t is the number of keys, or 1 for the last position alone;
    `key` and `value` are `(n, key heads, keys, d)`, where heads is a multiple of key heads. The
    result is `(n, t, heads, d)`, and None for the weights.
    """
    n, heads, t, width = query.shape
    n_keys = key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = t == 1 or (t == n_keys and causal)
    extra = attention_mask is not None or dropout or any(others.get(k) is not None for k in _EXTRA)
    if query.device.type != "cpu" or not plain or extra or n_keys > _MOST_KEYS:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, is_causal=is_causal, **others,
        )  # fmt: skip
    groups = heads // key.shape[1]
    scaled = query * (width**-0.5 if scaling is None else scaling)
    rows = scaled.reshape(n, key.shape[1], groups * t, width)
    logits = torch.matmul(rows, key.transpose(-1, -2)).view(n, -1, groups, t, n_keys).float()
    if t > 1:
        later = torch.ones(t, t, dtype=torch.bool, device=query.device).triu(1)
        logits = logits.masked_fill(later, -torch.inf)
    weights = logits.softmax(-1).to(value.dtype).view(n, -1, groups * t, n_keys)
    mixed = torch.matmul(weights, value).view(n, heads, t, value.shape[-1])
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
