"""An exponential average of the policy's weights, which takes their place outside of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dmgen.training.state import TrainState

__all__ = ["hide_average", "show_average", "shown_average", "update_average"]


def update_average(state: TrainState, decay: float | None) -> None:
    """Count the weights after the step that begins at `state.step`; nothing where decay is None."""
    if decay is None:
        return
    weights = state.policy.state_dict()
    if not state.average:
        state.average = {k: v.clone() for k, v in weights.items()}
    # Early on, an average over all steps so far: the decay's own horizon is not reached yet.
    decay = min(decay, state.step / (state.step + 1))
    for name, value in weights.items():
        state.average[name].lerp_(value, 1 - decay)


def show_average(state: TrainState) -> None:
    """Put the average into the policy, if there is one."""
    if state.average and not state.average_shown:
        _swap(state)


def hide_average(state: TrainState) -> None:
    """Put the policy's own weights back."""
    if state.average_shown:
        _swap(state)


@contextmanager
def shown_average(state: TrainState) -> Iterator[None]:
    """Show the average for the time of a with block."""
    show_average(state)
    try:
        yield
    finally:
        hide_average(state)


def _swap(state: TrainState) -> None:
    own = {k: v.clone() for k, v in state.policy.state_dict().items()}
    state.policy.load_state_dict(state.average)
    state.average, state.average_shown = own, not state.average_shown
