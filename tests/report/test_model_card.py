"""The certificate of a policy, and the target that is made from it again."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
import yaml

from dmgen import EBM, features
from dmgen.experiment import versions
from dmgen.experiment.config import RunConfig
from dmgen.experiment.publish import load_published
from dmgen.report import write_model_card
from dmgen.training import run_folder


def test_the_card_holds_the_verdicts_and_prices(make_run):
    path = write_model_card(make_run("run"))
    text = path.read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    head = yaml.safe_load(front)
    assert head["library_name"] == "transformers"
    assert "base_model" not in head  # the embedded model is not on the hub
    for shown in ("Half of the texts are about women", "not met", "0.327", "KL(π‖a)", "2.863",
                  "fit 1, training 0, evaluation 2", "torch"):  # fmt: skip
        assert shown in body


def test_the_target_comes_back(make_run, plain_base):
    folder = make_run("run")
    write_model_card(folder)
    target = load_published(folder / "policy", plain_base)
    assert target.lambdas.tolist() == [2.863]
    assert [m.name for m in target.moments] == ["female"]
    assert target.log_z.value == 0.638
    # A file that contradicts itself is refused.
    path = folder / "policy" / "dmgen.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    facts["config"]["constraints"][0]["target"] = 0.4
    path.write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(ValueError, match="another target"):
        load_published(folder / "policy", plain_base)


def test_the_target_computes_in_the_precision_of_the_run(make_run):
    folder = make_run("run")
    write_model_card(folder)
    path = folder / "policy" / "dmgen.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    assert load_published(folder / "policy").base.dtype == torch.float32
    facts["config"]["dtype"] = "bfloat16"
    path.write_text(json.dumps(facts), encoding="utf-8")
    assert load_published(folder / "policy").base.dtype == torch.bfloat16


def test_names_with_a_bar_keep_to_their_cells(make_run):
    folder = make_run("run")
    ((step, _, evaluation),) = run_folder.read_evaluations(folder)
    row = replace(evaluation.moments[0], name="female | sports")
    run_folder.append_evaluation(folder, step, replace(evaluation, moments=[row]), final=True)
    card = write_model_card(folder).read_text(encoding="utf-8")
    assert r"| mean of female \| sports = 0.5, met from 0.45 to 0.55 | 0.053" in card
    (line,) = [line for line in card.splitlines() if "sports" in line]
    assert len(re.split(r"(?<!\\)\|", line)) == 8  # six cells between seven bars


def test_the_number_of_texts_is_not_that_of_a_condition(make_run):
    folder = make_run("run")
    ((step, _, evaluation),) = run_folder.read_evaluations(folder)
    row = evaluation.moments[0]
    row = replace(row, policy=replace(row.policy, n=130))
    evaluation = replace(evaluation, moments=[row], n_samples=2048)
    run_folder.append_evaluation(folder, step, evaluation, final=True)
    assert "Measured on 2,048 fresh texts" in write_model_card(folder).read_text(encoding="utf-8")


def test_a_run_without_a_policy_has_no_card(make_run):
    with pytest.raises(ValueError, match="not finished"):
        write_model_card(make_run("run", verdict=None))


def test_a_folder_without_the_file_is_refused(tmp_path, plain_base):
    with pytest.raises(ValueError, match=r"no dmgen\.json"):
        load_published(tmp_path, plain_base)


def test_a_published_classifier_comes_with_the_policy(make_run, tmp_path, plain_base):
    """On another machine there is neither the folder of the head nor the device of the run."""
    folder = make_run("run")
    head = features.ClassifierHead(
        torch.zeros(2, 4), torch.tensor([0.0, 1.0]), ("a", "b"), base="tiny-bios"
    )
    head.save_pretrained(tmp_path / "head")
    classifier = {"classifier": {"head": str(tmp_path / "head"), "label": "b"}}
    config = RunConfig(base="tiny-bios", constraints=[{"pointwise": classifier}], device="cuda:7")
    versions.write_config(folder, config.to_mapping())
    target = EBM(plain_base, config.build_constraints())
    target.save(folder)
    write_model_card(folder)
    shutil.rmtree(tmp_path / "head")
    moved = shutil.move(folder / "policy", tmp_path / "elsewhere")
    found = load_published(moved, plain_base)
    assert [c.name for c in found.constraints] == [c.name for c in target.constraints]
    assert load_published(moved).base.model.device.type in ("cpu", "cuda")
