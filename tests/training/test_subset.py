"""The choice of texts for the backward pass: unbiased, of fixed size, and worth it."""

from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dmgen.training.gradient import inclusion_probabilities, systematic_sample

# ---------------------------------------------------------------- which texts to keep

advantages = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-6, 1e6), st.floats(-1e6, -1e-6)), min_size=1, max_size=12
)


@settings(max_examples=300, deadline=None)
@given(values=advantages, n=st.integers(1, 12))
@example(values=[1.0, 1.0, 1e-6], n=2)
def test_inclusion_probabilities_are_capped_shares(values, n):
    a = torch.tensor(values, dtype=torch.float64)
    keep = inclusion_probabilities(a, n)
    nonzero = int((a != 0).sum())
    assert float(keep.sum()) == pytest.approx(min(n, nonzero), abs=1e-9)
    assert ((keep >= 0) & (keep <= 1)).all()
    assert ((keep > 0) == (a != 0)).all()
    if nonzero <= n:
        assert (keep == (a != 0)).all()
    below = (keep < 1) & (keep > 0)
    if int(below.sum()) > 1:
        share = keep[below] / a[below].abs()
        torch.testing.assert_close(share, share[:1].expand_as(share), rtol=1e-9, atol=0)
        # A text is capped only if its share would exceed 1.
        capped = a.abs()[keep == 1]
        assert not len(capped) or float(capped.min() * share[0]) >= 1 - 1e-9


def kept_for_every_u(probabilities):
    """(length of the interval of u, positions kept) for all u in [0, 1): nothing is sampled."""
    cuts = torch.cat([torch.zeros(1), probabilities.double().cumsum(0), torch.ones(1)]) % 1
    edges = sorted({0.0, 1.0, *cuts.tolist()})
    return [
        (high - low, systematic_sample(probabilities, (low + high) / 2))
        for low, high in pairwise(edges)
    ]


@settings(max_examples=200, deadline=None)
@given(values=advantages, n=st.integers(1, 12))
def test_each_text_is_kept_with_its_probability_and_sums_are_unbiased(values, n):
    a = torch.tensor(values, dtype=torch.float64)
    keep = inclusion_probabilities(a, n)
    frequency = torch.zeros_like(a)
    estimate = torch.zeros(2, dtype=torch.float64)
    other = torch.arange(len(a), dtype=torch.float64) + 1
    for length, rows in kept_for_every_u(keep):
        frequency[rows] += length
        # The sum of a gradient: |advantage| times anything.
        estimate += length * torch.stack([(a / keep)[rows].sum(), (a * other / keep)[rows].sum()])
    torch.testing.assert_close(frequency, keep, rtol=0, atol=1e-9)
    scale = float(a.abs().sum()) * len(a)
    torch.testing.assert_close(
        estimate, torch.stack([a.sum(), a @ other]), rtol=0, atol=1e-9 * max(scale, 1.0)
    )


@settings(max_examples=100, deadline=None)
@given(values=advantages, n=st.integers(1, 12), u=st.floats(0.01, 0.99))
def test_the_number_kept_is_fixed_and_no_text_comes_twice(values, n, u):
    a = torch.tensor(values, dtype=torch.float64)
    rows = systematic_sample(inclusion_probabilities(a, n), u)
    assert len(rows) == min(n, int((a != 0).sum()))
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert (a[rows] != 0).all()


def test_advantages_of_zero_keep_nothing():
    keep = inclusion_probabilities(torch.zeros(5), 3)
    assert keep.tolist() == [0.0] * 5
    assert len(systematic_sample(keep, 0.5)) == 0


def test_proportional_keeping_beats_uniform_where_few_texts_matter():
    """The very reason for it: the variance of the estimated sum, exact over u."""
    a = torch.tensor([5.0, *[0.1] * 19], dtype=torch.float64)

    def variance(keep):
        estimates = [(length, float((a / keep)[rows].sum())) for length, rows in
                     kept_for_every_u(keep)]  # fmt: skip
        return sum(length * (e - float(a.sum())) ** 2 for length, e in estimates)

    assert variance(inclusion_probabilities(a, 5)) < 1e-12  # |A| = A here: no variance at all
    assert variance(torch.full((20,), 0.25, dtype=torch.float64)) > 1
