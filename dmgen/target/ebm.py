"""`EBM`: the target distribution, a base model under constraints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.constraints.feature import Feature
from dmgen.estimates import weights as log_weights
from dmgen.estimates.score import Score
from dmgen.features.rewards import reward_function
from dmgen.models.protocols import LanguageModel
from dmgen.models.samples import Samples
from dmgen.target import factor
from dmgen.target.exact import Exact
from dmgen.target.factor import Constraint, constraint_mean
from dmgen.target.moments import MomentFit

# Texts whose feature values are remembered; about 100 bytes each beside the text itself.
_CACHED_TEXTS = 100_000


class EBM:
    """The distribution closest to `base` that obeys `constraints`, unnormalised.

    `log P(x) = log a(x) + Σ_j log b_j(x) + λ·φ(x)`, with b_j in {0, 1} one factor a `Pointwise`
    and one λ a `Moment` (Khalifa et al. 2021, eq. 3). λ = ±inf is a hard factor: the binary feature
    must be 1 (0) for every text. `print(target)` shows what is asked and how λ was found.

    Args:
        base: the language model a.
        constraints: `Pointwise` and `Moment` declarations; features are told apart by name.
        lambdas: one a `Moment`, in their order, nats; use `EBM.fit` to find them.
        prompt: the prompt of every text.
        max_new_tokens: the longest text in tokens; None takes the base's own.

    Attributes (None, or empty, unless made by `fit` or `refit`):
        moment_fit: how λ was found, a row a soft `Moment`. Its moments and hits are those of the
            texts that satisfy the pointwise part; log Z and KL(p‖a) refer to the whole base.
        log_z: log Z against the base, nats, for this very λ.
        base_moments: mean of each constraint's feature under the base, by the constraint's name;
            among the texts with its condition if it has one.
        fit_samples: what `fit` drew from the base.

    Raises:
        TypeError: something else than a constraint is among the constraints.
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
        self.base = base
        self.constraints = list(constraints)
        self.prompt = prompt
        self.max_new_tokens = int(base.max_new_tokens if max_new_tokens is None else max_new_tokens)
        self.features = _distinct_features(self.constraints)
        self.moment_fit: MomentFit | None = None
        self.log_z: Score | None = None
        self.base_moments: dict[str, Score] = {}
        # They serve the trainer as a start for Z and as first batches.
        self.fit_samples: Samples | None = None
        self._binary = {feature.name: True for feature in self.features}
        self._cache: dict[tuple[str, str], tuple[float, ...]] = {}
        if lambdas is None and self.moments:
            names = ", ".join(repr(m.name) for m in self.moments)
            raise ValueError(
                f"the moments of {names} need lambdas: use EBM.fit(base, constraints), or pass "
                f"lambdas=[...] with {len(self.moments)} numbers"
            )
        self.lambdas = _checked_lambdas([] if lambdas is None else lambdas, self.moments)

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
        n_heldout: int = 0,
        prompt: str = "",
        max_new_tokens: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        proposal: LanguageModel | None = None,
    ) -> EBM:
        """The target whose moments hold, with λ fitted on `n_samples` texts of the base.

        Minimises the convex dual `log E_a[b e^{λ·φ}] − λ·μ̄` (`moments.fit_lambdas`) on the texts
        that satisfy the pointwise part. A `Moment` of a binary feature with target 0 (1) becomes a
        hard factor, λ = -inf (inf).

        Args:
            n_samples: texts drawn for the fit.
            n_heldout: texts drawn after them, of which λ knows nothing, to check the moments on
                (`moment_fit.moments_heldout`); 0 for no check.
            proposal: draw from this model instead, and weigh with a/q; for features that the base
                hardly ever shows.
            (the others as in `EBM` and `LanguageModel.sample`)

        Raises:
            MomentsUnreachable: no λ gives these moments on what was seen; says which and why.
            ValueError: n_samples or n_heldout is out of range, or both seed and generator given.
        """
        if n_heldout < 0:
            raise ValueError(f"n_heldout must be at least 0, got {n_heldout}")
        target = cls(
            base,
            constraints,
            [0.0] * sum(isinstance(c, Moment) for c in constraints),
            prompt=prompt,
            max_new_tokens=max_new_tokens,
        )
        if n_heldout and generator is None:
            # One stream for both draws; the first is what `seed` alone would give.
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
            target._check_heldout(*draw(n_heldout))
        return target

    def refit(self, drawn: Sequence[tuple[LanguageModel, Samples]]) -> EBM:
        """A new target with the same constraints and λ fitted on the texts of several models.

        All texts are pooled with the balance heuristic: each counts with a/m, m the mixture of the
        models in proportion to how many texts each gave. A feature that the base shows twice in
        10,000 texts is nailed down once a better model has been trained:
        `target.refit([(base, target.fit_samples), (policy, policy.sample(10_240, prompt=...,
        max_new_tokens=...))])`, both as the target has them.

        Args:
            drawn: models with the texts that each of them drew, as it is now; the base may be
                absent. Every text is scored under every model.

        Raises:
            MomentsUnreachable: as in `fit`.
            ValueError: nothing was given, or texts of another prompt or another longest length.

        Source: Veach and Guibas 1995 (balance heuristic), see `log_weights.balance_heuristic`.
        """
        if not drawn:
            raise ValueError("refit needs at least one (model, samples)")
        parts = [own for _, own in drawn]
        pooled = Samples.cat(parts)
        if set(pooled.prompts) != {self.prompt}:
            raise ValueError(
                f"the target's prompt is {self.prompt!r}, but the samples continue "
                f"{sorted(set(pooled.prompts))}: draw them with prompt=target.prompt"
            )
        lengths = sorted({part.tokens.shape[1] for part in parts})
        if lengths != [self.max_new_tokens]:
            raise ValueError(
                f"the target's texts have at most {self.max_new_tokens} tokens, but the samples "
                f"were drawn with at most {lengths}: draw them with "
                "max_new_tokens=target.max_new_tokens"
            )
        # Under the model that drew it, the log-probability of a text is recorded and exact.
        columns = [
            torch.cat([s.log_prob if i == m else model.log_prob(s) for i, s in enumerate(parts)])
            for m, (model, _) in enumerate(drawn)
        ]
        known = [c for c, (model, _) in zip(columns, drawn, strict=True) if model is self.base]
        log_base = known[0] if known else self.base.log_prob(pooled)
        counts = torch.tensor([len(part) for part in parts])
        log_w = log_weights.balance_heuristic(log_base, torch.stack(columns, dim=1), counts)
        target = EBM(
            self.base,
            self.constraints,
            [0.0] * len(self.moments),
            prompt=self.prompt,
            max_new_tokens=self.max_new_tokens,
        )
        # The same features: what they said of a text is not asked again.
        target._cache, target._binary = self._cache, self._binary
        target._fit(pooled, log_w, torch.arange(len(parts)).repeat_interleave(counts))
        return target

    def exact(self) -> Exact:
        """The exact log Z, moments, divergences and distribution, if the base can list its texts.

        Raises:
            TypeError: the base has no `enumerate()`.
            ValueError: no text of the base satisfies the constraints.
        """
        list_texts = getattr(self.base, "enumerate", None)
        if list_texts is None:
            raise TypeError(
                f"exact() needs a base whose texts can be listed, such as TabularLM, and a "
                f"{type(self.base).__name__} cannot: use dmgen.evaluate for estimates"
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
        """Feature values, float64 `(N,)`, by feature name; each text is looked at once.

        Raises:
            FeatureError: a feature raises or returns something else than a finite number.
        """
        return self._values(samples.prompts, samples.texts)

    def _values(self, prompts: Sequence[str], texts: Sequence[str]) -> dict[str, Tensor]:
        keys = list(zip(prompts, texts, strict=True))
        new = list(dict.fromkeys(key for key in keys if key not in self._cache))
        if new:
            texts, prompts = [text for _, text in new], [prompt for prompt, _ in new]
            columns = []
            for feature in self.features:
                column, binary = feature.evaluate(texts, prompts)
                self._binary[feature.name] &= binary
                columns.append(column.tolist())
            self._cache.update(zip(new, zip(*columns, strict=True), strict=True))
        table = torch.tensor([self._cache[key] for key in keys], dtype=torch.float64)
        table = table.reshape(len(keys), len(self.features))  # (N, F), for no texts too
        for key in list(islice(self._cache, max(0, len(self._cache) - _CACHED_TEXTS))):
            del self._cache[key]  # the oldest first
        return {f.name: table[:, j] for j, f in enumerate(self.features)}

    def log_factor(self, values: dict[str, Tensor]) -> Tensor:
        """`Σ_j log b_j + λ·φ` for feature values by name, float64 `(N,)`, nats; `-inf` is legal."""
        return factor.log_factor(self.constraints, self.lambdas, values)

    def log_score(self, samples: Samples, *, base_log_prob: Tensor | None = None) -> Tensor:
        """`log P(x)`, float64 `(N,)`, nats, unnormalised; `-inf` where a constraint is violated.

        Args:
            samples: texts of any model.
            base_log_prob: log a(x), where it is known; the base is not run again then. Texts that
                violate a constraint are never scored.

        Raises:
            FeatureError: a feature fails, or is not 0 or 1 where it must be.
            ValueError: the base gave NaN or `+inf`.
        """
        log_b = self.log_factor(self.values(samples))
        possible = log_b > -math.inf
        log_a = torch.zeros_like(log_b)
        if base_log_prob is not None:
            log_a = base_log_prob
        elif possible.any():
            log_a[possible] = self.base.log_prob(samples[possible])
        # A text that the base cannot say stays -inf; a masked one may hold anything.
        log_score = torch.where(possible, log_a + log_b, -math.inf)
        return log_weights.check_log_weights(log_score, "log P") if len(samples) else log_score

    def as_reward(self, beta: float = 1.0, *, floor: float = -20.0) -> Callable[..., list[float]]:
        """`r = β (Σ_j log b_j + λ·φ)` as a reward function of TRL's kind, one number a completion.

        `E_π[r] − β KL(π‖a) = β log Z − β KL(π‖p)` for every π, so KL-regularised RL from this base
        has p as its optimum: TRL's `RLOOTrainer` with this `beta` and `disable_dropout=True`.
        (`GRPOTrainer` divides by the rewards' deviation and has another KL gradient.)

        Args:
            beta: the trainer's KL coefficient, > 0.
            floor: rewards must be finite, so a violated hard constraint counts `floor`, nats, not
                `-inf`; the optimum then gives violations at most `e^floor E_a[e^{λ·φ}] / Z`.

        Source: Korbak, Elsahar, Kruszewski, Dymetman (2022), arXiv:2206.00761, section 3.
        """

        def log_factors(texts: list[str], prompts: list[str]) -> Tensor:
            values = self._values(prompts, texts)
            columns = [
                factor.log_factor([c], torch.tensor([weight], dtype=torch.float64), values)
                for c, weight in factor.with_lambdas(self.constraints, self.lambdas)
            ]
            return torch.stack(columns, dim=1)  # (N, J)

        return reward_function(log_factors, beta=beta, floor=floor)

    def to_dict(self) -> dict[str, Any]:
        """What defines the target beside its base, in plain types: names, targets, λ, prompt."""
        # JSON has no infinity, so λ is text there.
        rows: list[dict[str, Any]] = [
            {"pointwise": c.name}
            if isinstance(c, Pointwise)
            else {"moment": c.name, "target": c.target, "lambda": repr(weight)}
            for c, weight in factor.with_lambdas(self.constraints, self.lambdas)
        ]
        return {
            "constraints": rows,
            "prompt": self.prompt,
            "max_new_tokens": self.max_new_tokens,
        }

    def __str__(self) -> str:
        """What is asked, how often the base does it already, and how λ was found."""
        width = max(len(c.name) for c in self.constraints)
        lines = []
        for constraint, weight in factor.with_lambdas(self.constraints, self.lambdas):
            base = self.base_moments.get(constraint.name)
            line = f"{constraint.name:{width}}  {_asked(constraint):16}"
            line += "" if base is None else f"  base {base!s:18}"
            lines.append(line + ("  hard" if math.isinf(weight) else f"  lambda {weight:.4g}"))
        fit = self.moment_fit
        if fit is None:
            lines += [] if self.log_z is None else [f"log Z {self.log_z}"]
            return "\n".join(lines)
        soft = factor.soft_moments(self.constraints, self.lambdas)
        if soft:
            lines += ["", str(fit)]
        else:
            kl = Score(fit.kl_target_base, fit.kl_target_base_stderr, fit.n_samples)
            lines.append(
                f"ESS {fit.ess:,.0f} of {fit.n_samples:,} samples · log Z {self.log_z} · "
                f"KL(p‖a) {kl} nats"
            )
        if soft and len(soft) < len(self.constraints):
            lines.append("base moments and hits are those of texts that satisfy what is hard")
        lines += [
            f"{m.name!r} is the mean of {m.given.name} · ({m.feature.name} − {m.target:g})"
            for m in soft
            if m.given is not None
        ]
        return "\n".join(lines)

    def _fit(self, samples: Samples, log_w: Tensor, strata: Tensor | None = None) -> None:
        """Sets λ, and what is known about it, from texts with log-weights a/q."""
        values = self.values(samples)
        found = factor.fit(self.constraints, values, log_w, binary=self._binary, strata=strata)
        self.lambdas, self.moment_fit = found.lambdas, found.moment_fit
        self.log_z, self.base_moments = found.log_z, found.base_moments

    def _check_heldout(self, samples: Samples, log_w: Tensor) -> None:
        """Fills the held-out moments of the fit from texts that did not shape λ."""
        if self.moment_fit is None:
            return
        values = self.values(samples)
        hard_part = torch.where(self.lambdas.isfinite(), 0.0, self.lambdas)
        log_w = log_w + factor.log_factor(self.constraints, hard_part, values)
        soft = factor.soft_moments(self.constraints, self.lambdas)
        self.moment_fit = self.moment_fit.with_heldout(factor.statistics(soft, values), log_w)


def _asked(constraint: Constraint) -> str:
    """What a constraint asks for, in a word or two."""
    if isinstance(constraint, Pointwise):
        return "every text"
    if isinstance(constraint.target, tuple):
        return "mean {:g} to {:g}".format(*constraint.target)
    return f"mean {constraint.target:g}"


def _checked_lambdas(lambdas: Sequence[float] | Tensor, moments: Sequence[Moment]) -> Tensor:
    """λ as float64 `(K,)`: one a moment, infinite only where that is a hard factor."""
    checked = torch.as_tensor(lambdas, dtype=torch.float64).clone()
    if checked.shape != (len(moments),) or bool(checked.isnan().any()):
        raise ValueError(
            f"lambdas must be {len(moments)} numbers, one for each of "
            f"{[m.name for m in moments]}; got {checked.tolist()}"
        )
    for moment, weight in zip(moments, checked.tolist(), strict=True):
        if math.isinf(weight) and factor.hard_edge(moment) != weight:
            raise ValueError(
                f"lambda {weight} makes {moment.name!r} a hard factor, which needs a binary "
                f"feature with target 1 (lambda inf) or 0 (lambda -inf), not {moment.target}"
            )
    return checked


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
