"""Log-probabilities of chosen tokens from hidden states, in blocks of the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dmgen.models.hf.precision import product_dtype

# Logits in memory at a time. The allocator reuses the pages of buffers of up to 16 MiB of float32;
# a larger buffer is mapped anew at every call, which costs more than the product that fills it.
_CHUNK = 2**22
# Bytes of probabilities kept for the backward pass: those of 32 texts of 40 tokens among 49,152 in
# bfloat16. Computing them again is a third of the work of this layer.
_KEEP = 2**27
# Narrower blocks of the vocabulary make the matrix products slow.
_MIN_WIDTH = 256


def chosen_log_prob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    *,
    chunk: int = _CHUNK,
    keep: int = _KEEP,
) -> Tensor:
    """Return the log-probability of one token per row under the softmax of a linear output layer.

    The formula is `(hidden @ weight.T + bias).log_softmax(-1)[row, tokens[row]]`, computed in
    blocks of the vocabulary. (With blocks of rows, the gradient of `weight` would be written once
    per block.) The backward pass needs all probabilities: they are kept if they take at most `keep`
    bytes, else each block is computed again.

    Products have the precision of `weight` or, under autocast, that of autocast; logits are
    converted to float32 before the softmax.

    Args:
        hidden: `(M, D)`.
        weight: `(V, D)`; if it is tied to the embedding, their gradients add up.
        bias: `(V,)` or None.
        tokens: long `(M,)`, in 0..V-1.
        chunk: logits in memory at a time.
        keep: bytes of probabilities that may be kept from the forward to the backward pass.

    Returns:
        `(M,)`, nats; float64 for float64 products, else float32.

    Raises:
        RuntimeError: in the backward pass, if a second derivative is requested.
    """
    dtype = product_dtype(hidden.device, weight.dtype)
    n_blocks = math.ceil(len(weight) / max(_MIN_WIDTH, chunk // max(1, len(hidden))))
    width = math.ceil(len(weight) / n_blocks)
    keeps = torch.is_grad_enabled() and len(hidden) * len(weight) * dtype.itemsize <= keep
    result: Tensor = _ChosenLogProb.apply(hidden, weight, bias, tokens, dtype, width, keeps)  # type: ignore[no-untyped-call]
    return result


class _ChosenLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        dtype: torch.dtype,
        width: int,
        keeps: bool,
    ) -> Tensor:
        blocks = _Blocks(hidden, weight, bias, dtype, width)
        chosen = torch.zeros(len(hidden), dtype=blocks.lifted, device=hidden.device)
        tops, sums, kept = [], [], []
        for start, logits in blocks:
            column, inside = _column(tokens, start, logits)
            chosen = torch.where(inside, logits.gather(1, column).squeeze(-1), chosen)
            # All logits of a block may be -inf, by the bias.
            top = logits.amax(-1).clamp_(min=torch.finfo(logits.dtype).min)  # (M,)
            ratios = logits.sub_(top.unsqueeze(-1)).exp_()
            tops.append(top)
            sums.append(ratios.sum(-1))
            if keeps and any(ctx.needs_input_grad):
                kept.append(_without(column, inside, ratios).to(dtype, copy=True))
        top = torch.stack(tops)  # (blocks, M)
        log_z = (torch.stack(sums).log() + top).logsumexp(0)  # (M,)
        result = chosen - log_z
        ctx.save_for_backward(hidden, weight, bias, tokens, log_z, result, top, *kept)
        ctx.dtype, ctx.width = dtype, width
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients; that of a row's logits is `grad (onehot − p)`, p = softmax(logits).

        The entry of the chosen token, `grad (1 − p)`, is computed separately: rounded to the
        precision of the products, it would be 0 for p near 1.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "log-probabilities by blocks of the vocabulary have no second derivative: use "
                "CausalLM(..., chunked_head=False)"
            )
        hidden, weight, bias, tokens, log_z, log_p, top, *kept = ctx.saved_tensors
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        blocks = _Blocks(hidden, weight, bias, ctx.dtype, ctx.width)
        grad = grad.to(blocks.lifted).unsqueeze(-1)  # (M, 1)
        at_token = -grad * torch.expm1(log_p).unsqueeze(-1)
        # Sums over blocks are float32 or wider, whatever the precision of the products.
        to_hidden = at_token * weight[tokens].to(ctx.dtype)
        to_weight = torch.empty_like(weight) if for_weight else None
        to_bias = torch.empty_like(bias) if for_bias else None
        # The factor of a row multiplies its hidden state, not its V probabilities.
        for start, others, scale in (
            _kept(kept, log_z, top) if kept else _again(blocks, log_z, tokens)
        ):
            stop, factor = start + others.shape[1], -grad * scale
            with torch.autocast(hidden.device.type, enabled=False):
                if for_hidden:
                    to_hidden += factor * (others @ weight[start:stop].to(ctx.dtype))
                if to_weight is not None:
                    to_weight[start:stop] = others.T @ (factor * blocks.hidden).to(ctx.dtype)
                if to_bias is not None:
                    to_bias[start:stop] = others.T @ factor.squeeze(-1).to(ctx.dtype)
        if to_weight is not None:
            to_weight.index_add_(0, tokens, (at_token * blocks.hidden).to(to_weight.dtype))
        if to_bias is not None:
            to_bias.index_add_(0, tokens, at_token.squeeze(-1).to(to_bias.dtype))
        narrowed = to_hidden.to(hidden.dtype) if for_hidden else None
        return narrowed, to_weight, to_bias, None, None, None, None


def _kept(kept: list[Tensor], log_z: Tensor, top: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield the blocks of `_again` from the tensors that the forward pass kept."""
    start = 0
    for ratios, scale in zip(kept, (top - log_z).exp_().unsqueeze(-1), strict=True):
        yield start, ratios, scale
        start += ratios.shape[1]


