"""`EBM`: the target distribution, a base model under constraints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dmgen import log_weights
from dmgen.constraints import Feature, Moment, Pointwise
from dmgen.models.base import LanguageModel, Samples
from dmgen.moments import MomentFit, MomentsUnreachable, fit_lambdas
from dmgen.score import Score

Constraint = Pointwise | Moment
# Texts whose feature values are remembered; about 100 bytes each beside the text itself.
_CACHED_TEXTS = 100_000


class EBM:
    """The distribution closest to `base` that obeys `constraints`, unnormalised.

    `log P(x) = log a(x) + Σ_j log b_j(x) + λ·φ(x)`, with b_j in {0, 1} one factor a `Pointwise`
    and one λ a `Moment` (Khalifa et al. 2021, eq. 3). λ = ±inf is a hard factor: the binary feature
    must be 1 (0) for every text.

    Args:
        base: the language model a.
        constraints: `Pointwise` and `Moment` declarations; features are told apart by name.
        lambdas: one a `Moment`, in their order, nats; use `EBM.fit` to find them.
        prompt: the prompt of every text.
        max_new_tokens: the longest text in tokens; None takes the base's own.

    Raises:
        ValueError: there are no constraints, two features share a name, or the number of lambdas
            is not that of the moments.
    """

    def __init__(
        self,
        base: LanguageModel,
        constraints: Sequence[Constraint],
        lambdas: Sequence[float] | Tensor | None = None,
        *,
        prompt: str = "",
        max_new_tokens: int | None = None,
    ) -> None:
        self.base = base
        self.constraints = list(constraints)
        self.prompt = prompt
        self.max_new_tokens = base.max_new_tokens if max_new_tokens is None else max_new_tokens
        self.moment_fit: MomentFit | None = None
        # What `fit` drew from the base, scored: it serves as a start for Z and as a first batch.
        self.fit_samples: Samples | None = None
        self.features = _distinct_features(self.constraints)
        self.log_z: Score | None = None  # of P against the base, nats, from the same texts
        self._binary = {feature.name: True for feature in self.features}
        self._cache: dict[tuple[str, str], tuple[float, ...]] = {}
        n_moments = len(self.moments)
        if lambdas is None and n_moments:
            names = ", ".join(repr(m.name) for m in self.moments)
            raise ValueError(
                f"the moments of {names} need lambdas: use EBM.fit(base, constraints), or pass "
                f"lambdas=[...] with {n_moments} numbers"
            )
        self.lambdas = torch.as_tensor([] if lambdas is None else lambdas, dtype=torch.float64)
        if self.lambdas.shape != (n_moments,) or bool(self.lambdas.isnan().any()):
            raise ValueError(
                f"lambdas must be {n_moments} numbers, one for each of "
                f"{[m.name for m in self.moments]}; got {self.lambdas.tolist()}"
            )

    @property
    def moments(self) -> list[Moment]:
        """The `Moment` constraints, in the order of `lambdas`."""
        return [c for c in self.constraints if isinstance(c, Moment)]

    @classmethod
    def fit(
        cls,
        base: LanguageModel,
        constraints: Sequence[Constraint],
        *,
        n_samples: int = 10_240,
        prompt: str = "",
        max_new_tokens: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        proposal: LanguageModel | None = None,
    ) -> EBM:
        """The target whose moments hold, with λ fitted on `n_samples` texts of the base.

        Minimises the convex dual `log E_a[b e^{λ·φ}] − λ·μ̄` (`moments.fit_lambdas`) on the texts
        that satisfy the pointwise part. A `Moment` of a binary feature with target 0 or 1 becomes
        a hard factor (λ = ∓inf). The fit is kept as `.moment_fit`.

        Args:
            n_samples: texts drawn for the fit.
            proposal: draw from this model instead, and weigh with a/q; for features that the base
                hardly ever shows.
            (the others as in `EBM` and `LanguageModel.sample`)

        Raises:
            MomentsUnreachable: no λ gives these moments on what was seen; says which and why.
        """
        n_moments = sum(isinstance(c, Moment) for c in constraints)
        target = cls(
            base, constraints, [0.0] * n_moments, prompt=prompt, max_new_tokens=max_new_tokens
        )
        model = base if proposal is None else proposal
        samples = model.sample(
            n_samples,
            prompt=prompt,
            max_new_tokens=target.max_new_tokens,
            seed=seed,
            generator=generator,
        )
        base_log_prob = samples.log_prob if proposal is None else base.log_prob(samples)
        target._fit(samples, base_log_prob - samples.log_prob)
        target.fit_samples = samples if proposal is None else None
        return target

    def values(self, samples: Samples) -> dict[str, Tensor]:
        """Feature values, float64 `(N,)`, by feature name; each text is looked at once.

        Raises:
            FeatureError: a feature raises or returns something else than a finite number.
        """
        keys = list(zip(samples.prompts, samples.texts, strict=True))
        new = list(dict.fromkeys(key for key in keys if key not in self._cache))
        if len(self._cache) + len(new) > _CACHED_TEXTS:
            new = list(dict.fromkeys(keys))
            self._cache.clear()
        if new:
            texts, prompts = [text for _, text in new], [prompt for prompt, _ in new]
            columns = []
            for feature in self.features:
                column, binary = feature.evaluate(texts, prompts)
                self._binary[feature.name] &= binary
                columns.append(column.tolist())
            self._cache.update(zip(new, zip(*columns, strict=True), strict=True))
        table = torch.tensor([self._cache[key] for key in keys], dtype=torch.float64)  # (N, F)
        return {f.name: table[:, j] for j, f in enumerate(self.features)}

    def log_factor(self, values: dict[str, Tensor]) -> Tensor:
        """`Σ_j log b_j + λ·φ` for feature values by name, float64 `(N,)`, nats; `-inf` is legal."""
        total = torch.zeros(len(next(iter(values.values()))), dtype=torch.float64)
        for constraint, weight in self._with_lambdas():
            if isinstance(constraint, Moment) and math.isfinite(weight):
                total = total + weight * constraint.statistic(values)
            else:
                allowed = _allowed(constraint, values)
                total = total.masked_fill(~allowed, -math.inf)
        return total

    def log_score(self, samples: Samples, *, base_log_prob: Tensor | None = None) -> Tensor:
        """`log P(x)`, float64 `(N,)`, nats, unnormalised; `-inf` where a constraint is violated.

        Args:
            samples: texts of any model.
            base_log_prob: log a(x), where it is known; the base is not run again then. Texts that
                violate a constraint are never scored.
        """
        log_factor = self.log_factor(self.values(samples))
        possible = log_factor > -math.inf
        log_a = torch.zeros_like(log_factor)
        if base_log_prob is not None:
            log_a = base_log_prob
        elif possible.any():
            log_a[possible] = self.base.log_prob(samples[possible])
        # A text that the base cannot say stays -inf; a masked one may hold anything.
        return torch.where(possible, log_a + log_factor, -math.inf)

    def to_dict(self) -> dict[str, Any]:
        """What defines the target beside its base, in plain types: names, targets, λ, prompt."""
        # JSON has no infinity, so λ is text there.
        rows: list[dict[str, Any]] = [
            {"pointwise": c.name}
            if isinstance(c, Pointwise)
            else {"moment": c.name, "target": c.target, "lambda": repr(weight)}
            for c, weight in self._with_lambdas()
        ]
        return {
            "constraints": rows,
            "prompt": self.prompt,
            "max_new_tokens": self.max_new_tokens,
        }

    def _with_lambdas(self) -> list[tuple[Constraint, float]]:
        """Each constraint with its λ, in order; inf for a `Pointwise`."""
        lambdas = iter(self.lambdas.tolist())
        return [(c, next(lambdas) if isinstance(c, Moment) else math.inf) for c in self.constraints]

    def _fit(self, samples: Samples, log_w: Tensor) -> None:
        """Sets λ from texts with log-weights a/q, hardening the moments on an edge."""
        values = self.values(samples)
        for j, moment in enumerate(self.moments):
            on_edge = moment.target in (0.0, 1.0) and self._binary[moment.feature.name]
            self.lambdas[j] = 0.0 if not on_edge else math.inf if moment.target else -math.inf
        log_b = self.log_factor(values)
        if not bool((log_w + log_b > -math.inf).any()):
            raise MomentsUnreachable(self._nothing_satisfies(values))
        soft = self.lambdas.isfinite()
        moments = [m for m, is_soft in zip(self.moments, soft.tolist(), strict=True) if is_soft]
        columns = [m.statistic(values) for m in moments]
        self.moment_fit = fit_lambdas(
            torch.stack(columns, dim=1) if columns else torch.zeros(len(samples), 0),  # (N, K)
            torch.tensor([m.bounds for m in moments], dtype=torch.float64).reshape(-1, 2),
            log_w + log_b,
            names=[m.name for m in moments],
        )
        self.lambdas[soft] = torch.as_tensor(self.moment_fit.lambdas)
        weights = log_w + self.log_factor(values)
        self.log_z = Score(*log_weights.log_z(weights), n=len(samples))

    def _nothing_satisfies(self, values: dict[str, Tensor]) -> str:
        """Why no text was left: how often each hard constraint held by itself."""
        seen = [
            (constraint.name, _allowed(constraint, values))
            for constraint, weight in self._with_lambdas()
            if math.isinf(weight)
        ]
        n = len(seen[0][1])
        held = ", ".join(f"{name!r} {int(ok.sum())} times" for name, ok in seen)
        return (
            f"none of {n:,} texts satisfies every hard constraint ({held}): draw more (n_samples=), "
            "draw from a model that shows them (proposal=), or ask for less"
        )


def _allowed(constraint: Constraint, values: dict[str, Tensor]) -> Tensor:
    """Where a hard constraint holds, bool `(N,)`: a moment on the edge of its binary feature."""
    if isinstance(constraint, Pointwise):
        return constraint.holds(values)
    return constraint.statistic(values) == constraint.bounds[0]


def _distinct_features(constraints: Sequence[Constraint]) -> list[Feature]:
    """The features of all constraints, each once; different ones of one name are refused."""
    if not constraints:
        raise ValueError("an EBM needs at least one Pointwise or Moment, got no constraints")
    features: dict[str, Feature] = {}
    for constraint in constraints:
        if not isinstance(constraint, Pointwise | Moment):
            raise TypeError(
                f"constraints must be Pointwise or Moment, got {constraint!r}; wrap a feature in "
                "dmgen.Pointwise(feature) or dmgen.Moment(feature, target)"
            )
        for feature in constraint.features:
            if features.setdefault(feature.name, feature) != feature:
                raise ValueError(
                    f"two different features are called {feature.name!r}: give one another name="
                )
    return list(features.values())
