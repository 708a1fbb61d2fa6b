"""The weights that a copy trains if it trains the last layers alone."""

from __future__ import annotations

import copy
from typing import Any

import torch

from dmgen.validation import check_integer


def trainable_copy(model: Any, names: set[str], n_layers: int | None) -> Any:
    """Return a float32 copy that trains the weights of these names, or those of the last layers."""
    copied = copy.deepcopy(model).float()
    trained = names if n_layers is None else names_of_last(copied, n_layers)
    for name, parameter in copied.named_parameters():
        parameter.requires_grad_(name in trained)
    return copied


def names_of_last(model: Any, n_layers: int) -> set[str]:
    """Return the names of the weights of the last layers, of what follows them, and of the head.

    Raises:
        ValueError: the model has no list of layers, or fewer than `n_layers`.
    """
    check_integer("last_layers", n_layers, least=0)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
    ]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of layers: leave last_layers out")
    prefix, layers = max(lists, key=lambda item: len(item[1]))
    if n_layers > len(layers):
        raise ValueError(f"last_layers={n_layers}, and the model has {len(layers)} layers")
    head = model.get_output_embeddings().weight
    frozen = {f"{prefix}.{i}." for i in range(len(layers) - n_layers)}
    trained = set()
    for name, parameter in model.named_parameters():
        inside = name.startswith(f"{prefix}.")
        # Tied weights are found once, under the name of the embedding.
        is_other_embedding = not inside and parameter.dim() > 1 and parameter is not head
        if not is_other_embedding and not any(name.startswith(part) for part in frozen):
            trained.add(name)
    return trained
