import numpy as np
from laws import is_calibrated, is_close, is_rate, uncalibrated

from dmgen.estimates.score import Score


def test_five_standard_errors():
    assert is_close(Score(1.0, 0.1, 10), 1.49)
    assert not is_close(Score(1.0, 0.1, 10), 1.51)
    assert is_close(Score(1.0, 0.0, 0), 1.0 + 1e-12)


def test_wrong_errors_and_a_bias_are_seen():
    z = np.random.default_rng(0).normal(size=400)
    assert is_calibrated(z)
    assert uncalibrated({"right": z, "spread": 1.25 * z, "bias": z + 1 / 3}) == {"spread", "bias"}


def test_frequencies():
    assert is_rate(0.52, 1000, 0.5)
    assert not is_rate(0.59, 1000, 0.5)