def _again(blocks: _Blocks, log_z: Tensor, tokens: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each block's start and two factors of its probabilities, 0 at the chosen tokens."""
    one = torch.ones_like(log_z).unsqueeze(-1)
    for start, logits in blocks:
        column, inside = _column(tokens, start, logits)
        p = logits.sub_(log_z.unsqueeze(-1)).exp_()
        yield start, _without(column, inside, p).to(blocks.hidden.dtype), one


class _Blocks:
    """The logits of all rows, a block of the vocabulary at a time, in one reused buffer."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, width: int
    ) -> None:
        self.hidden = hidden.to(dtype)
        self.weight, self.bias, self.width = weight, bias, min(width, len(weight))
        self.lifted = torch.promote_types(dtype, torch.float32)

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the start of each block and its logits `(M, C)`, which the caller may overwrite."""
        m, dtype = len(self.hidden), self.hidden.dtype
        product = self.hidden.new_empty(m * self.width)
        lifted = None if dtype == self.lifted else product.to(self.lifted)
        for start in range(0, len(self.weight), self.width):
            weight = self.weight[start : start + self.width].to(dtype)
            out = product[: m * len(weight)].view(m, len(weight))  # (M, C)
            if self.bias is None:
                torch.mm(self.hidden, weight.T, out=out)
            else:
                bias = self.bias[start : start + self.width].to(dtype)
                torch.addmm(bias, self.hidden, weight.T, out=out)
            yield start, out if lifted is None else lifted[: out.numel()].view_as(out).copy_(out)


def _column(tokens: Tensor, start: int, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's column in the block at `start`, `(M, 1)`, and if it is inside, `(M,)`."""
    column, width = tokens - start, logits.shape[1]
    return column.clamp(0, width - 1).unsqueeze(-1), (column >= 0) & (column < width)


def _without(column: Tensor, inside: Tensor, block: Tensor) -> Tensor:
    """Set the chosen tokens that are inside the block to 0, in place."""
    entries = block.gather(1, column)
    return block.scatter_(1, column, entries.masked_fill_(inside.unsqueeze(-1), 0.0))
