"""Norms and gated layers in few passes over memory, which keep little for the backward pass."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor


def use_fast_layers(model: Any) -> None:
    """Replace the layers of a model that compute the same as `RMSNorm` or `GatedMLP`.

    The two are compared on random states, so that norms that shift their weights, or other layers
    of the same names, stay as they are. The parameters and their names do not change.
    """
    for name, module in list(model.named_modules()):
        fast = None if is_hooked(module) else _norm_like(module) or _mlp_like(module)
        if fast is not None and _same(module, fast):
            model.set_submodule(name, fast.train(module.training))


class RMSNorm(torch.nn.Module):
    """A layer that computes `weight · x / sqrt(mean(x²) + eps)` over the last dimension.

    The result is computed in float32 and rounded once, to the precision of `x` or, under autocast,
    to that of autocast, to which each linear layer after it would round it.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
    """

    def __init__(self, weight: torch.nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the new states, of the shape of `x`, `(..., D)`."""
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        normed: Tensor = _RMSNorm.apply(x, self.weight, self.eps, dtype)  # type: ignore[no-untyped-call]
        return normed

    def extra_repr(self) -> str:
        """Return the sizes that `print` shows."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)  # (..., 1)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(x, scale).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return `scale (g − y mean(g y))`, with y = x · scale and g = gradient · weight."""
        _refuse_second_derivative()
        x, weight, scale = ctx.saved_tensors
        grad, y = grad.to(scale.dtype), x * scale
        along = grad * y  # (..., D)
        to_weight = None
        if ctx.needs_input_grad[1]:
            to_weight = along.reshape(-1, len(weight)).sum(0).to(weight.dtype)
        inner = along.mul_(weight).mean(-1, keepdim=True)
        to_x = (grad * weight).sub_(y.mul_(inner)).mul_(scale)
        return to_x.to(x.dtype), to_weight, None, None


class GatedMLP(torch.nn.Module):
    """A layer that computes `down_proj(silu(gate_proj(x)) · up_proj(x))`, SwiGLU.

    The backward pass computes `silu(gate_proj(x))` again instead of keeping it; results and
    gradients equal the plain form in all bits. The layers are shared, not copied.

    Source: Shazeer 2020, "GLU Variants Improve Transformer".
    """

    def __init__(
        self, gate_proj: torch.nn.Linear, up_proj: torch.nn.Linear, down_proj: torch.nn.Linear
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    def forward(self, x: Tensor) -> Tensor:
        """Return the new states, of the shape of `x`, `(..., D)`."""
        gated: Tensor = _Gated.apply(self.gate_proj(x), self.up_proj(x))  # type: ignore[no-untyped-call]
        result: Tensor = self.down_proj(gated)
        return result


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        _refuse_second_derivative()
        gate, up = ctx.saved_tensors
        to_up = torch.nn.functional.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), to_up


def is_hooked(module: Any) -> bool:
    """Return whether hooks or a replaced `forward` change the output of a module."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    # Libraries that move weights between devices set `forward` on instances.
    return any(getattr(module, name) for name in names) or "forward" in vars(module)


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "this layer has no second derivative: use CausalLM(..., fast_layers=False)"
        )


def _norm_like(module: Any) -> RMSNorm | None:
    """Return a norm with the weight and the eps of the module if it has these alone, else None."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or len(module.state_dict()) != 1:
        return None
    if weight is None or weight.dim() != 1 or not isinstance(eps, float) or eps <= 0:
        return None
    return RMSNorm(weight, eps)


def _mlp_like(module: Any) -> GatedMLP | None:
    """Return a gated layer of the module's layers if it has weights in no others, else None."""
    names = ("gate_proj", "up_proj", "down_proj")
    members = [getattr(module, name, None) for name in names]
    layers = [x for x in members if type(x) is torch.nn.Linear and not is_hooked(x)]
    if len(layers) < len(names):
        return None
    fast = GatedMLP(*layers)
    return fast if fast.state_dict().keys() == module.state_dict().keys() else None


def _same(module: Any, fast: RMSNorm | GatedMLP) -> bool:
    """Return whether two layers compute the same on random states, small and large ones."""
    if isinstance(fast, RMSNorm):
        # In half precision, rounding would hide a shift by 1 of large weights.
        module = copy.deepcopy(module).float()
        fast = RMSNorm(module.weight, fast.eps)
    weight = next(fast.parameters())
    x = torch.randn(3, 8, weight.shape[-1], generator=torch.Generator().manual_seed(0))
    x = (x * torch.tensor([1.0, 3e-3, 1e3]).view(3, 1, 1)).to(weight)
    try:
        with torch.no_grad():
            expected, y = module(x).float(), fast(x).float()
    except Exception:  # A layer of another kind may raise anything.
        return False
    # A gated layer computes the same products, a norm sums its squares in another order.
    allowed = 1e-4 if isinstance(fast, RMSNorm) else 0.0
    return torch.allclose(expected, y, rtol=allowed, atol=0.0, equal_nan=True)
