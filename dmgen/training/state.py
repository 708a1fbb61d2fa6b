"""`TrainState`: everything a training run is at one moment, and its form on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from dmgen.estimates.running_z import RunningZ
from dmgen.models.samples import Samples
from dmgen.training.health import Health
from dmgen.training.memory import micro_batch

__all__ = ["TrainState", "copy_in_one_block"]


@dataclass(eq=False)
class TrainState:
    """The one mutable object of training.

    Attributes:
        policy: the model that is trained.
        optimizer: over the policy's trainable weights, and the objective's.
        generator: source of every random number of the run.
        rate: peak step size by now.
        z: running estimate of Z over everything drawn.
        z_before: `z` as it was when it was last compared.
        z_round: of the texts since then alone.
        compared: log P/q and log π/q of the texts since the proposal was last replaced, `(2, M)`.
        objective: state of the objective's own, by name.
        proposal: the frozen copy of the policy that texts come from; None before the first one.
        average: average of the policy's weights by name, or the policy's own weights while
            `average_shown`; empty where none is kept.
        average_shown: whether the policy holds the average.
        health: what has been seen of, and said about, failing runs.
        micro_batch_size: texts a forward and backward pass; None until it is found.
        step: steps taken.
        n_drawn: texts used.
        seconds: time in steps.
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
        """Return how many texts one forward and backward pass takes; found once."""
        if self.micro_batch_size is None:
            self.micro_batch_size = micro_batch(self.policy, samples)
        return self.micro_batch_size

    def state_dict(self) -> dict[str, Any]:
        """Return every field as tensors and plain values, nested in dicts by name."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Fill every field in place from what `state_dict` returned."""
        for f in fields(self):
            setattr(self, f.name, self._loaded(f.name, saved[f.name]))

    def _loaded(self, name: str, saved: Any) -> Any:
        """Return the value of a field; models, optimizer and objective are filled in place."""
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
            state = {
                int(i): {k: v.clone() for k, v in entries.items()} for i, entries in saved.items()
            }
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
    """Return tensors and plain values in place of an object."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, torch.optim.Optimizer):
        state = value.state_dict()["state"]
        return {
            str(i): {k: torch.as_tensor(v) for k, v in entries.items()}
            for i, entries in state.items()
        }
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in fields(value)}
    if hasattr(value, "state_dict"):
        return value.state_dict()
    return value


def tensors_of(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested dicts with their dotted names."""
    for key, value in tree.items():
        if isinstance(value, Tensor):
            yield prefix + key, value
        elif isinstance(value, Mapping):
            yield from tensors_of(value, f"{prefix}{key}.")


def copy_in_one_block(policy: Any) -> Any:
    """Return a copy of the policy whose weights lie in one block of memory.

    One by one they would fill the gaps that a step's activations have left in the heap, and those
    of the next step would need more room.
    """
    copied = policy.copy()
    weights = list(copied.parameters())
    if len({(p.dtype, p.device) for p in weights}) == 1:
        block = torch.cat([p.detach().flatten() for p in weights])
        parts = torch.split(block, [p.numel() for p in weights])
        for p, part in zip(weights, parts, strict=True):
            p.data = part.view_as(p)
    return copied
