"""Several processes that train one policy: who draws which texts, and what is summed over all.

Started by `accelerate launch --multi_gpu --num_processes 2 ...`, on CPUs too, or by
`torchrun --nproc_per_node 2 ...`: NCCL on GPUs, gloo on CPUs. (`accelerate launch --cpu` starts one
process unless there is MPI.) Each process
draws and differentiates its share of every batch; log-probabilities and feature values, a few
numbers a text, are gathered, so that all processes compute the same statistics from the same
numbers and take the same step.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from accelerate import PartialState
from torch import Tensor, distributed


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Attributes:
        rank: its number, from 0.
        count: how many there are.
        on_cpu: whether what they train is on the CPU, beside a GPU too.
    """

    rank: int = 0
    count: int = 1
    on_cpu: bool = False

    @classmethod
    def here(cls, device: torch.device) -> Processes:
        """What the launcher's environment says; a single process without a launcher.

        Args:
            device: where the policy is.
        """
        if n_launched() == 1:
            return cls()
        return cls(int(os.environ.get("RANK", "0")), n_launched(), device.type == "cpu")

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    def rows(self, n: int) -> range:
        """The rows of a batch of `n` texts that this process draws.

        Raises:
            ValueError: `n` is not a multiple of the number of processes.
        """
        if n % self.count:
            raise ValueError(
                f"a batch of {n} texts cannot be shared by {self.count} processes: make batch_size "
                f"a multiple of {self.count}"
            )
        share = n // self.count
        return range(self.rank * share, (self.rank + 1) * share)

    def gather(self, own: Tensor) -> Tensor:
        """The rows of all processes, `(n, ...)`, in order of rank, from those of this one."""
        if self.count == 1:
            return own
        device = self._state().device
        parts = [torch.empty_like(own, device=device) for _ in range(self.count)]
        distributed.all_gather(parts, own.detach().contiguous().to(device))
        return torch.cat(parts).to(own.device)

    def agree(self, own: Tensor) -> bool:
        """Whether all processes hold the same numbers."""
        return bool((self.gather(own).view(self.count, *own.shape) == own).all())

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replaces each gradient by its sum over all processes."""
        if self.count == 1:
            return
        parameters = list(parameters)
        # A process none of whose texts was kept for the backward pass has no gradient.
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([g.flatten() for g in grads])
        total = flat.to(self._state().device)
        distributed.all_reduce(total)
        total = total.to(flat.device)
        for p, g in zip(parameters, torch.split(total, [g.numel() for g in grads]), strict=True):
            p.grad = g.view_as(p)

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.count > 1:
            self._state().wait_for_everyone()

    def _state(self) -> PartialState:
        """What connects the processes: made when they first speak, unless a caller has made it."""
        ours = not distributed.is_initialized()
        # Without being told, accelerate sees no processes on a machine without a GPU.
        state = PartialState(cpu=self.on_cpu or not torch.cuda.is_available())
        # A thread of gloo's that lets go of its last tensor while the interpreter ends aborts the
        # process, after all work is done. (NCCL's would wait for processes that may have failed.)
        if ours and state.backend == "gloo":
            atexit.register(state.destroy_process_group)
        return state


def n_launched() -> int:
    """How many processes a launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))
