"""Log-probabilities of chosen tokens from hidden states, without the logits of all tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Logits held at a time. Up to 16 MiB of float32 the allocator hands the same pages out again; a
# larger buffer is mapped anew at every call, which costs more than the product that fills it.
_CHUNK = 2**22
# Narrower blocks of the vocabulary make the matrix products slow.
_MIN_WIDTH = 256


def chosen_log_prob(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, *, chunk: int = _CHUNK
) -> Tensor:
    """Log-probability of one token a row under the softmax of a linear output layer.

    Plainly: `(hidden @ weight.T + bias).log_softmax(-1)[row, tokens[row]]`. The vocabulary is taken
    in blocks, and the backward pass computes each block again, so that about `chunk` logits are in
    memory at a time instead of M·V. By blocks of the vocabulary, not of the rows: so each row of
    the weight's gradient is written once. Where all logits are few, at most two chunks, the forward
    pass keeps the probabilities and nothing is computed twice.

    Products are made in the precision of `weight` or, under autocast, in that of autocast; logits
    are lifted to float32 before anything else happens to them.

    Args:
        hidden: `(M, D)`.
        weight: `(V, D)`; it may be tied to the embedding, which then gets both gradients.
        bias: `(V,)` or None.
        tokens: long `(M,)`, in 0..V-1.
        chunk: logits held at a time.

    Returns:
        `(M,)`, nats; float64 for float64 products, else float32.

    Raises:
        RuntimeError: in the backward pass, if a second derivative is asked for.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    few = len(hidden) * len(weight) <= 2 * chunk
    width = len(weight) if few else max(_MIN_WIDTH, chunk // max(1, len(hidden)))
    result: Tensor = _ChosenLogProb.apply(hidden, weight, bias, tokens, dtype, width)  # type: ignore[no-untyped-call]
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
    ) -> Tensor:
        blocks = _Blocks(hidden, weight, bias, dtype, width)
        chosen = torch.zeros(len(hidden), dtype=blocks.lifted, device=hidden.device)
        sums = []
        for start, logits in blocks:
            column, inside = _column(tokens, start, logits)
            found = logits.gather(1, column.unsqueeze(-1)).squeeze(-1)
            chosen = torch.where(inside, found, chosen)
            # A block may hold nothing but -inf: tokens that a bias forbids.
            top = logits.amax(-1).clamp_(min=torch.finfo(logits.dtype).min)  # (M,)
            total = logits.sub_(top.unsqueeze(-1)).exp_().sum(-1)
            sums.append(total.log().add_(top))
        log_z = torch.stack(sums).logsumexp(0)  # (M,)
        keep = len(sums) == 1 and any(ctx.needs_input_grad)
        p = logits.div_(total.unsqueeze(-1)) if keep else None  # (M, V)
        ctx.save_for_backward(hidden, weight, bias, tokens, log_z, p)
        ctx.dtype, ctx.width = dtype, width
        return chosen - log_z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With `p = softmax(logits)`, the gradient for a row's logits is `grad (onehot − p)`."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "log-probabilities by blocks of the vocabulary have no second derivative: use "
                "CausalLM(..., chunked_head=False)"
            )
        hidden, weight, bias, tokens, log_z, p = ctx.saved_tensors
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        blocks = _Blocks(hidden, weight, bias, ctx.dtype, ctx.width)
        grad = grad.to(blocks.lifted)
        # Sums over blocks are kept in the wide type, whatever that of the products.
        to_hidden = torch.zeros(hidden.shape, dtype=blocks.lifted, device=hidden.device)
        to_weight = torch.empty_like(weight) if for_weight else None
        to_bias = torch.empty_like(bias) if for_bias else None
        scale = -grad.unsqueeze(-1)
        again = ((at, x.sub_(log_z.unsqueeze(-1)).exp_().mul_(scale)) for at, x in blocks)
        for start, slope in again if p is None else [(0, p * scale)]:  # slope is (M, C)
            stop = start + slope.shape[1]
            column, inside = _column(tokens, start, slope)
            slope.scatter_add_(
                1, column.unsqueeze(-1), torch.where(inside, grad, 0.0).unsqueeze(-1)
            )
            if to_bias is not None:
                to_bias[start:stop] = slope.sum(0)
            with torch.autocast(hidden.device.type, enabled=False):
                narrow = slope.to(ctx.dtype)
                if for_hidden:
                    to_hidden += narrow @ weight[start:stop].to(ctx.dtype)
                if to_weight is not None:
                    to_weight[start:stop] = narrow.T @ blocks.hidden
        narrowed = to_hidden.to(hidden.dtype) if for_hidden else None
        return narrowed, to_weight, to_bias, None, None, None


class _Blocks:
    """The logits of all rows, a block of the vocabulary at a time, in one buffer used again."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, width: int
    ) -> None:
        self.hidden = hidden.to(dtype)
        self.weight, self.bias, self.width = weight, bias, min(width, len(weight))
        self.lifted = torch.promote_types(dtype, torch.float32)

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """Where the block starts, and its logits `(M, C)`, which the caller may overwrite."""
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
    """Column of each row's token in a block that begins at `start`, and whether it is there."""
    column, width = tokens - start, logits.shape[1]
    return column.clamp(0, width - 1), (column >= 0) & (column < width)
