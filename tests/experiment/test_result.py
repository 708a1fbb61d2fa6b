"""`Run.load`: folders of this version and of 0.1, whole or unfinished, without base and heads."""

import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from dmgen import EBM, TabularLM, features
from dmgen.experiment import Run, RunConfig
from dmgen.experiment.versions import write_config

OLD_RUN = Path(__file__).parents[1] / "data" / "run-0.1"


class TestVersion01:
    def test_it_loads_without_its_base(self, tmp_path):
        folder = shutil.copytree(OLD_RUN, tmp_path / "run")
        path = folder / "config.yaml"
        path.write_text(path.read_text().replace("/home/ada/base", "/nowhere/base"))
        run = Run.load(folder)
        assert (run.folder, run.config.base) == (folder, "/nowhere/base")
        assert run.versions["dmgen"] == "0.1.0"
        assert run.versions["torch"].startswith("2.")
        assert [c.name for c in run.target.constraints] == ["ab", "length_characters", "a"]
        assert run.target.lambdas.tolist() == [2.519273691458294, -0.5954391339331558]
        assert run.target.moment_fit.hits.tolist() == [57, 704]
        assert run.target.log_z.value == -2.3705822854322967

    def test_history_evaluations_and_texts(self):
        run = Run.load(OLD_RUN)
        assert run.history["step"].tolist() == [1, 2, 3, 4, 5, 6]
        assert run.n_steps == 6
        # null is a number that is not finite.
        assert run.history["step_kl"].isna().all()
        assert run.history["log_z"].dtype == float
        assert [(e.step, e.final) for e in run.evaluations] == [(3, False), (6, False), (6, True)]
        first = run.evaluations[0].evaluation
        assert first.kl_target_policy.value == 0.8618518411484739
        assert first.moments[0].verdict == "not met"
        assert run.evaluation is run.evaluations[-1].evaluation
        pair = run.samples[1]
        assert (pair.prompt, pair.base, pair.policy) == ("", "bb", "baaa")
        assert pair.features["policy"] == {"ab": 0.0, "length_characters": 4.0, "a": 1.0}

    def test_it_prints(self):
        text = str(Run.load(OLD_RUN))
        for part in ("GDCpp on /home/ada/base, 6 steps of 6", "lambda 2.519", "KL(p‖·)", "99 %"):
            assert part in text

    def test_equal_contents_are_equal_runs(self, tmp_path):
        run = Run.load(OLD_RUN)
        copy = Run.load(shutil.copytree(OLD_RUN, tmp_path / "copy"))
        assert copy == run
        assert str(copy).replace(str(copy.folder), str(run.folder)) == str(run)
        changed = run.history.assign(log_z=0.0)
        assert replace(run, history=changed) != run
        assert replace(run, samples=run.samples[1:]) != run
        assert run != "a run"


class TestPartsOfARun:
    def test_a_folder_without_a_run_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"neither config\.yaml nor metrics\.jsonl"):
            Run.load(tmp_path)

    def test_a_run_of_the_trainer_alone_has_no_configuration(self, tmp_path):
        shutil.copy(OLD_RUN / "metrics.jsonl", tmp_path)
        run = Run.load(tmp_path)
        assert (run.config, run.target, run.evaluation, run.samples) == (None, None, None, ())
        assert run.versions == {}
        assert run == Run.load(tmp_path)
        assert "6 steps" in str(run)

    def test_a_run_before_its_first_step(self, tmp_path):
        for name in ("config.yaml", "target.json"):
            shutil.copy(OLD_RUN / name, tmp_path)
        run = Run.load(tmp_path)
        assert (run.n_steps, len(run.history), run.evaluations) == (0, 0, ())
        assert isinstance(run.history, pd.DataFrame)

    def test_a_target_of_another_configuration_is_refused(self, tmp_path):
        shutil.copytree(OLD_RUN, tmp_path / "run")
        path = tmp_path / "run" / "config.yaml"
        path.write_text(path.read_text().replace("target: 0.4", "target: 0.3"))
        with pytest.raises(ValueError, match=r"target\.json.* another target"):
            Run.load(tmp_path / "run")


def test_a_run_whose_heads_have_moved_still_loads(tmp_path):
    head = features.ClassifierHead(
        torch.zeros(2, 4), torch.tensor([0.0, 1.0]), ("a", "b"), base="tiny-bios"
    )
    head.save_pretrained(tmp_path / "head")
    classifier = {"classifier": {"head": str(tmp_path / "head"), "label": "b"}}
    config = RunConfig(base="tiny-bios", constraints=[{"moment": classifier, "target": 0.5}])
    base = TabularLM.random("ab.", 2, eos=".", seed=0)
    EBM(base, config.build_constraints(), [0.5]).save(tmp_path / "run")
    write_config(tmp_path / "run", config.to_mapping())
    before = Run.load(tmp_path / "run")
    shutil.move(tmp_path / "head", tmp_path / "elsewhere")
    after = Run.load(tmp_path / "run")
    assert after == before
    assert str(after) == str(before)
    assert after.target.lambdas.tolist() == [0.5]
