"""The contract of all samplers: batches, seeds, costs and refusals."""

import math

import contracts
import pytest
import torch
from sampling import (
    HAS_A,
    INF,
    SAMPLERS,
    STARTS_B,
    N,
    counting,
    follows,
    law,
    log_weights,
    transition,
)

from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.constraints.feature import FeatureError, feature
from dmgen.models import LanguageModel, Samples, TabularLM
from dmgen.monte_carlo import acceptance
from dmgen.monte_carlo.mcmc import MetropolisHastings
from dmgen.monte_carlo.quasi_rejection import QuasiRejection
from dmgen.monte_carlo.rejection import Rejection
from dmgen.monte_carlo.resampling import ImportanceResampling
from dmgen.target.ebm import EBM

LENGTH = feature(len, name="length")


NEVER = feature(lambda text: False, name="never")


@pytest.mark.parametrize("name", SAMPLERS)
def test_texts_do_not_depend_on_the_batch_size(target, proposal, name):
    whole = SAMPLERS[name](target, proposal, batch_size=1024).sample(60, seed=3)
    for batch_size in (1, 7, 60):
        parts = SAMPLERS[name](target, proposal, batch_size=batch_size).sample(60, seed=3)
        assert parts.texts == whole.texts
        assert torch.equal(parts.tokens, whole.tokens)
        assert torch.equal(parts.mask, whole.mask)
        torch.testing.assert_close(parts.log_prob, whole.log_prob, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["quasi", "chains"])
def test_coins_know_nothing_of_the_texts(name):
    """Of texts of one token, each takes one uniform, as its coin does: were it the same one, tokens
    early in the vocabulary would be accepted always, and late ones never."""
    base = TabularLM.random("abc", 1, scale=0.5, seed=0)
    target = EBM(base, [Moment(HAS_A, 0.5), Moment(STARTS_B, 0.2)], [0.5, -0.5])
    log_q, log_w = log_weights(target, base)
    if name == "quasi":
        sampler = QuasiRejection(target, base, 2.0)
        expected = law(log_q, acceptance.log_acceptance(log_w, math.log(2.0)))
    else:
        sampler = MetropolisHastings(target, base, n_chains=N, burn_in=0, thin=1)
        expected = (log_q.exp() @ transition(log_q, log_w)).log()
    assert follows(sampler.sample(N, seed=0), target, expected)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_seed_owns_the_randomness(target, proposal, name):
    before = contracts.global_states()
    sampler = SAMPLERS[name](target, proposal)
    first, again, other = (sampler.sample(40, seed=seed) for seed in (1, 1, 2))
    assert first.texts == again.texts
    assert first.texts != other.texts
    free = [sampler.sample(40) for _ in range(2)]
    assert free[0].texts != free[1].texts
    sampler.diagnostics()
    assert before == contracts.global_states()


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_draw_is_counted(target, proposal, name):
    drawn = counting(proposal)
    sampler = SAMPLERS[name](target, drawn, batch_size=16)
    for seed in range(3):
        sampler.sample(30, seed=seed)
        assert sampler.n_drawn == drawn.n_drawn >= 30
    sampler.diagnostics()
    assert sampler.n_drawn == drawn.n_drawn


@pytest.mark.parametrize("name", SAMPLERS)
def test_where_p_is_zero_everywhere_the_error_says_so(world, proposal, name):
    target = EBM(world, [Pointwise(NEVER)])
    sampler = SAMPLERS[name](target, proposal)
    if name != "resampling":
        sampler.max_draws = 2000
    with pytest.raises(RuntimeError, match=r"none of .* has P > 0.*proposal=.*trained.*draw more"):
        sampler.sample(10, seed=0)
    assert sampler.n_drawn <= 2000


def test_where_p_is_zero_everywhere_no_beta_is_chosen_and_nothing_diagnosed(world, proposal):
    target = EBM(world, [Pointwise(NEVER)])
    with pytest.raises(RuntimeError, match="none of 300 texts of the proposal has P > 0"):
        QuasiRejection(target, proposal, acceptance_rate=0.1, n_estimation=300)
    for sampler in (
        QuasiRejection(target, proposal, 1.0, n_estimation=300),
        Rejection(target, proposal, n_estimation=300),
    ):
        with pytest.raises(RuntimeError, match="none of 300 texts of the proposal has P > 0"):
            sampler.diagnostics()


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    ("n", "error", "message"),
    [
        (0, ValueError, "n must be at least 1, got 0"),
        (-3, ValueError, "n must be at least 1, got -3"),
        (2.0, TypeError, "n must be a whole number, got 2.0"),
        (True, TypeError, "n must be a whole number, got True"),
        (None, TypeError, "n must be a whole number, got None"),
    ],
)
def test_the_number_of_texts_must_be_a_positive_whole_number(
    target, proposal, name, n, error, message
):
    with pytest.raises(error, match=message):
        SAMPLERS[name](target, proposal).sample(n)


