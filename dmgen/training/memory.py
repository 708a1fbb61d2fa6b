"""How many texts one forward and backward pass has memory for."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from torch import Tensor

from dmgen.models.samples import Samples

# More texts at once make a CPU no faster; a GPU wants large products.
_MOST = {"cpu": 32, "cuda": 1024}
# Of what is free: the backward pass needs room beside what the forward pass keeps for it.
_SHARE = 1 / 4


def micro_batch(policy: Any, samples: Samples) -> int:
    """Texts like those of `samples` whose forward and backward pass fits into free memory.

    What the forward pass keeps for the backward pass is counted on the longest text, tensor by
    tensor, so it holds for any model, precision and length.

    Args:
        policy: a model with `log_prob(samples, grad=True)` and `parameters()`.
        samples: at least one text.

    Returns:
        From 1 to 32 on a CPU, where more at once is no faster, to 1,024 on a GPU.
    """
    device = next(iter(policy.parameters())).device
    longest = int(samples.n_tokens.argmax())
    one, two = (_bytes_kept(policy, samples[[longest] * n]) for n in (1, 2))
    room = int(_SHARE * free_bytes(device)) // max(1, two - one)
    return max(1, min(_MOST.get(device.type, _MOST["cpu"]), room))


def free_bytes(device: torch.device) -> int:
    """Memory of the device that can still be had, in bytes."""
    if device.type == "cuda":
        # What torch holds there without using it is free too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return int(psutil.virtual_memory().available)


def _bytes_kept(policy: Any, samples: Samples) -> int:
    """Bytes that a forward pass keeps for the backward pass, the weights among them."""
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        log_prob = policy.log_prob(samples, grad=True)
    del log_prob  # until here the graph keeps every storage, so that no address comes twice
    return sum(kept.values())
