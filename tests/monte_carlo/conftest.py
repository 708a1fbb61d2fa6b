"""A small target and proposal for the tests of all samplers."""

import pytest
from sampling import HAS_A, STARTS_B

from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.models import TabularLM
from dmgen.target.ebm import EBM


@pytest.fixture
def world():
    """15 texts over "ab" of at most 3 tokens that end with ".": each is seen often."""
    return TabularLM.random("ab.", 3, eos=".", scale=1.0, seed=0)


@pytest.fixture
def target(world):
    """Hard and soft: every text has an "a", and texts that begin with "b" are favoured."""
    return EBM(world, [Pointwise(HAS_A), Moment(STARTS_B, 0.6)], [1.2])


@pytest.fixture
def proposal():
    """Another law over the same texts: p/q is at most 8.9, and most of its texts are forbidden."""
    return TabularLM.random("ab.", 3, eos=".", scale=0.7, seed=8)
