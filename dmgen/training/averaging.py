"""An exponential average of the policy's weights, which takes their place outside of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dmgen.training.state import TrainState


def update_average(state: TrainState, decay: float) -> None:
    """Add the weights to the average, after the step that begins at `state.step`."""
    weights = state.policy.state_dict()
    if not state.average:
        state.average = {k: v.clone() for k, v in weights.items()}
    # Early on, a plain mean over all steps so far, which are fewer than the decay averages over.
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
    """Show the average during a with block."""
    show_average(state)
    try:
        yield
    finally:
        hide_average(state)


def _swap(state: TrainState) -> None:
    weights = {k: v.clone() for k, v in state.policy.state_dict().items()}
    state.policy.load_state_dict(state.average)
    state.average, state.average_shown = weights, not state.average_shown
