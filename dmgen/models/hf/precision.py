"""Computing in half precision with hidden states that add up in float32."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Return the context in which a model computes in `dtype`."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def product_dtype(device: torch.device, default: torch.dtype) -> torch.dtype:
    """Return the precision of products: that of autocast where it is on, else the default."""
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else default


def keep_states_wide(model: Any) -> None:
    """Make a model with half-precision weights add up its hidden states in float32 under autocast.

    Its trainable copy, with float32 weights, is then the same distribution to the last bit if the
    model is a dense transformer. In half precision the residual stream of some models has a few
    entries of many hundreds, beside which the others lose their digits, and log-probabilities of
    single tokens are off by nats.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and _widen not in module._forward_hooks.values():
            module.register_forward_hook(_widen)
        elif isinstance(module, torch.nn.LayerNorm):
            module.float()  # On a CPU, it refuses states wider than its weights.


def _widen(module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    if output.dtype == torch.float32 or not torch.is_autocast_enabled(output.device.type):
        return output
    if not hasattr(module, "embed_scale"):
        return output.float()
    # The embeddings of Gemma are scaled: compute that in float32, as the copy does.
    ids, rows = torch.unique(inputs[0], return_inverse=True)
    wide = copy.copy(module)
    weight = torch.nn.Parameter(module.weight[ids].float(), requires_grad=False)
    wide._parameters = {"weight": weight}
    wide.padding_idx = None
    scaled: Tensor = type(module).forward(wide, rows)
    return scaled
