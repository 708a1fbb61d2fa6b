"""`TrainState`: everything that changes during a training run, and its form on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from dmgen.estimates.running_z import RunningZ
from dmgen.models.samples import Samples
from dmgen.training.health import Health
from dmgen.training.memory import micro_batch


@dataclass(eq=False)
class TrainState:
    """The only mutable object of training; a checkpoint holds all of its fields.

    Attributes:
        policy: the model that is trained.
        optimizer: over the policy's trainable weights, and the objective's.
        generator: source of every random number of the run.
        rate: current peak step size.
        z: running estimate of Z over all texts drawn.
        z_before: `z` at its last comparison.
        z_round: the estimate from the texts since then alone.
        compared: log P/q and log π/q of the texts since the proposal was last replaced, `(2, M)`.
        objective: the objective's own state, by name.
        proposal: the frozen copy of the policy that texts come from; None before the first one.
        average: average of the policy's weights by name, or the policy's own weights while
            `average_shown`; empty where none is kept.
        average_shown: whether the policy holds the average.
        health: signs of a failing run so far, and the warnings already given.
        micro_batch_size: texts in a forward and backward pass; None until it is measured.
        step: steps taken.
        n_drawn: texts used.
        seconds: time spent in steps.
        history: a row of metrics a step.
    """

    policy: Any
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    rate: float
    z: RunningZ
    z_before: RunningZ
    z_round: RunningZ = field(default_factory=RunningZ)
    compared: Tensor = field(default_factory=lambda: torch.empty(2, 0, dtype=torch.float64))
    objective: dict[str, Tensor] = field(default_factory=dict)
    proposal: Any = None
    average: dict[str, Tensor] = field(default_factory=dict)
    average_shown: bool = False
    health: Health = field(default_factory=Health)
    micro_batch_size: int | None = None
    step: int = 0
    n_drawn: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Everything that is trained."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def micro_batch(self, samples: Samples) -> int:
        """Return the number of texts of a forward and backward pass, measured once."""
        if self.micro_batch_size is None:
            self.micro_batch_size = micro_batch(self.policy, samples)
        return self.micro_batch_size

    def state_dict(self) -> dict[str, Any]:
        """Return every field as a tensor, a dict of tensors, or plain values."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Fill every field, models in place, from the result of `state_dict`."""
        for f in fields(self):
            setattr(self, f.name, self._loaded(f.name, saved[f.name]))

    def _loaded(self, name: str, saved: Any) -> Any:
        """Return the value of a field; models, optimiser and objective are filled in place."""
        value = getattr(self, name)
        if name == "proposal":
            if not saved:
                return None
            value = copy_in_one_block(self.policy)
        if name == "average":
            weights = self.policy.state_dict()
            # A copy: one tensor of a mapped file would keep all of it in memory.
            return {k: v.to(weights[k], copy=True) for k, v in saved.items()}
        if name == "objective":
            with torch.no_grad():
                for key, tensor in saved.items():
                    value[key].copy_(tensor)
        elif isinstance(value, torch.Generator):
            value.set_state(saved)
        elif isinstance(value, torch.optim.Optimizer):
            state: dict[int, dict[str, Tensor]] = {}
            for key, tensor in saved.items():
                i, _, entry = key.partition(".")
                state.setdefault(int(i), {})[entry] = tensor.clone()
            groups = value.state_dict()["param_groups"]
            value.load_state_dict({"state": state, "param_groups": groups})
        elif isinstance(value, Tensor):
            return saved.clone()
        elif is_dataclass(value) and not isinstance(value, type):
            return type(value)(**saved)
        elif hasattr(value, "load_state_dict"):
            value.load_state_dict(saved)
        else:
            return saved
        return value


def _plain(value: Any) -> Any:
    """Return the tensors or plain values of a field."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, torch.optim.Optimizer):
        state = value.state_dict()["state"]
        return {
            f"{i}.{name}": torch.as_tensor(entry)
            for i, entries in state.items()
            for name, entry in entries.items()
        }
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in fields(value)}
    if hasattr(value, "state_dict"):
        return value.state_dict()
    return value


def copy_in_one_block(policy: Any) -> Any:
    """Return a copy of the policy whose weights lie in one block of memory.

    Allocated one by one, they would fill the gaps that the activations of a step leave in the heap,
    and the activations of the next step would need more memory.
    """
    copied = policy.copy()
    weights = list(copied.parameters())
    if len({(p.dtype, p.device) for p in weights}) == 1:
        block = torch.cat([p.detach().flatten() for p in weights])
        parts = torch.split(block, [p.numel() for p in weights])
        for p, part in zip(weights, parts, strict=True):
            p.data = part.view_as(p)
    return copied
