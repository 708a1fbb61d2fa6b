"""`MomentFit`: lambda with its errors, and the checks of the columns it is fitted on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dmgen.estimates import weights as lw_module
from dmgen.estimates.score import Score
from dmgen.table import aligned
from dmgen.target.plain import plain

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False, kw_only=True)
class MomentFit:
    """The fit of lambda with its errors. Arrays are float64 with one entry per feature (K).

    Errors are first order in 1/√n (sandwich and delta method, over the randomness of the sample)
    and treat the samples as independent. They are unreliable below an ESS of about 100 or 10 hits.
    Two fits are equal when all their numbers are, NaN counting as equal to NaN.

    Attributes:
        lambdas, lambdas_stderr: the fit and its error; both 0 for an interval that is not active.
            With collinear features only lambda·phi is determined: this is the smallest lambda
            (each in half-ranges of its feature), with its error.
        moments: moments of p on the fitting sample, equal to the targets by construction.
        moments_stderr: error of `moments` as an estimate of the true moments of the fitted p; to
            first order also the error of a fresh estimate from as many samples.
        base_moments, base_moments_stderr: moments of the base on the samples with positive weight.
        targets: (K,), or (K, 2) for intervals.
        hits: number of samples of positive weight whose feature is not 0; for a conditional moment,
            whose statistic is not 0.
        log_z, log_z_stderr: `logsumexp(lw + lambda·phi) - logsumexp(lw)`, nats.
        kl_target_base, kl_target_base_stderr: KL(p‖a) = lambda·target - log Z, nats.
        ess: effective number of samples under p.
        n_samples, n_steps: number of samples; number of evaluations of the dual.
        rank: how many features are linearly independent (up to a constant) on the samples.
        moments_heldout, moments_heldout_stderr: moments of p on fresh samples, see `with_heldout`.
    """

    lambdas: Array
    lambdas_stderr: Array
    moments: Array
    moments_stderr: Array
    log_z: float
    log_z_stderr: float
    kl_target_base: float
    kl_target_base_stderr: float
    ess: float
    n_steps: int
    targets: Array
    base_moments: Array
    base_moments_stderr: Array
    hits: NDArray[np.int64]
    n_samples: int
    rank: int
    names: tuple[str, ...]
    moments_heldout: Array | None = None
    moments_heldout_stderr: Array | None = None

    def n_samples_for(self, stderr: float) -> NDArray[np.int64]:
        """Return the number of samples at which each lambda has this standard error, (K,).

        Errors shrink with the root of the number of samples: `n (lambdas_stderr / stderr)²`. The
        result is as reliable as `lambdas_stderr`, so after few hits a rough guess.

        Raises:
            ValueError: stderr is not positive, or the fit has no error (a single sample).
        """
        if not stderr > 0:
            raise ValueError(f"stderr must be positive, got {stderr}")
        if not np.isfinite(self.lambdas_stderr).all():
            raise ValueError("the fit has no finite error of lambda to extrapolate from")
        needed = np.ceil(self.n_samples * (self.lambdas_stderr / stderr) ** 2)
        return needed.astype(np.int64)

    def with_heldout(self, features: Any, log_weights: Any = None) -> MomentFit:
        """Return this fit with the moments of p estimated on samples that did not shape lambda.

        Their distance from the target has the error of the fit and of the estimate in it:
        `√(moments_stderr² + moments_heldout_stderr²)`.

        Args:
            features: (M, K), the same features on fresh samples.
            log_weights: (M,), log a - log q of those samples, nats; None if drawn from the base.

        Raises:
            ValueError: shapes that do not fit, NaN or inf.
        """
        phi, lw = checked_columns(features, log_weights)
        if phi.shape[1] != len(self.lambdas):
            raise ValueError(f"features must have {len(self.lambdas)} columns, got {phi.shape[1]}")
        tilted = torch.from_numpy(lw + phi @ self.lambdas)
        value, stderr = lw_module.mean(tilted, torch.from_numpy(phi))
        return replace(self, moments_heldout=value.numpy(), moments_heldout_stderr=stderr.numpy())

    def __str__(self) -> str:
        """Return a table, a row per feature, with ESS, log Z, KL(p‖a) and rank below."""

        def scores(values: Array, errors: Array) -> list[str]:
            pairs = zip(values, errors, strict=True)
            return [str(Score(float(v), float(e), self.n_samples)) for v, e in pairs]

        columns = {
            "feature": list(self.names),
            "base moment": scores(self.base_moments, self.base_moments_stderr),
            "target": [target_text(t) for t in self.targets],
            "lambda": scores(self.lambdas, self.lambdas_stderr),
            "reached": scores(self.moments, self.moments_stderr),
        }
        if self.moments_heldout is not None and self.moments_heldout_stderr is not None:
            columns["held out"] = scores(self.moments_heldout, self.moments_heldout_stderr)
        columns["hits"] = [f"{hits:,}" for hits in self.hits]
        table = aligned([list(columns), *map(list, zip(*columns.values(), strict=True))])
        log_z = Score(self.log_z, self.log_z_stderr, self.n_samples)
        kl = Score(self.kl_target_base, self.kl_target_base_stderr, self.n_samples)
        return (
            f"{table}\nESS {self.ess:,.0f} of {self.n_samples:,} samples · log Z {log_z} · "
            f"KL(p‖a) {kl} nats · rank {self.rank} of {len(self.names)} · {self.n_steps} steps"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain values for JSON; NaN and infinities are text."""
        return {field.name: plain(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> MomentFit:
        """Return the fit that `to_dict` wrote, equal to the original.

        Raises:
            ValueError: a field is missing or unknown.
        """

        def read(name: str, value: Any) -> Any:
            if isinstance(value, list):
                return np.array(value, dtype=np.int64 if name == "hits" else np.float64)
            return float(value) if isinstance(value, str) else value

        values = {name: read(name, value) for name, value in mapping.items() if name != "names"}
        try:
            return cls(names=tuple(mapping["names"]), **values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is not a moment fit: {error}") from error

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MomentFit):
            return NotImplemented
        return self.to_dict() == other.to_dict()


def target_text(target: Any) -> str:
    """Return a target or interval as text: "0.5", "0.4 to 0.6"."""
    return " to ".join(f"{edge:g}" for edge in np.unique(target))


def as_array(x: Any) -> Array:
    """Return numbers, numpy or torch, as a float64 array."""
    if isinstance(x, torch.Tensor):
        x = x.detach().to("cpu", torch.float64).numpy()
    return np.asarray(x, dtype=np.float64)


def checked_columns(features: Any, log_weights: Any) -> tuple[Array, Array]:
    """Return features (N, K) and log-weights (N,) as float64 arrays; zeros for None.

    Raises:
        ValueError: the shapes disagree, a feature is not finite, or a weight is NaN or +inf.
    """
    phi = as_array(features)
    if phi.ndim != 2 or len(phi) == 0:
        raise ValueError(f"features must have shape (N, K) with N >= 1, got {phi.shape}")
    # A sum is finite only if all are; the slow search runs only on bad input.
    if not math.isfinite(float(phi.sum())) and not np.isfinite(phi).all():
        row, column = np.argwhere(~np.isfinite(phi))[0]
        raise ValueError(f"features[{row}, {column}] is {phi[row, column]}: it must be finite")
    if log_weights is None:
        return phi, np.zeros(len(phi))
    lw = lw_module.check_log_weights(log_weights).cpu().numpy()
    if len(lw) != len(phi):
        raise ValueError(f"log_weights must have shape ({len(phi)},), got ({len(lw)},)")
    return phi, lw
