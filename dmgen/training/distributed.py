"""Several processes that train one policy: the texts of each, and the sums over all.

Started by `accelerate launch --multi_gpu --num_processes 2 ...`, on CPUs too, or by
`torchrun --nproc_per_node 2 ...`: NCCL on GPUs, gloo on CPUs. (`accelerate launch --cpu` starts one
process unless there is MPI.) Each process draws and differentiates its part of every batch.
Log-probabilities and feature values, a few numbers a text, are gathered, so that all processes
compute equal statistics and take the same step.
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
        count: number of processes.
        on_cpu: whether the policy is on the CPU, which a machine with a GPU does not rule out.
    """

    rank: int = 0
    count: int = 1
    on_cpu: bool = False

    @classmethod
    def here(cls, device: torch.device) -> Processes:
        """Return the processes of the launcher's environment, for a policy on `device`."""
        if n_launched() == 1:
            return cls()
        return cls(int(os.environ.get("RANK", "0")), n_launched(), device.type == "cpu")

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def rows(self, n: int) -> range:
        """Return this process's rows of a batch of `n` texts.

        Raises:
            ValueError: `n` is not a multiple of the number of processes.
        """
        if n % self.count:
            raise ValueError(
                f"a batch of {n} texts cannot be divided among {self.count} processes: make "
                f"batch_size a multiple of {self.count}"
            )
        n_rows = n // self.count
        return range(self.rank * n_rows, (self.rank + 1) * n_rows)

    def gather(self, local: Tensor) -> Tensor:
        """Return the rows of all processes, `(n, ...)`, in order of rank."""
        if self.count == 1:
            return local
        device = self._state().device
        parts = [torch.empty_like(local, device=device) for _ in range(self.count)]
        distributed.all_gather(parts, local.detach().contiguous().to(device))
        return torch.cat(parts).to(local.device)

    def agree(self, local: Tensor) -> bool:
        """Return whether all processes hold the same numbers."""
        return bool((self.gather(local).view(self.count, *local.shape) == local).all())

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace each gradient by its sum over all processes."""
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
        """Return when all processes have called this."""
        if self.count > 1:
            self._state().wait_for_everyone()

    def _state(self) -> PartialState:
        """Return the connection of the processes, made at the first call or by the caller."""
        ours = not distributed.is_initialized()
        # Without `cpu`, accelerate finds no processes on a machine without a GPU.
        state = PartialState(cpu=self.on_cpu or not torch.cuda.is_available())
        # A thread of gloo that releases its last tensor while the interpreter ends aborts the
        # process, after all work is done. (NCCL would wait for processes that may have failed.)
        if ours and state.backend == "gloo":
            atexit.register(state.destroy_process_group)
        return state


def n_launched() -> int:
    """Return the number of processes that a launcher has started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))
