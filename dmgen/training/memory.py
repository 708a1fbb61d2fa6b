"""The number of texts that one forward and backward pass has memory for."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from torch import Tensor

from dmgen.models.samples import Samples

# More texts at once make a CPU no faster; a GPU needs large products.
_MOST = {"cpu": 32, "cuda": 1024}
# The fraction of the free memory for tensors that the forward pass keeps: the backward pass needs
# memory of its own.
_FRACTION = 1 / 4


def micro_batch(policy: Any, samples: Samples) -> int:
    """Return how many texts like `samples` one forward and backward pass has free memory for.

    The tensors that the forward pass keeps for the backward pass are counted on the longest text,
    for any model, precision and length. The result is between 1 and 32 on a CPU, 1,024 on a GPU.
    """
    device = next(iter(policy.parameters())).device
    longest = int(samples.n_tokens.argmax())
    one, two = (_bytes_kept(policy, samples[[longest] * n]) for n in (1, 2))
    room = int(_FRACTION * free_bytes(device)) // max(1, two - one)
    return max(1, min(_MOST.get(device.type, _MOST["cpu"]), room))


def free_bytes(device: torch.device) -> int:
    """Return the free memory of the device, in bytes."""
    if device.type == "cuda":
        # Memory that torch has reserved and does not use is free too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return int(psutil.virtual_memory().available)


def _bytes_kept(policy: Any, samples: Samples) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, including weights."""
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        log_prob = policy.log_prob(samples, grad=True)
    del log_prob  # until here the graph keeps every storage, so that no address is used twice
    return sum(kept.values())
