"""`Draws`: texts of a proposal with log P − log q, independent of the batches they are drawn in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from scipy.stats import chi2
from torch import Tensor

from dmgen.estimates.score import Score
from dmgen.estimates.weights import Weights, check_log_weights
from dmgen.models.protocols import Sampler
from dmgen.models.random_draws import stream
from dmgen.models.samples import Samples
from dmgen.target.ebm import EBM
from dmgen.validation import check_integer

# A search stops early if the probability to finish it within max_draws is below this.
_UNLIKELY = 1e-6


class Draws:
    """A target, a proposal, and texts of the proposal with their log P − log q.

    Attributes:
        n_drawn: number of texts drawn from the proposal so far, for any purpose: the cost.
    """

    def __init__(self, target: EBM, proposal: Sampler, *, batch_size: int) -> None:
        if not isinstance(target, EBM) or not isinstance(proposal, Sampler):
            raise TypeError(
                "a Monte Carlo sampler takes an EBM and a model to draw from, in this "
                f"order; got {type(target).__name__} and {type(proposal).__name__}"
            )
        check_integer("batch_size", batch_size, least=1)
        self.target, self.proposal, self.batch_size = target, proposal, batch_size
        self.n_drawn = 0
        self._diagnostics: dict[str, Score] | None = None

    def _draw(self, n: int, generator: torch.Generator) -> Samples:
        self.n_drawn += n
        return self.proposal.sample(
            n,
            prompt=self.target.prompt,
            max_new_tokens=self.target.max_new_tokens,
            generator=generator,
        )

    def _batches(self, n: int, generator: torch.Generator) -> Iterator[Samples]:
        """Yield n texts, one batch at a time."""
        for start in range(0, n, self.batch_size):
            yield self._draw(min(self.batch_size, n - start), generator)

    def _log_weights(self, samples: Samples) -> Tensor:
        """Return log P − log q, `(N,)`; `-inf` where P = 0."""
        known = samples.log_prob if self.proposal is self.target.base else None
        log_score = self.target.log_score(samples, base_log_prob=known)
        return check_log_weights(log_score - samples.log_prob)

    def _pool(self, n: int, purpose: str, seed: int | None) -> tuple[Samples, Weights]:
        """Return n texts with their weights P/q.

        Raises:
            RuntimeError: no text has P > 0.
        """
        parts = list(self._batches(n, stream(purpose, seed)))
        log_w = torch.cat([self._log_weights(part) for part in parts])
        if bool((log_w == -math.inf).all()):
            raise RuntimeError(_none_in_support(n))
        return Samples.cat(parts), Weights(log_w)

    def _last_diagnostics(self) -> dict[str, Score]:
        if self._diagnostics is None:
            raise RuntimeError("nothing was sampled yet: diagnostics() describes the last sample()")
        return self._diagnostics

    def _accepted(
        self,
        n: int,
        log_accept: Callable[[Samples], Tensor],
        *,
        max_draws: int,
        purpose: str,
        seed: int | None,
    ) -> Samples:
        """Return the first n accepted texts of the proposal's stream.

        A text is accepted with probability r. Texts and coins come from separate streams, so
        neither depends on the batches.

        Raises:
            RuntimeError: it would take more than `max_draws` texts; names the rate and a remedy.
        """
        texts, coins = stream(purpose, seed), stream(f"{purpose}: coins", seed)
        parts: list[Samples] = []
        n_drawn = n_in_support = n_accepted = 0
        while n_accepted < n:
            # Poisson limit of the mean count.
            most = float(chi2.isf(_UNLIKELY, 2 * n_accepted + 2)) / 2
            if n_drawn >= max_draws or n * n_drawn > most * max_draws:
                raise RuntimeError(_too_few(n, n_drawn, n_in_support, n_accepted, max_draws))
            # As many as the rate so far requires; ever more before the first acceptance.
            guess = math.ceil((n - n_accepted) * (n_drawn + 1) / (n_accepted + 1))
            drawn = self._draw(min(guess, self.batch_size, max_draws - n_drawn), texts)
            log_r = log_accept(drawn)
            u = torch.rand(len(drawn), generator=coins, dtype=torch.float64)
            parts.append(drawn[torch.log(u) < log_r])
            # Every draw counts, also those accepted beyond the n requested.
            n_drawn += len(drawn)
            n_in_support += int((log_r > -math.inf).sum())
            n_accepted += len(parts[-1])
        return Samples.cat(parts)[:n]


def _too_few(n: int, n_drawn: int, n_in_support: int, n_accepted: int, max_draws: int) -> str:
    if not n_in_support:
        return _none_in_support(n_drawn)
    rate = n_accepted / n_drawn
    needed = f"about {n / rate:,.0f}" if n_accepted else "far more"
    return (
        f"{n_accepted:,} of {n_drawn:,} texts of the proposal were accepted (rate {rate:.2g}; "
        f"{n_in_support:,} have P > 0), so {n:,} would take {needed} draws, more than "
        f"max_draws={max_draws:,}: draw from a policy trained on this target (proposal=), accept "
        "more of them (a smaller beta, a higher acceptance_rate), request fewer texts, or raise "
        "max_draws"
    )


def _none_in_support(n_drawn: int) -> str:
    return (
        f"none of {n_drawn:,} texts of the proposal has P > 0: draw from a model that satisfies "
        "the hard constraints (proposal=), such as a policy trained on this target, or draw more"
    )
