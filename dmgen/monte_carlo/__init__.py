"""Monte Carlo samplers: texts of a target without training."""

from dmgen.monte_carlo.mcmc import MetropolisHastings
from dmgen.monte_carlo.quasi_rejection import QuasiRejection
from dmgen.monte_carlo.rejection import Rejection
from dmgen.monte_carlo.resampling import ImportanceResampling

__all__ = ["ImportanceResampling", "MetropolisHastings", "QuasiRejection", "Rejection"]
