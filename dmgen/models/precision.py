"""Narrow weights, wide states: a model in half precision that is the law of its trainable copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def keep_states_wide(model: Any) -> None:
    """Under autocast, a model with half-precision weights adds up its states in float32.

    So does its trainable copy, whose weights are float32, and the two compute the very same. A
    residual stream in half precision is another law: some models carry a few states of many
    hundreds, beside which the others lose their digits, and the log-probability of single tokens is
    off by nats. Outside of autocast the model computes as before.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and _widen not in module._forward_hooks.values():
            module.register_forward_hook(_widen)
        elif isinstance(module, torch.nn.LayerNorm):
            module.float()  # on a CPU, states that are wider than the weights are refused


def _widen(module: Any, inputs: Any, output: Tensor) -> Tensor:
    return output.float() if torch.is_autocast_enabled(output.device.type) else output
