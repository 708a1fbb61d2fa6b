"""What a run says, once, when it has lost its footing; and that it is silent otherwise."""

import math
import warnings

import pytest

from dmgen.samplers.health import Health

GOOD = {"step": 1, "samples": 100, "log_z": 0.0, "ess": 50.0, "log_z_drift": math.nan}


def watch(rows):
    health = Health(100)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for row in rows:
            health.watch(GOOD | row)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("row", "says"),
    [({"ess": 0.9}, "effective sample size"), ({"log_z": -math.inf, "ess": 0.0}, "none of 100")],
)
def test_ten_bad_batches_in_a_row_are_told_once(row, says):
    assert watch([row] * 9) == []
    assert watch([row] * 9 + [{}] + [row] * 9) == []
    (message,) = watch([row] * 30)
    assert says in message


def test_a_contradiction_of_z_is_told_at_once():
    (message,) = watch([{}, {"log_z_drift": -7.0}, {"log_z_drift": 8.0}])
    assert "-7.0 standard errors" in message
    assert watch([{"log_z_drift": 4.9}]) == []
