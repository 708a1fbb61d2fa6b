"""An output layer of which a few rows are trained, and nothing else."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

# Adam moves each weight by about the learning rate. A row of the output layer bears, and needs,
# a larger change than a weight inside a layer.
_SCALE = 7.0


class OutputRows(torch.nn.Module):
    """A frozen linear output layer whose rows of some tokens have a trainable change.

    The probabilities of all other tokens relative to one another stay what they were.
    """

    def __init__(self, head: Any, ids: Tensor) -> None:
        super().__init__()
        self.base = head
        self.register_buffer("ids", ids.clone())
        width = head.weight.shape[1]
        self.change = torch.nn.Parameter(torch.zeros(len(ids), width, device=head.weight.device))

    @property
    def in_features(self) -> int:
        """The width of the hidden states."""
        return int(self.base.in_features)

    @property
    def weight(self) -> Tensor:
        """The weights with the change added, `(V, D)`."""
        change = (_SCALE * self.change).to(self.base.weight)
        weight: Tensor = self.base.weight.index_add(0, self.ids, change)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the layer."""
        bias: Tensor | None = self.base.bias
        return bias

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the logits."""
        return torch.nn.functional.linear(hidden, self.weight, self.bias)


def train_rows(model: Any, ids: Tensor) -> None:
    """Replace the output layer of a model by one whose rows `ids` can be trained.

    Raises:
        ValueError: the model has no linear output layer, or an id is none of its tokens.
    """
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        raise ValueError(f"{type(model).__name__} has no linear output layer: leave rows out")
    if not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= len(head.weight):
        raise ValueError(f"rows must be ids of the model's {len(head.weight)} tokens, got {ids}")
    # The embedding, if it is tied, is trained no more: its rows would change what is read too.
    head.requires_grad_(False)
    model.set_output_embeddings(OutputRows(head, ids.to(head.weight.device)))


def merged_rows(model: Any) -> Any:
    """Return a plain copy of the model with the change added to an output layer of its own."""
    rows = model.get_output_embeddings()
    if not isinstance(rows, OutputRows):
        return model
    plain = copy.deepcopy(model)
    weight, bias = rows.weight.detach().clone(), rows.bias
    head = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    head.weight = torch.nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        head.bias = torch.nn.Parameter(bias.detach().clone(), requires_grad=False)
    plain.set_output_embeddings(head)
    # The embedding of the tokens that are read stays what it was.
    plain.config.tie_word_embeddings = False
    return plain
