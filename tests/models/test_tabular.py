"""`TabularLM`: the contracts of a language model, and the listing of its texts."""

import math

import contracts
import pytest
import torch

from dmgen.models import LanguageModel, Samples, TabularLM


def with_zeros():
    """Return a world in which some tokens, after some prefixes also the EOS, have probability 0."""
    model = TabularLM.random("ab.", 3, eos=".", seed=4)
    logits = model.logits.detach().clone()
    logits[0, 1] = -torch.inf
    logits[1, 2] = -torch.inf
    logits[3, 0] = -torch.inf  # after the EOS, where nothing is scored
    return TabularLM("ab.", logits, 3, eos=".")


MODELS = {
    "ends": lambda: TabularLM.random("abc.", 4, eos=".", seed=0),
    "never ends": lambda: TabularLM.random("abc", 4, seed=1),
    "eos first": lambda: TabularLM.random(".ab", 3, eos=".", scale=2.0, seed=2),
    "far from uniform": lambda: TabularLM.random("ab.", 3, eos=".", scale=4.0, seed=3),
    "one letter": lambda: TabularLM.random("a.", 5, eos=".", seed=4),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("check", contracts.CHECKS, ids=contracts.name)
def test_contract(check, model):
    check(model(), model().enumerate(), contracts.FLOAT64)


def test_is_a_language_model(world):
    assert isinstance(world, LanguageModel)


class TestEnumerate:
    def test_every_text_once_in_either_kind_of_space(self, world, endless_world):
        # 1 + 3 + 9 + 27 texts that end, and 81 that do not; without EOS just these 81.
        assert len(set(world.enumerate().texts)) == len(world.enumerate()) == 121
        assert len(set(endless_world.enumerate().texts)) == len(endless_world.enumerate()) == 81

    def test_is_the_independent_listing(self, world):
        listed = contracts.every_text(4, 4, eos=3)
        space = world.enumerate()
        assert set(contracts.keys(space)) == set(contracts.keys(listed))
        assert len(space) == len(listed)

    def test_log_prob_is_the_product_along_the_path(self):
        # By hand: p(".") = p(a) = 1/2 at first; after "a", p(a) = 3/4.
        logits = torch.tensor([[0, 0], [math.log(3), 0], [9, 9]], dtype=torch.float64)
        model = TabularLM("a.", logits, 2, eos=".")
        space = model.enumerate()
        exact = {("", 1): 1 / 2, ("a", 2): 1 / 8, ("aa", 2): 3 / 8}
        found = {
            (text, n): p
            for text, n, p in zip(
                space.texts, space.n_tokens.tolist(), space.log_prob.exp().tolist(), strict=True
            )
        }
        assert found == pytest.approx(exact, abs=1e-15)

    def test_shorter_texts_follow_the_same_table(self, world):
        space = world.enumerate(2)
        assert len(space) == 1 + 3 + 9
        assert space.log_prob.exp().sum().item() == pytest.approx(1, abs=1e-12)
        assert world.sample(5, max_new_tokens=2).tokens.shape == (5, 2)


class TestTokensOfProbabilityZero:
    def test_have_log_prob_minus_infinity_and_are_never_drawn(self):
        model = with_zeros()
        space = model.enumerate()
        outside = space.log_prob == -torch.inf
        assert outside.any()
        assert space.log_prob.exp().sum().item() == pytest.approx(1, abs=1e-12)
        samples = model.sample(5000, seed=0)
        assert torch.isfinite(samples.log_prob).all()
        assert not set(samples.texts) & {"b", "ba", "bb", "a"}

    def test_leave_the_gradient_finite(self):
        copy = with_zeros().copy()
        samples = copy.sample(50, seed=0)
        copy.log_prob(samples, grad=True).sum().backward()
        assert torch.isfinite(copy.logits.grad).all()


class TestErrors:
    def test_nan_logits_are_named_when_drawn_and_when_scored(self, world):
        space = world.enumerate()
        broken = world.copy()
        broken.load_state_dict({"logits": torch.full_like(world.logits, torch.nan)})
        with pytest.raises(ValueError, match=r"log-probability of text 0 .* NaN"):
            broken.sample(3, seed=0)
        with pytest.raises(ValueError, match=r"log-probability of text 0 .* NaN"):
            broken.log_prob(space)

    @pytest.mark.parametrize(
        ("vocab", "shape", "length", "eos", "message"),
        [
            ("aa", (1, 2), 1, None, "distinct"),
            ("", (1, 0), 1, None, "distinct"),
            ("ab", (1, 2), 1, ".", "eos '.' is not in vocab"),
            ("ab", (1, 2), 0, None, "max_new_tokens must be at least 1, got 0"),
            ("ab", (2, 2), 2, None, r"shape \(3, 2\)"),
        ],
    )
    def test_a_table_that_does_not_fit(self, vocab, shape, length, eos, message):
        with pytest.raises(ValueError, match=message):
            TabularLM(vocab, torch.zeros(shape), length, eos=eos)

    def test_lengths_outside_of_the_table(self, world):
        for length in (0, 5):
            with pytest.raises(ValueError, match=r"1\.\.4"):
                world.sample(1, max_new_tokens=length)
        long = Samples(
            torch.zeros(1, 5, dtype=torch.long),
            torch.ones(1, 5, dtype=torch.bool),
            torch.zeros(1, dtype=torch.float64),
            ["aaaaa"],
            [""],
        )
        with pytest.raises(ValueError, match="5 tokens is longer than the table's 4"):
            world.log_prob(long)

    def test_prompts(self, world):
        with pytest.raises(ValueError, match="no prompts, got 'x'"):
            world.sample(1, prompt="x")
        samples = world.sample(1, seed=0)
        prompted = Samples(samples.tokens, samples.mask, samples.log_prob, samples.texts, ["x"])
        with pytest.raises(ValueError, match="no prompts, got 'x'"):
            world.log_prob(prompted)
