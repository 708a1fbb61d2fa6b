"""A run from a configuration to a folder, and back: `dmgen.experiment.run` and `Run`."""

from dmgen.experiment.config import RunConfig
from dmgen.experiment.run import Run, run

__all__ = ["Run", "RunConfig", "run"]
