"""`Rollout`: batches of texts drawn from the proposal, the base, or the texts of the fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from dmgen.models.samples import Samples
from dmgen.training.batch import Batch
from dmgen.training.proposal import log_mixture_with_base
from dmgen.training.setup import Setup
from dmgen.training.state import TrainState


class Source(Protocol):
    """A source of training data."""

    def batches(self, state: TrainState) -> Iterator[Batch]:
        """Yield batches without end, each made from the state at its request."""
        ...


@dataclass(frozen=True, eq=False)
class Rollout:
    """Draw each batch from the current proposal, with a fraction of the base if requested."""

    setup: Setup

    def batches(self, state: TrainState) -> Iterator[Batch]:
        """Yield batches without end, see `Source`."""
        while True:
            yield self.draw(state)

    def draw(self, state: TrainState) -> Batch:
        """Return the texts of one step with log P, log q, features, and log a, log π if known."""
        setup = self.setup
        local = self._from_fit(state) or self._from_models(state)
        target, gather = setup.target, setup.processes.gather
        if "base_hidden" in setup.objective.needs:
            hidden = target.base.hidden_states(local.texts)
            local = replace(local, base=target.base, base_hidden=hidden)
        tokens = setup.objective.draw_columns(state, local, target)
        if "log_base" in tokens:
            local = replace(local, log_base=tokens["log_base"].sum(-1))
        log_score = target.log_score(local.texts, base_log_prob=local.log_base)
        return replace(
            local,
            log_q=gather(local.log_q),
            log_score=gather(log_score),
            features={k: gather(v) for k, v in target.values(local.texts).items()},
            log_policy=None if local.log_policy is None else gather(local.log_policy),
            log_base=None if local.log_base is None else gather(local.log_base),
            tokens={k: gather(v) for k, v in tokens.items()},
            first=setup.rows.start,
        )

    def _from_fit(self, state: TrainState) -> Batch | None:
        """Return the next whole batch of the texts that λ was fitted on, or None."""
        setup = self.setup
        config, texts = setup.config, setup.target.fit_samples
        first = state.step * config.batch_size
        if not config.first_batches_from_fit or texts is None:
            return None
        if first + config.batch_size > len(texts):
            return None
        samples = texts[first + setup.rows.start : first + setup.rows.stop]
        return Batch(
            samples.log_prob,
            samples,
            log_base=samples.log_prob,
            sources=((setup.target.base, 1.0),),
            is_new=False,  # the running Z began with the texts of the fit
            # They are the base's, whatever the proposal is.
            from_proposal=setup.proposal(state) is setup.target.base,
        )

    def _from_models(self, state: TrainState) -> Batch:
        """Return this process's texts, freshly drawn."""
        setup, proposal = self.setup, self.setup.proposal(state)
        target, size = setup.target, setup.config.batch_size
        n_base = 0 if proposal is target.base else setup.config.n_base
        drawn = draw_rows(
            [(target.base, n_base), (proposal, size - n_base)],
            setup.rows,
            prompt=target.prompt,
            max_new_tokens=target.max_new_tokens,
            generator=state.generator,
        )
        if n_base:
            return self._mixture(drawn, proposal, n_base / size, proposal is state.policy)
        samples = drawn[0][1]
        log_q = samples.log_prob
        return Batch(
            log_q,
            samples,
            log_base=log_q if proposal is target.base else None,
            log_policy=log_q if proposal is state.policy else None,
            sources=((proposal, 1.0),),
        )

    def _mixture(
        self, drawn: Sequence[tuple[Any, Samples]], proposal: Any, fraction: float, on_policy: bool
    ) -> Batch:
        """Return the texts of proposal and base, or of either, as a batch from their mixture."""
        base = self.setup.target.base

        def score(model: Any) -> Tensor:
            return torch.cat([s.log_prob if m is model else model.log_prob(s) for m, s in drawn])

        log_base, log_proposal = score(base), score(proposal)
        log_q = log_mixture_with_base(log_proposal, log_base, fraction)
        samples = replace(Samples.cat([s for _, s in drawn]), log_prob=log_q)
        return Batch(
            log_q,
            samples,
            log_base=log_base,
            log_policy=log_proposal if on_policy else None,
            sources=((proposal, 1 - fraction), (base, fraction)),
        )


def draw_rows(
    parts: Sequence[tuple[Any, int]],
    rows: range,
    *,
    prompt: str,
    max_new_tokens: int,
    generator: torch.Generator,
) -> list[tuple[Any, Samples]]:
    """Return the texts of `rows` from a draw of n texts of each model in `parts`, in their order.

    Text i depends on row i of the uniforms alone, and the generator passes over those of other
    processes, so that all processes together draw the texts of a single one.
    """
    drawn, first = [], 0
    for model, n in parts:
        start, stop = (min(max(edge - first, 0), n) for edge in (rows.start, rows.stop))
        _skip(start, max_new_tokens, generator)
        if start < stop:
            texts = model.sample(
                stop - start, prompt=prompt, max_new_tokens=max_new_tokens, generator=generator
            )
            drawn.append((model, texts))
        _skip(n - stop, max_new_tokens, generator)
        first += n
    return drawn


def _skip(n: int, length: int, generator: torch.Generator) -> None:
    """Draw the uniforms of `n` texts and leave them unused."""
    if n > 0:
        torch.rand(n, length, generator=generator, dtype=torch.float64, device=generator.device)
