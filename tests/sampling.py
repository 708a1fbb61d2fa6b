"""Exact distributions of what the Monte Carlo samplers return, and the samplers by name."""

import math

import torch
from contracts import LEVEL, chi_square_p

from dmgen.constraints.feature import feature
from dmgen.models import TabularLM
from dmgen.monte_carlo.mcmc import MetropolisHastings
from dmgen.monte_carlo.quasi_rejection import QuasiRejection
from dmgen.monte_carlo.rejection import Rejection
from dmgen.monte_carlo.resampling import ImportanceResampling

INF = math.inf
HAS_A = feature(lambda text: "a" in text, name="a")
STARTS_B = feature(lambda text: text.startswith("b"), name="b first")
N = 6000


def log_weights(target, proposal):
    """log q and log P − log q of every text."""
    exact = target.exact()
    log_q = proposal.log_prob(exact.samples)
    return log_q, exact.log_prob + exact.log_z - log_q


def law(log_q, log_r):
    """log of q·r, normalised."""
    return (log_q + log_r).log_softmax(0)


def follows(samples, target, log_prob):
    """Whether the texts follow a law; one of probability 0 is no chance event."""
    space = target.exact().samples
    index = {text: i for i, text in enumerate(space.texts)}
    if any(log_prob[index[text]] == -INF for text in set(samples.texts)):
        return False
    return chi_square_p(samples, space, log_prob) > LEVEL


class Counting(TabularLM):
    """Knows how many texts it drew and scored."""

    n_drawn = n_scored = 0

    def sample(self, n, **options):
        self.n_drawn += n
        return super().sample(n, **options)

    def log_prob(self, samples, **options):
        self.n_scored += len(samples)
        return super().log_prob(samples, **options)


def counting(model):
    return Counting(model.vocab, model.logits, model.max_new_tokens, eos=model.eos)


def transition(log_q, log_w):
    """The matrix K(x, y) of one step; rows of texts with P = 0 are never left nor entered."""
    q, n = log_q.exp(), len(log_q)
    ratio = torch.where(log_w[:, None] > -INF, (log_w - log_w[:, None]).clamp(max=0), -INF)
    moves = q * torch.nan_to_num(ratio, nan=-INF, neginf=-INF).exp()
    stays = 1 - moves.sum(1)
    return moves + torch.diag(stays) if n else moves


SAMPLERS = {
    "quasi": lambda target, proposal, **o: QuasiRejection(target, proposal, 0.5, **o),
    "rejection": Rejection,
    "resampling": lambda target, proposal, **o: ImportanceResampling(
        target, proposal, n_pool=50, **o
    ),
    "chains": lambda target, proposal, **o: MetropolisHastings(
        target, proposal, n_chains=4, burn_in=5, thin=2, **o
    ),
}
