"""Narrow weights, wide states: a model in half precision that is the law of its trainable copy."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor


def keep_states_wide(model: Any) -> None:
    """Under autocast, a model with half-precision weights adds up its states in float32.

    So does its trainable copy, whose weights are float32, and of a dense transformer the two
    compute the very same. A residual stream in half precision is another law: some models carry a
    few states of many hundreds, beside which the others lose their digits, and the log-probability
    of single tokens is off by nats. Outside of autocast the model computes as before.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and _widen not in module._forward_hooks.values():
            module.register_forward_hook(_widen)
        elif isinstance(module, torch.nn.LayerNorm):
            module.float()  # on a CPU, states that are wider than the weights are refused


def _widen(module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    if output.dtype == torch.float32 or not torch.is_autocast_enabled(output.device.type):
        return output
    if not hasattr(module, "embed_scale"):
        return output.float()
    # Gemma's scales what it looks up: in float32, as the copy does.
    ids, rows = torch.unique(inputs[0], return_inverse=True)
    wide = copy.copy(module)
    looked_up = module.weight[ids].float()
    wide._parameters = {"weight": torch.nn.Parameter(looked_up, requires_grad=False)}
    wide.padding_idx = None
    found: Tensor = type(module).forward(wide, rows)
    return found