@pytest.mark.parametrize("name", SAMPLERS)
def test_arguments_are_refused_when_made(target, proposal, name):
    make = SAMPLERS[name]
    with pytest.raises(TypeError, match=r"an EBM and a model to draw from.*TabularLM and EBM"):
        make(proposal, target)
    with pytest.raises(TypeError, match="got EBM and str"):
        make(target, "gpt2")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        make(target, proposal, batch_size=0)
    with pytest.raises(TypeError, match="temperature"):
        make(target, proposal, temperature=0.5)
    if name != "resampling":
        with pytest.raises(ValueError, match="max_draws must be"):
            make(target, proposal, max_draws=0)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (Rejection, {"n_estimation": 0}, "n_estimation must be"),
        (ImportanceResampling, {"n_pool": 0}, "n_pool must be at least 1"),
        (MetropolisHastings, {"n_chains": 0}, "n_chains must be"),
        (MetropolisHastings, {"thin": 0}, "thin must be"),
        (MetropolisHastings, {"burn_in": -1}, "burn_in must be at least 0"),
        (MetropolisHastings, {"burn_in": 1.5}, "burn_in must be a whole number"),
    ],
)
def test_sizes_are_refused_when_made(target, proposal, make, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make(target, proposal, **arguments)


class Reporting(TabularLM):
    """Draws honestly and reports one log-probability for all."""

    reported = 0.0

    def sample(self, n, **options):
        drawn = super().sample(n, **options)
        log_prob = torch.full((n,), self.reported, dtype=torch.float64)
        return Samples(drawn.tokens, drawn.mask, log_prob, drawn.texts, drawn.prompts)


WEIGHING = [name for name in SAMPLERS if name != "rejection"]


@pytest.mark.parametrize("name", WEIGHING)
def test_a_proposal_that_says_what_it_cannot_say_is_refused(target, proposal, name):
    liar = Reporting(proposal.vocab, proposal.logits, 3, eos=".")
    liar.reported = -INF
    with pytest.raises(ValueError, match=r"log_weights\[\d+\] is (nan|inf)"):
        SAMPLERS[name](target, liar).sample(20, seed=0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_nan_of_the_proposal_is_refused(target, proposal, name):
    broken = proposal.copy()
    with torch.no_grad():
        broken.logits[0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        SAMPLERS[name](target, broken).sample(20, seed=0)


@pytest.mark.parametrize("name", WEIGHING)
def test_nan_of_the_base_is_refused(world, proposal, name):
    base = world.copy()
    target = EBM(base, [Pointwise(HAS_A)])
    with torch.no_grad():
        base.logits[:] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        SAMPLERS[name](target, proposal).sample(20, seed=0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_nan_of_a_feature_is_refused(world, proposal, name):
    broken = feature(lambda text: math.nan if len(text) == 2 else 1.0, name="broken", binary=True)
    target = EBM(world, [Pointwise(broken)])
    with pytest.raises(FeatureError, match="'broken'"):
        SAMPLERS[name](target, proposal).sample(40, seed=0)


@pytest.mark.parametrize("name", WEIGHING)
def test_what_the_base_cannot_say_is_never_returned(world, proposal, name):
    """P = 0 by the base alone, with no hard constraint, is as legal as by a constraint."""
    base = world.copy()
    with torch.no_grad():
        base.logits[0, 0] = -INF  # no text begins with "a"
    target = EBM(base, [Moment(HAS_A, 0.5)], [0.3])
    texts = SAMPLERS[name](target, proposal).sample(200, seed=0).texts
    assert not any(text.startswith("a") for text in texts)
    assert any(text.startswith("b") for text in texts)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_transformer_samples_and_proposes(gpt2_lm, name):
    target = EBM(gpt2_lm, [Pointwise(HAS_A), Moment(LENGTH, 2.0)], [0.2], max_new_tokens=3)
    policy = gpt2_lm.copy()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(0.9)
    assert isinstance(policy, LanguageModel)
    texts = []
    for batch_size in (5, 64):
        sampler = SAMPLERS[name](target, policy, batch_size=batch_size)
        samples = sampler.sample(20, seed=1)
        assert all("a" in text for text in samples.texts)
        assert len(samples) == 20
        assert samples.longest <= 3
        torch.testing.assert_close(
            samples.log_prob, policy.log_prob(samples), rtol=0, atol=contracts.FLOAT32
        )
        texts.append(samples.texts)
    assert texts[0] == texts[1]
