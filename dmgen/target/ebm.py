"""`EBM`: the target distribution, a base model under constraints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmgen.constraints.constraint import Moment
from dmgen.constraints.feature import Feature
from dmgen.estimates import weights as log_weights
from dmgen.estimates.score import Score
from dmgen.features.rewards import reward_function
from dmgen.models.protocols import LanguageModel
from dmgen.models.samples import Samples
from dmgen.target import constraint_rows, factor
from dmgen.target.exact import Exact
from dmgen.target.factor import Constraint, constraint_mean
from dmgen.target.feature_cache import FeatureCache
from dmgen.target.fit import TargetFit, fit
from dmgen.target.moment_fit import MomentFit
from dmgen.target.pooling import pool
from dmgen.validation import check_integer


class EBM:
    """The distribution closest to `base` that obeys `constraints`, unnormalised.

    `log P(x) = log a(x) + Σ_j log b_j(x) + λ·φ(x)`, with b_j in {0, 1} one factor a `Pointwise`
    and one λ a `Moment` (Khalifa et al. 2021, eq. 3). λ = ±inf is a hard factor: the binary feature
    must be 1 (0) for every text. `print(target)` shows the constraints and the fit of λ. Two
    targets are equal when their base and `fitted` are.

    Args:
        base: the language model a.
        constraints: `Pointwise` and `Moment` declarations; different features need different names.
        lambdas: one a `Moment`, in their order, nats; use `EBM.fit` to find them.
        prompt: the prompt of every text.
        max_new_tokens: the longest text in tokens; None takes that of the base.

    Attributes:
        fit_samples: the texts that `fit` drew from the base; None for any other target.
        prefix_value: the target's `PrefixValue`, once `PrefixValue.of` has fitted it.

    Raises:
        TypeError: constraints holds something other than constraints.
        ValueError: there are no constraints, two features share a name, the number of lambdas is
            not that of the moments, or one is infinite where no hard factor is meant.
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
        constraints = list(constraints)
        moments = [c for c in constraints if isinstance(c, Moment)]
        if lambdas is None and moments:
            names = ", ".join(repr(m.name) for m in moments)
            raise ValueError(
                f"the moments of {names} need lambdas: use EBM.fit(base, constraints), or pass "
                f"lambdas=[...] with {len(moments)} numbers"
            )
        self.base = base
        self._fitted = TargetFit(
            constraints,
            torch.as_tensor([] if lambdas is None else lambdas, dtype=torch.float64),
            prompt,
            base.max_new_tokens if max_new_tokens is None else max_new_tokens,
        )
        self._features = FeatureCache(self.features)
        # The trainer's first estimate of Z and first batches.
        self.fit_samples: Samples | None = None
        self.prefix_value: Any = None

    @property
    def fitted(self) -> TargetFit:
        """The target beside its base, a value."""
        return self._fitted

    @property
    def constraints(self) -> list[Constraint]:
        """The constraints, in the order given."""
        return list(self.fitted.constraints)

    @property
    def moments(self) -> list[Moment]:
        """The `Moment` constraints, in the order of `lambdas`."""
        return self.fitted.moments

    @property
    def features(self) -> list[Feature]:
        """The features of all constraints, each once."""
        return self.fitted.features

    @property
    def lambdas(self) -> Tensor:
        """λ of the moments, float64 `(K,)`, nats; ±inf for a hard factor."""
        return self.fitted.lambdas

    @property
    def prompt(self) -> str:
        """The prompt of every text."""
        return self.fitted.prompt

    @property
    def max_new_tokens(self) -> int:
        """The longest text in tokens."""
        return self.fitted.max_new_tokens

    @property
    def moment_fit(self) -> MomentFit | None:
        """The fit of λ, a row for each soft `Moment`; None for λ that was passed.

        Its moments and hits are those of the texts that satisfy the pointwise part; log Z and
        KL(p‖a) refer to the whole base.
        """
        return self.fitted.moment_fit

    @property
    def log_z(self) -> Score | None:
        """Log Z against the base for this λ, nats; None if λ was passed."""
        return self.fitted.log_z

    @property
    def base_moments(self) -> Mapping[str, Score]:
        """Mean of each constraint's feature under the base, by the constraint's name.

        It is the mean among the texts with the condition, if there is one; empty if λ was passed.
        """
        return self.fitted.base_moments

    @classmethod
    def fit(
        cls,
        base: LanguageModel,
        constraints: Sequence[Constraint],
        *,
        n_samples: int = 10_240,
        n_heldout: int = 0,
        prompt: str = "",
        max_new_tokens: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        proposal: LanguageModel | None = None,
    ) -> EBM:
        """Return the target whose moments hold, with λ fitted on `n_samples` texts of the base.

        Minimises the convex dual `log E_a[b e^{λ·φ}] − λ·μ̄` (`moments.fit_lambdas`) on the texts
        that satisfy the pointwise part. A `Moment` of a binary feature with target 0 (1) becomes a
        hard factor, λ = -inf (inf).

        Args:
            base: as in `EBM`.
            constraints: as in `EBM`.
            n_samples: texts drawn for the fit.
            n_heldout: texts drawn after them, which do not shape λ, to check the moments on
                (`moment_fit.moments_heldout`); 0 for no check.
            prompt: as in `EBM`.
            max_new_tokens: as in `EBM`.
            seed: as in `LanguageModel.sample`.
            generator: as in `LanguageModel.sample`.
            proposal: model to draw from instead of the base, with weights a/q; for features that
                are rare under the base.

        Raises:
            MomentsUnreachable: no λ gives these moments on the texts; the message says which
                moments and why.
            ValueError: n_samples or n_heldout is out of range, or both seed and generator given.
        """
        check_integer("n_heldout", n_heldout, least=0)
        target = cls(
            base,
            constraints,
            [0.0] * sum(isinstance(c, Moment) for c in constraints),
            prompt=prompt,
            max_new_tokens=max_new_tokens,
        )
        if n_heldout and generator is None:
            # One stream for both draws; the first is equal to that of `seed` alone.
            generator = torch.Generator()
            generator.seed() if seed is None else generator.manual_seed(seed)
            seed = None

        def draw(n: int) -> tuple[Samples, Tensor]:
            model = base if proposal is None else proposal
            limit = target.max_new_tokens
            samples = model.sample(
                n, prompt=prompt, max_new_tokens=limit, seed=seed, generator=generator
            )
            if proposal is None:
                return samples, torch.zeros_like(samples.log_prob)
            return samples, base.log_prob(samples) - samples.log_prob

        samples, log_w = draw(n_samples)
        target._fit(samples, log_w)
        target.fit_samples = samples if proposal is None else None
        if n_heldout:
            samples, log_w = draw(n_heldout)
            target._fitted = target.fitted.with_heldout(target.values(samples), log_w)
        return target

    def refit(self, drawn: Sequence[tuple[LanguageModel, Samples]]) -> EBM:
        """Return a target with the same constraints and λ fitted on the texts of several models.

        All texts are pooled with the balance heuristic: each has the weight a/m, m the mixture of
        the models in proportion to their numbers of texts. For a feature that is rare under the
        base, texts of a trained policy make λ precise:
        `target.refit([(base, target.fit_samples), (policy, policy.sample(10_240,
        prompt=target.prompt, max_new_tokens=target.max_new_tokens))])`.

        Args:
            drawn: models with the texts that each of them drew in its present state; the base may
                be absent. Every text is scored under every model.

        Raises:
            MomentsUnreachable: as in `fit`.
            ValueError: drawn is empty, or texts have another prompt or another longest length.

        Source:
            Veach and Guibas 1995 (balance heuristic), see `log_weights.balance_heuristic`.
        """
        pooled, log_w, strata = pool(drawn, self.base, self.prompt, self.max_new_tokens)
        target = EBM(
            self.base,
            self.constraints,
            [0.0] * len(self.moments),
            prompt=self.prompt,
            max_new_tokens=self.max_new_tokens,
        )
        target._features = self._features
        target._fit(pooled, log_w, strata)
        return target

    def exact(self) -> Exact:
        """Return the exact log Z, moments and distribution, if the base can list its texts.

        Raises:
            TypeError: the base has no `enumerate()`.
            ValueError: no text of the base satisfies the constraints.
        """
        list_texts = getattr(self.base, "enumerate", None)
        if list_texts is None:
            raise TypeError(
                f"exact() needs a base whose texts can be listed, such as TabularLM, not a "
                f"{type(self.base).__name__}: use dmgen.evaluate for estimates"
            )
        samples = list_texts(self.max_new_tokens)
        values = self.values(samples)
        log_score = self.log_score(samples, base_log_prob=samples.log_prob)
        log_z = float(torch.logsumexp(log_score, 0))
        if log_z == -math.inf:
            raise ValueError("no text of the base satisfies the constraints: Z is 0")
        base_moments, moments = (
            {c.name: constraint_mean(c, values, log_w).value for c in self.constraints}
            for log_w in (samples.log_prob, log_score)
        )
        return Exact(samples, samples.log_prob, log_score - log_z, log_z, base_moments, moments)

    def values(self, samples: Samples) -> dict[str, Tensor]:
        """Return feature values, float64 `(N,)`, by feature name; each text is evaluated once.

        Raises:
            FeatureError: a feature raises or returns something other than a finite number.
        """
        return self._features.values(samples.prompts, samples.texts)

    def log_factor(self, values: dict[str, Tensor]) -> Tensor:
        """Return `Σ_j log b_j + λ·φ`, float64 `(N,)`, nats, for feature values by name.

        It is `-inf` where a hard constraint is violated.
        """
        return factor.log_factor(self.constraints, self.lambdas, values)

    def log_score(self, samples: Samples, *, base_log_prob: Tensor | None = None) -> Tensor:
        """Return `log P(x)`, float64 `(N,)`, nats, unnormalised.

        It is `-inf` where a hard constraint is violated or the base assigns probability 0.

        Args:
            samples: texts of any model.
            base_log_prob: log a(x), if it is known; None runs the base on the texts that violate
                no constraint.

        Raises:
            FeatureError: a feature fails, or is not 0 or 1 where it must be.
            ValueError: the base gave NaN or `+inf`.
        """
        log_b = self.log_factor(self.values(samples))
        allowed = log_b > -math.inf
        log_a = torch.zeros_like(log_b)
        if base_log_prob is not None:
            log_a = base_log_prob
        elif allowed.any():
            log_a[allowed] = self.base.log_prob(samples[allowed])
        # Where a constraint is violated, base_log_prob may hold anything, NaN too.
        log_score = torch.where(allowed, log_a + log_b, -math.inf)
        return log_weights.check_log_weights(log_score, "log P") if len(samples) else log_score

    def as_reward(self, beta: float = 1.0, *, floor: float = -20.0) -> Callable[..., list[float]]:
        """Return `r = β (Σ_j log b_j + λ·φ)` as a TRL reward function, one number a completion.

        `E_π[r] − β KL(π‖a) = β log Z − β KL(π‖p)` for every π, so KL-regularised RL from this base
        has p as its optimum: TRL's `RLOOTrainer` with this `beta` and `disable_dropout=True`.
        (`GRPOTrainer` divides by the rewards' deviation and has another KL gradient.)

        Args:
            beta: the trainer's KL coefficient, > 0.
            floor: log-factor of a violated hard constraint, nats, in place of `-inf`, for rewards
                must be finite; the optimum then gives violations a probability of at most
                `e^floor E_a[e^{λ·φ}] / Z`.

        Source:
            Korbak, Elsahar, Kruszewski, Dymetman (2022), arXiv:2206.00761, section 3.
        """

        def log_factors(texts: list[str], prompts: list[str]) -> Tensor:
            values = self._features.values(prompts, texts)
            columns = [
                factor.log_factor([c], torch.tensor([weight], dtype=torch.float64), values)
                for c, weight in factor.with_lambdas(self.constraints, self.lambdas)
            ]
            return torch.stack(columns, dim=1)  # (N, J)

        return reward_function(log_factors, beta=beta, floor=floor)

    def to_dict(self) -> dict[str, Any]:
        """Return the target without its base: names, targets, λ as text, prompt, length."""
        pairs = factor.with_lambdas(self.constraints, self.lambdas)
        return {
            "constraints": [constraint_rows.row(c, weight) for c, weight in pairs],
            "prompt": self.prompt,
            "max_new_tokens": self.max_new_tokens,
        }

    def save(self, folder: str | Path) -> None:
        """Write `target.json` into the folder: everything but the base and `fit_samples`."""
        self.fitted.save(folder)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        base: LanguageModel,
        constraints: Sequence[Constraint] | None = None,
    ) -> EBM:
        """Return the target of a base that `save` wrote; see `TargetFit.from_dict`.

        Raises:
            ValueError: the file is missing or damaged, or holds other constraints.
        """
        return cls.from_fit(base, TargetFit.load(folder, constraints))

    @classmethod
    def from_fit(cls, base: LanguageModel, fit: TargetFit) -> EBM:
        """Return the target of a base and a fit."""
        target = cls(base, fit.constraints, fit.lambdas, max_new_tokens=fit.max_new_tokens)
        target._fitted = fit
        return target

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EBM):
            return NotImplemented
        return self.base == other.base and self.fitted == other.fitted

    def __str__(self) -> str:
        """Return the table of `TargetFit`."""
        return str(self.fitted)

    def _fit(self, samples: Samples, log_w: Tensor, strata: Tensor | None = None) -> None:
        """Fit λ on texts with log-weights a/q."""
        self._fitted = fit(
            self.constraints,
            self.values(samples),
            log_w,
            binary=self._features.binary,
            prompt=self.prompt,
            max_new_tokens=self.max_new_tokens,
            strata=strata,
        )
