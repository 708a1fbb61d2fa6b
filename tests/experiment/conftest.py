"""What the tests of runs share."""

from pathlib import Path

import pytest

from dmgen.experiment import RunConfig

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="session")
def small_config():
    """Return a function from overrides to the configuration of a small run."""

    def make(*overrides: str) -> RunConfig:
        shared = [f"base={DATA / 'base-0.1'}", "evaluate.n_samples=64"]
        shared.append("trainer.evaluate_every=null")
        return RunConfig.load(DATA / "run-0.1" / "config.yaml", [*shared, *overrides])

    return make
