"""How training grows: each addition is one value, in the file of whoever makes it."""

import dataclasses

import pytest
import torch
from worlds import batch_of, config

import dmgen
from dmgen.estimates.f_divergence import FDivergence
from dmgen.training import Objective, Trainer, objectives
from dmgen.training.baselines import Baseline
from dmgen.training.batch import Batch
from dmgen.training.gradient import backward
from dmgen.training.rollout import Rollout


class CappedDPG(Objective):
    """DPG whose importance weights are capped."""

    name = "capped-dpg"
    needs = frozenset()

    def advantage(self, batch):
        log_p = batch.log_score - batch.log_z
        return torch.exp(log_p - batch.log_q).clamp(max=20.0)


def kl(target, policy):
    return target.exact().kl_target_policy(policy)


def test_an_objective_of_the_users_own_trains_and_resumes(base, target, tmp_path):
    policy = base.copy()
    whole = Trainer(policy, target, config(), objective=CappedDPG())
    whole.train(60)
    assert kl(target, policy) < kl(target, base) / 5
    first = Trainer(base.copy(), target, config(), objective=CappedDPG())
    first.train(20, tmp_path)
    second = Trainer(base.copy(), target, config(), objective=CappedDPG())
    second.resume(tmp_path)
    second.train(40)
    assert torch.equal(second.policy.logits, policy.logits)
    other = Trainer(base.copy(), target, config(), objective=objectives.DPG)
    with pytest.raises(ValueError, match="another objective: capped-dpg, not dpg"):
        other.resume(tmp_path)


def test_an_uncapped_twin_is_dpg(base, target):
    """The same texts give the same gradient where no weight reaches the cap."""
    samples = base.sample(64, seed=5)
    gradients = []
    for objective in (CappedDPG(), objectives.DPG):
        trainer = Trainer(base.copy(), target, config(), objective=objective)
        _, advantage = backward(trainer.state, batch_of(trainer, samples, 0.4), trainer.setup)
        assert advantage.max() < 20
        gradients.append(trainer.policy.logits.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)


class EveryTokenAlike(type(objectives.GDCPP)):
    """GDC++ with its advantage given to each token: another way to write the same gradient."""

    per_token = True

    def advantage(self, batch):
        a = super().advantage(batch)
        return a[:, None].expand(-1, 4)


@pytest.mark.parametrize("on_policy", [False, True])
def test_an_advantage_for_each_token_may_be_that_of_the_text(base, target, on_policy):
    samples = base.sample(64, seed=5)
    gradients = []
    for kind in (EveryTokenAlike, type(objectives.GDCPP)):
        objective = kind("gdc++", kappa=1.0)
        trainer = Trainer(base.copy(), target, config(micro_batch_size=10), objective=objective)
        known = trainer.policy.log_prob(samples) if on_policy else None
        backward(trainer.state, batch_of(trainer, samples, 0.4, known), trainer.setup)
        gradients.append(trainer.policy.logits.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-16)


def test_an_f_divergence_of_the_users_own(base, target):
    """Squared Hellinger distance, f(t) = (1 − √t)², written by hand: alpha = ½ up to a factor."""
    hellinger = FDivergence(
        "hellinger", 0.0, 1.0, lambda t: (1 - t.sqrt()) ** 2, lambda log_t: torch.expm1(-log_t / 2)
    )
    samples = base.sample(64, seed=5)
    gradients = []
    for divergence in (hellinger, ("alpha", 0.5)):
        trainer = dmgen.FDPG(base.copy(), target, config(), divergence=divergence)
        backward(trainer.state, batch_of(trainer, samples, 0.4), trainer.setup)
        gradients.append(trainer.policy.logits.grad)
    torch.testing.assert_close(2 * gradients[0], gradients[1], rtol=1e-12, atol=1e-16)
    policy = base.copy()
    dmgen.FDPG(policy, target, config(), divergence=hellinger).train(60)
    assert kl(target, policy) < kl(target, base) / 5


def test_a_baseline_of_the_users_own(base, target):
    half = Baseline("half", lambda gain, ratio, at_target: 0.5 * at_target)
    samples = base.sample(64, seed=5)
    trainer = dmgen.GDC(base.copy(), target, config(baseline=half))
    batch = batch_of(trainer, samples, 0.4, trainer.policy.log_prob(samples))
    ratio = torch.exp(batch.log_policy - batch.log_q)
    plain = objectives.GDC.advantage(batch)
    torch.testing.assert_close(trainer.setup.objective.advantage(batch), plain - 0.5 * ratio)


class Drawn:
    """A model that only draws, such as one behind an API."""

    def __init__(self, model):
        self.max_new_tokens, self._model = model.max_new_tokens, model

    def sample(self, n, **options):
        return self._model.sample(n, **options)


def test_a_model_that_only_draws_is_a_proposal(base, target):
    q = dmgen.TabularLM.random("abc.", 4, eos=".", seed=5)
    policies = [base.copy(), base.copy()]
    for policy, proposal in zip(policies, (q, Drawn(q)), strict=True):
        dmgen.GDCpp(policy, target, config(), proposal=proposal).train(10)
    assert torch.equal(policies[0].logits, policies[1].logits)
    with pytest.raises(ValueError, match="Drawn has no log_prob: leave base_share out"):
        dmgen.GDC(base.copy(), target, config(base_share=0.25), proposal=Drawn(q))
    with pytest.raises(TypeError, match=r"proposal must have sample\(\)"):
        dmgen.GDC(base.copy(), target, config(), proposal="gpt2")


@dataclasses.dataclass
class Given:
    """A source of training data: the same texts of a data set at every step."""

    batch: Batch

    def batches(self, state):
        while True:
            yield self.batch


def test_a_source_of_the_users_own(base, target):
    samples = base.sample(256, seed=5)
    policy = base.copy()
    batch = batch_of(dmgen.GDCpp(policy, target, config()), samples)
    trainer = Trainer(policy, target, config(), objective=objectives.GDCPP, source=Given(batch))
    history = trainer.train(10)
    # Forward KL on the empirical weights of those texts.
    assert history["kl_target_policy"].is_monotonic_decreasing
    assert isinstance(dmgen.GDC(base.copy(), target, config()).source, Rollout)
