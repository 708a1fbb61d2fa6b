"""`TrainState`: nothing of a run is left out of its checkpoint."""

import math
import warnings
from dataclasses import dataclass, field, fields, replace

import pytest
import torch

import dmgen
from dmgen.training import checkpoint
from dmgen.training.health import Health, watch
from dmgen.training.state import TrainState

GOOD = {"step": 1, "samples": 100, "log_z": 0.0, "ess": 50.0, "log_z_drift": math.nan}
COLLAPSED = GOOD | {"ess": 1.2}


def trainer_of(base, target):
    return dmgen.GDC(base.copy(), target, dmgen.TrainerConfig(batch_size=64, seed=3))


@dataclass(frozen=True)
class Counts:
    n_odd: int = 0
    names: tuple[str, ...] = ()


@dataclass(eq=False)
class Extended(TrainState):
    n_rejected: int = 0
    counts: Counts = field(default_factory=Counts)
    mean: torch.Tensor = field(default_factory=lambda: torch.zeros(2))
    table: dict = field(default_factory=dict)


def extended(trainer, **more):
    own = {f.name: getattr(trainer.state, f.name) for f in fields(TrainState)}
    return Extended(**own, **more)


def test_every_field_is_saved(base, target):
    state = trainer_of(base, target).state
    assert state.state_dict().keys() == {f.name for f in fields(TrainState)}
    assert extended(trainer_of(base, target)).state_dict().keys() == {
        f.name for f in fields(Extended)
    }


def test_a_field_that_is_added_comes_back(base, target, tmp_path):
    trainer = trainer_of(base, target)
    saved = extended(
        trainer,
        n_rejected=3,
        counts=Counts(5, ("a",)),
        mean=torch.ones(2),
        table={"plain": 1.5},
    )
    (tmp_path / "run").mkdir()
    checkpoint.save(saved, trainer.setup, tmp_path / "run")
    other = trainer_of(base, target)
    loaded = extended(other)
    checkpoint.load(loaded, other.setup, tmp_path / "run")
    assert loaded.n_rejected == 3
    assert loaded.counts.n_odd == 5
    assert list(loaded.counts.names) == ["a"]
    assert loaded.mean.tolist() == [1.0, 1.0]
    assert loaded.table == {"plain": 1.5}


def follow(health, rows):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for row in rows:
            health = watch(health, row, batch_size=100)
    return health, [str(w.message) for w in caught]


def resumed(health, base, target, folder):
    """Return the health of a run as its checkpoint gives it back."""
    trainer, other = trainer_of(base, target), trainer_of(base, target)
    trainer.state.health = health
    checkpoint.save(trainer.state, trainer.setup, folder)
    other.resume(folder)
    return other.state.health


@pytest.mark.parametrize("bad", [COLLAPSED, GOOD | {"log_z": -math.inf, "ess": 0.0}])
def test_a_resumed_run_warns_as_an_uninterrupted_one(bad, base, target, tmp_path):
    whole, expected = follow(Health(), [bad] * 10)
    assert len(expected) == 1
    before, messages = follow(Health(), [bad] * 7)
    assert messages == []
    after, messages = follow(resumed(before, base, target, tmp_path), [bad] * 2)
    assert messages == []
    after, messages = follow(after, [bad])
    assert messages == expected
    assert after == whole


def test_a_warning_is_not_repeated_after_a_resume(base, target, tmp_path):
    drift = GOOD | {"log_z_drift": -7.0}
    health, messages = follow(Health(), [COLLAPSED] * 12 + [drift])
    assert len(messages) == 2
    again = resumed(health, base, target, tmp_path)
    assert again == health
    _, messages = follow(again, [COLLAPSED] * 12 + [drift])
    assert messages == []
    _, messages = follow(replace(again, warned=()), [drift])  # what a lost field would give
    assert len(messages) == 1
