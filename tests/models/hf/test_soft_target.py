"""`soft_cross_entropy` equals its definition, values and gradients."""

from __future__ import annotations

import pytest
import torch

from dmgen.models.hf import soft_target
from dmgen.models.hf.soft_target import soft_cross_entropy


def inputs(bias: bool) -> tuple:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    heads = [torch.nn.Linear(width, 11, bias=bias) for width in (5, 4)]
    with torch.no_grad():
        for head in heads:
            for parameter in head.parameters():
                parameter.copy_(normal(*parameter.shape))
    heads[1].requires_grad_(False)
    tilt = (torch.tensor([2, 7, 10]), normal(6, 3))
    soft, hard = normal(6).exp(), normal(6)
    tokens = torch.tensor([0, 2, 7, 10, 3, 2])
    return normal(6, 5).requires_grad_(), heads, normal(6, 4), tilt, soft, hard, tokens


def plain(
    hidden, heads, base_hidden, tilt, soft, hard, tokens
) -> tuple[torch.Tensor, torch.Tensor]:
    log_pi = heads[0](hidden).log_softmax(-1)
    log_m = heads[1](base_hidden).log_softmax(-1)
    if tilt is not None:
        log_m = log_m.index_add(1, tilt[0], tilt[1]).log_softmax(-1)
    chosen = log_pi.gather(1, tokens.unsqueeze(-1)).squeeze(-1)
    return -soft * (log_m.exp() * log_pi).sum(-1) - hard * chosen, chosen


@pytest.mark.parametrize("chunk", [1, 30, 2**22])
@pytest.mark.parametrize("tilted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients(
    bias: bool, tilted: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soft_target, "_CHUNK", chunk)
    hidden, heads, base_hidden, tilt, soft, hard, tokens = inputs(bias)
    tilt = tilt if tilted else None
    trained = [hidden, *heads[0].parameters()]
    results = []
    for loss, log_prob in (
        plain(hidden, heads, base_hidden, tilt, soft, hard, tokens),
        soft_cross_entropy(hidden, heads[0], base_hidden, heads[1], tilt, soft, hard, tokens),
    ):
        results.append([loss, log_prob, *torch.autograd.grad(0.25 * loss.sum(), trained)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_rows_of_different_factors_are_refused() -> None:
    hidden, heads, base_hidden, tilt, soft, hard, tokens = inputs(False)
    loss, _ = soft_cross_entropy(hidden, heads[0], base_hidden, heads[1], tilt, soft, hard, tokens)
    with pytest.raises(RuntimeError, match="one factor"):
        (loss * torch.arange(6)).sum().backward()
