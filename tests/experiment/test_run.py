"""`experiment.run`: its result, its events, and the folders that it refuses."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import dmgen
from dmgen import CausalLM, experiment, storage
from dmgen.experiment import Run
from dmgen.experiment.folder import WRITTEN, finished_config, is_finished
from dmgen.experiment.publish import load_published
from dmgen.experiment.run import (
    Evaluated,
    FitBegan,
    Fitted,
    RunBegan,
    StepTaken,
    TextsCompared,
    TrainingBegan,
)

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def config(small_config):
    return small_config("fit.n_samples=400", "trainer.batch_size=32")


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A run from Python, and its events."""
    events = []
    out = tmp_path_factory.mktemp("runs") / "run"
    return experiment.run(config, out, on_event=events.append), events


def test_it_is_reachable_from_the_package():
    assert dmgen.experiment.run is experiment.run
    assert dmgen.experiment.Run is Run


def test_the_folder_gives_the_run_back(finished):
    run, _ = finished
    loaded = Run.load(run.folder)
    assert loaded == run
    assert str(loaded) == str(run)


def test_the_folder_holds_every_number_of_the_objects(finished, config):
    run, events = finished
    (fitted,) = [e.target for e in events if isinstance(e, Fitted)]
    (evaluated,) = [e.evaluation for e in events if isinstance(e, Evaluated)]
    (compared,) = [e.pairs for e in events if isinstance(e, TextsCompared)]
    assert run.config == config
    assert run.target == fitted.fitted
    assert str(run.target) == str(fitted)
    assert run.evaluation == evaluated
    assert str(run.evaluation) == str(evaluated)
    assert run.samples == compared
    steps = [e.row for e in events if isinstance(e, StepTaken)]
    assert run.history["kl_target_policy"].tolist() == [r["kl_target_policy"] for r in steps]
    assert run.versions == experiment.versions.versions()


def test_events_come_in_order(finished, config):
    run, events = finished
    assert [type(e) for e in events] == [
        RunBegan, FitBegan, Fitted, TrainingBegan, *[StepTaken] * 6, Evaluated, TextsCompared,
    ]  # fmt: skip
    assert events[0] == RunBegan(config, run.folder)
    assert events[1] == FitBegan(400)
    assert events[3] == TrainingBegan(0, resumed=False)


def test_files_of_a_run(finished):
    """The card and the page are written from the run, by the rooms above."""
    run, _ = finished
    assert {path.name for path in run.folder.iterdir()} == set(WRITTEN) - {
        "report.html",
        "prefix_value.safetensors",
    }
    target = load_published(run.folder / "policy")
    assert target.fitted == run.target


def test_a_run_that_goes_on_equals_one_that_was_never_stopped(finished, config, tmp_path):
    whole, _ = finished
    experiment.run(replace(config, n_steps=4), tmp_path / "run")
    events = []
    parts = experiment.run(config, tmp_path / "run", resume=True, on_event=events.append)
    assert [type(e) for e in events[:2]] == [RunBegan, TrainingBegan]
    assert events[1] == TrainingBegan(4, resumed=True)
    same = [column for column in whole.history if column != "seconds"]
    assert parts.history[same].equals(whole.history[same])
    assert parts.evaluation == whole.evaluation
    assert parts.samples == whole.samples
    assert parts.target == whole.target


def test_used_folders_and_other_configurations_are_refused(finished, config, monkeypatch):
    def no_model(*_, **__):
        raise AssertionError("a model was loaded before the folder was checked")

    monkeypatch.setattr(CausalLM, "from_pretrained", no_model)
    run, _ = finished
    with pytest.raises(ValueError, match="already holds a run"):
        experiment.run(config, run.folder)
    other = replace(config, fit=replace(config.fit, seed=9))
    with pytest.raises(ValueError, match="begun with another fit"):
        experiment.run(other, run.folder, resume=True)
    with pytest.raises(ValueError, match="there is no run in"):
        experiment.run(config, run.folder / "policy", resume=True)


def test_a_run_past_its_last_step_is_refused(finished, config, tmp_path):
    run, _ = finished
    folder = shutil.copytree(run.folder, tmp_path / "run")
    (folder / "policy" / "dmgen.json").unlink()  # not finished
    with pytest.raises(ValueError, match="is past step 5 already: raise n_steps"):
        experiment.run(replace(config, n_steps=5), folder, resume=True)
    assert len(storage.read_rows(folder / "metrics.jsonl")) == 6


def test_a_run_from_python_is_finished(finished, config):
    run, _ = finished
    assert is_finished(run.folder)
    assert finished_config(run.folder).n_steps == config.n_steps
    with pytest.raises(ValueError, match="is finished: it took 6 steps"):
        experiment.run(config, run.folder, resume=True)


def test_the_final_evaluation_is_written_once(config, tmp_path, monkeypatch):
    """The run stops between its final evaluation and its last file, and goes on."""

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # The package exports the function under the module's own name.
        patch.setattr(sys.modules["dmgen.experiment.run"], "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            experiment.run(config, tmp_path / "run")
    assert not is_finished(tmp_path / "run")
    assert [e.final for e in Run.load(tmp_path / "run").evaluations] == [True]
    run = experiment.run(config, tmp_path / "run", resume=True)
    assert is_finished(run.folder)
    assert [(e.step, e.final) for e in run.evaluations] == [(6, True)]
    # More steps keep the earlier final evaluation.
    longer = experiment.run(replace(config, n_steps=8), run.folder, resume=True)
    assert [(e.step, e.final) for e in longer.evaluations] == [(6, True), (8, True)]
