"""A run with credit by token: its folder, its resumption, and texts of its target itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dmgen import experiment
from dmgen.experiment.certain import draw_certain
from dmgen.training.config import TrainerConfig


@pytest.fixture(scope="module")
def finished(small_config, tmp_path_factory):
    config = small_config("fit.n_samples=800")
    trainer = TrainerConfig(
        batch_size=16, checkpoint_every=2, credit="token", proposal_rule="guided"
    )
    policy = replace(config.policy, last_layers=0, output_rows=True)
    config = replace(config, trainer=trainer, policy=policy, n_steps=4)
    folder = tmp_path_factory.mktemp("certain") / "run"
    return experiment.run(config, folder), config


def test_a_run_with_credit_goes_on_as_if_never_stopped(finished, tmp_path):
    whole, config = finished
    assert (whole.folder / "prefix_value.safetensors").is_file()
    experiment.run(replace(config, n_steps=2), tmp_path / "run")
    parts = experiment.run(config, tmp_path / "run", resume=True)
    same = [column for column in whole.history if column != "seconds"]
    assert parts.history[same].equals(whole.history[same])
    assert parts.evaluation == whole.evaluation


def test_texts_of_the_target_itself(finished):
    run, config = finished
    drawn = draw_certain(run.folder, config, 30, seed=1)
    assert len(drawn.samples) == 30
    assert drawn.proposal in ("policy", "guided base")
    assert drawn.diagnostics["tv"].value < 0.05
    assert "accepted" in str(drawn)
