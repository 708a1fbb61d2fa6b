"""Norms and gated layers in few passes over memory, keeping little for the backward pass."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor


def use(model: Any) -> None:
    """Puts `RMSNorm` and `GatedMLP` in the place of the layers of a model that compute the same.

    Whether they do is seen on random states, so that norms that shift their weights, or layers that
    do something else under the same names, stay as they are. The parameters, and their names, are
    those of the model.
    """
    for name, module in list(model.named_modules()):
        ours = None if is_hooked(module) else _norm_like(module) or _mlp_like(module)
        if ours is not None and _same(module, ours):
            model.set_submodule(name, ours.train(module.training))


class RMSNorm(torch.nn.Module):
    """`weight · x / sqrt(mean(x²) + eps)` over the last dimension. Zhang and Sennrich 2019.

    Computed in float32 and rounded once, to the precision of `x` or, under autocast, to that of
    autocast: the linear layers that read it would round it so, each by itself.

    Args:
        weight: `(D,)`; the parameter itself is taken, not a copy.
        eps: above 0.
    """

    def __init__(self, weight: torch.nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Of states `(..., D)`, states of the same shape."""
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        normed: Tensor = _RMSNorm.apply(x, self.weight, self.eps, dtype)  # type: ignore[no-untyped-call]
        return normed

    def extra_repr(self) -> str:
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
        """With `y = x · scale`: `scale (g − y mean(g y))`, where g is the gradient times weight."""
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
    """`down_proj(silu(gate_proj(x)) · up_proj(x))`: SwiGLU. Shazeer 2020.

    The backward pass computes `silu(gate_proj(x))` again, and to the very bits of the plain form.

    Args:
        gate_proj, up_proj, down_proj: the layers themselves are taken, not copies.
    """

    def __init__(
        self, gate_proj: torch.nn.Linear, up_proj: torch.nn.Linear, down_proj: torch.nn.Linear
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    def forward(self, x: Tensor) -> Tensor:
        """Of states `(..., D)`, states of the same shape."""
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
    """Whether something beside the module's class has a say in what it computes."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    # Instances get a `forward` of their own from libraries that move weights about.
    return any(hooks) or "forward" in vars(module)


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "this layer has no second derivative: use CausalLM(..., fast_layers=False)"
        )


def _norm_like(module: Any) -> RMSNorm | None:
    """A norm with the weight and the eps of the module, if it has both and nothing else."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or len(module.state_dict()) != 1:
        return None
    if weight is None or weight.dim() != 1 or not isinstance(eps, float) or eps <= 0:
        return None
    return RMSNorm(weight, eps)


def _mlp_like(module: Any) -> GatedMLP | None:
    """A gated layer of the three layers of the module, if these are all that it has weights in."""
    names = ("gate_proj", "up_proj", "down_proj")
    named = [getattr(module, name, None) for name in names]
    layers = [x for x in named if type(x) is torch.nn.Linear and not is_hooked(x)]
    if len(layers) < len(names):
        return None
    ours = GatedMLP(*layers)
    return ours if ours.state_dict().keys() == module.state_dict().keys() else None


def _same(module: Any, ours: RMSNorm | GatedMLP) -> bool:
    """Whether two layers compute the same, as far as random states tell.

    Small states show the eps of a norm, large ones where a gated layer clamps.
    """
    if isinstance(ours, RMSNorm):
        # In half precision rounding would hide weights that are shifted by 1 and far from 0.
        module = copy.deepcopy(module).float()
        ours = RMSNorm(module.weight, ours.eps)
    weight = next(ours.parameters())
    x = torch.randn(3, 8, weight.shape[-1], generator=torch.Generator().manual_seed(0))
    x = (x * torch.tensor([1.0, 3e-3, 1e3]).view(3, 1, 1)).to(weight)
    try:
        with torch.no_grad():
            found, expected = module(x).float(), ours(x).float()
    except Exception:  # Whatever it is made for, it is no layer of this kind.
        return False
    # A gated layer makes the very same products, a norm sums its squares in another order.
    allowed = 1e-4 if isinstance(ours, RMSNorm) else 0.0
    return torch.allclose(found, expected, rtol=allowed, atol=0.0, equal_nan=True)
