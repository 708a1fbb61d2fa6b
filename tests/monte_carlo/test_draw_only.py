"""A model that can only draw, in the place of a proposal."""

import pytest

from dmgen import EBM, MetropolisHastings, Moment, Pointwise, QuasiRejection, Rejection, feature
from dmgen.models import LanguageModel, Sampler, TabularLM

has_ab = feature(lambda text: "ab" in text, name="ab")


class DrawOnly:
    """A sampler of the user's own, such as an engine behind an API with log-probabilities."""

    def __init__(self, model):
        self.max_new_tokens = model.max_new_tokens
        self.sample = model.sample


@pytest.fixture(scope="module")
def model():
    return TabularLM.random("abc.", 4, eos=".", seed=1)


def test_it_is_a_sampler_and_no_language_model(model):
    proposal = DrawOnly(model)
    assert isinstance(proposal, Sampler)
    assert not isinstance(proposal, LanguageModel)
    assert isinstance(model, Sampler)
    assert isinstance(model, LanguageModel)
    assert not isinstance(object(), Sampler)


@pytest.mark.parametrize(
    ("constraint", "make"),
    [
        (Moment(has_ab, 0.5), lambda *a: QuasiRejection(*a, beta=2.0, n_estimation=500, seed=0)),
        (Pointwise(has_ab), lambda *a: Rejection(*a, n_estimation=500, seed=0)),
        (Moment(has_ab, 0.5), MetropolisHastings),
    ],
    ids=["quasi-rejection", "rejection", "metropolis-hastings"],
)
def test_it_gives_the_texts_of_the_full_model(model, constraint, make):
    target = EBM.fit(model, [constraint], n_samples=2000, seed=0)
    drawn, expected = (make(target, q).sample(50, seed=1) for q in (DrawOnly(model), model))
    assert drawn.texts == expected.texts
