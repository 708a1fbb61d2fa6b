"""LoRA: low-rank adapters over shared frozen weights."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

_NAME = "default"


def attach(model: Any, *, rank: int, alpha: float, seed: int) -> Any:
    """Return the model with an adapter in every linear layer but the output layer.

    Such a layer computes `W x + (alpha / rank) B A x`. B is initially 0, so the distribution is at
    first that of the model; A is uniform in ±1/sqrt(inputs). Only A and B, in float32, are trained.

    The frozen `model` is not changed: the result is a second tree of modules around its parameters.

    Raises:
        ImportError: peft is not installed.
        ValueError: rank or alpha is not positive, the model is being trained, or it is a mixture of
            experts.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", equation 3.
    Differs from the paper: A is normal there, uniform in the authors' code and here.
    """
    if any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "an adapter shares the weights under it, and this model is being trained: use "
            'base.copy(adapter="lora"), or copy() for a copy of an adapter'
        )
    if rank < 1 or not 0 < alpha < math.inf:
        raise ValueError(
            f"an adapter needs rank >= 1 and a finite alpha > 0, got rank={rank}, alpha={alpha}"
        )
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError('adapters need peft: pip install "dmgen[peft]"') from error
    adapted = _share(model, list(model.parameters()))
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # It is only divided by the rank.
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    # Layers made on the meta device draw nothing from the global generator.
    inject_adapter_in_model(config, adapted, adapter_name=_NAME, low_cpu_mem_usage=True)
    if config.target_parameters:  # Set by peft for experts that are no layers.
        raise ValueError(
            f"no adapter for a mixture of experts, such as {type(model).__name__}: train all "
            "weights, policy = base.copy()"
        )
    generator = torch.Generator().manual_seed(seed)
    for layer in _layers(adapted).values():
        a, b = layer.lora_A[_NAME], layer.lora_B[_NAME]
        device = layer.get_base_layer().weight.device
        uniform = 2 * torch.rand(a.weight.shape, generator=generator) - 1  # (rank, inputs)
        a.weight = torch.nn.Parameter((uniform / math.sqrt(uniform.shape[1])).to(device))
        b.weight = torch.nn.Parameter(torch.zeros(b.weight.shape, device=device))
    return adapted


def duplicate(model: Any) -> Any:
    """Return a model with an independent copy of the adapter over the same frozen weights."""
    return _share(model, [p for p in model.parameters() if not p.requires_grad])


def merged(model: Any) -> Any:
    """Return a plain float32 copy of the model with the adapter added to its weights."""
    plain = copy.deepcopy(model).float()
    for name, layer in _layers(plain).items():
        layer.merge()
        plain.set_submodule(name, layer.get_base_layer())
    return plain


def _layers(model: Any) -> dict[str, Any]:
    """Return the layers that have an adapter, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def _share(model: Any, parameters: list[torch.nn.Parameter]) -> Any:
    """Return a copy of the model that shares these parameters and copies all else."""
    return copy.deepcopy(model, {id(p): p for p in parameters})
