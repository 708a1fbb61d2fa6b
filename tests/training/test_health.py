"""What a run says, once, when it has lost its footing; and that it is silent otherwise."""

import math
import warnings

import pytest

from dmgen.training.health import Health
from dmgen.training.health import watch as watch_row

GOOD = {"step": 1, "samples": 100, "log_z": 0.0, "ess": 50.0, "log_z_drift": math.nan}


def watch(rows, **options):
    health = Health()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for row in rows:
            health = watch_row(health, GOOD | row, batch_size=100, **options)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("row", "says"),
    [({"ess": 1.2}, "under 1.5 of 100 texts"), ({"log_z": -math.inf, "ess": 0.0}, "none of 100")],
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


def test_a_method_without_importance_weights_has_none_to_collapse():
    assert watch([{"ess": 1.2}] * 30, is_weighted=False) == []
    assert len(watch([{"log_z": -math.inf, "ess": 0.0}] * 30, is_weighted=False)) == 1


def test_large_batches_collapse_by_their_share():
    health = Health()
    for _ in range(9):
        health = watch_row(health, GOOD | {"ess": 9.0}, batch_size=1000)
    with pytest.warns(RuntimeWarning, match="under 10 of 1000 texts"):
        watch_row(health, GOOD | {"ess": 9.0}, batch_size=1000)
