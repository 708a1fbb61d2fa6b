"""Checks of columns of log-weights and log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor


def check_log_weights(log_weights: Tensor, name: str = "log_weights") -> Tensor:
    """Return `log_weights` as a detached float64 vector after checking that it is legal.

    Args:
        log_weights: (N,), nats; `-inf` is legal.
        name: the argument's name in the error.

    Raises:
        ValueError: if it is not a vector with at least one entry, or holds NaN or `+inf`.
    """
    lw = torch.as_tensor(log_weights, dtype=torch.float64).detach()
    if lw.ndim != 1 or len(lw) == 0:
        raise ValueError(f"{name} must have shape (N,) with N >= 1, got {tuple(lw.shape)}")
    bad = torch.isnan(lw) | torch.isposinf(lw)
    if bad.any():
        where = int(bad.nonzero()[0])
        raise ValueError(
            f"{name}[{where}] is {lw[where].item()}: finite numbers and -inf are allowed"
            f" ({int(bad.sum())} of {len(lw)} entries are NaN or +inf)"
        )
    return lw


def check_drawn(log_prob: Tensor, name: str) -> Tensor:
    """Return log-probabilities of samples under the distribution they were drawn from.

    Args:
        log_prob: (N,), nats, finite.
        name: the argument's name in the error.

    Raises:
        ValueError: NaN or an infinity.
    """
    checked = check_log_weights(log_prob, name)
    outside = torch.isneginf(checked)
    if outside.any():
        raise ValueError(
            f"{name}[{int(outside.nonzero()[0])}] is -inf: a sample cannot have probability 0"
            " under the distribution it was drawn from"
        )
    return checked


def check_like(log_weights: Tensor, name: str, reference: Tensor) -> Tensor:
    """Return a column that was checked by `check_log_weights` and is as long as `reference`.

    Raises:
        ValueError: NaN, `+inf`, or another length.
    """
    checked = check_log_weights(log_weights, name)
    if len(checked) != len(reference):
        raise ValueError(f"{name} has {len(checked)} samples, the others {len(reference)}")
    return checked
