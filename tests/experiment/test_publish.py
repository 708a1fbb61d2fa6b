"""`dmgen.json`: the target of a published policy, on another machine too."""

import shutil

import pytest
import torch

from dmgen import EBM, CausalLM, TabularLM, features, storage
from dmgen.experiment.config import RunConfig
from dmgen.experiment.publish import load_published, publish

FEMALE = {"moment": {"gender": "female"}, "target": 0.5}


@pytest.fixture
def base():
    return TabularLM.random("ab.", 2, eos=".", seed=0)


def published(folder, config, base):
    """A folder with the dmgen.json of a target; its λ are 1."""
    constraints = config.build_constraints()
    lambdas = [1.0 for mapping in config.constraints if "moment" in mapping]
    target = EBM(base, constraints, lambdas, prompt=config.prompt, max_new_tokens=40)
    publish(folder, config, target.fitted)
    return target


def test_the_target_comes_back(tmp_path, base):
    target = published(tmp_path, RunConfig(base="tiny-bios", constraints=[FEMALE]), base)
    loaded = load_published(tmp_path, base)
    assert loaded == target
    assert str(loaded) == str(target)


def test_a_classifier_comes_with_the_policy(tmp_path, base):
    """On another machine there is neither the folder of the head nor the device of the run."""
    head = features.ClassifierHead(
        torch.zeros(2, 4), torch.tensor([0.0, 1.0]), ("a", "b"), base="tiny-bios"
    )
    head.save_pretrained(tmp_path / "head")
    classifier = {"classifier": {"head": str(tmp_path / "head"), "label": "b"}}
    config = RunConfig(base="tiny-bios", constraints=[{"pointwise": classifier}], device="cuda:7")
    target = published(tmp_path / "policy", config, base)
    shutil.rmtree(tmp_path / "head")
    moved = shutil.move(tmp_path / "policy", tmp_path / "elsewhere")
    loaded = load_published(moved, base)
    assert [c.name for c in loaded.constraints] == [c.name for c in target.constraints]
    (constraint,) = loaded.constraints
    assert constraint.feature.config["classifier"]["head"] == str(moved / "head-0")
    assert features.ClassifierHead.from_pretrained(moved / "head-0").labels == ("a", "b")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_is_loaded_in_the_precision_of_the_run(tmp_path, base, dtype):
    config = RunConfig(base="tiny-bios", constraints=[FEMALE], dtype=dtype, device="cuda:7")
    published(tmp_path, config, base)
    loaded = load_published(tmp_path).base
    assert isinstance(loaded, CausalLM)
    assert loaded.dtype == getattr(torch, dtype)
    assert loaded.model.device.type in ("cpu", "cuda")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("constraints", [FEMALE | {"target": 0.4}], "another target"),
        ("prompt", "She", "configuration has 'She'"),
        ("max_new_tokens", 8, "configuration has '' and 8"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path, base, key, value, message):
    published(tmp_path, RunConfig(base="tiny-bios", constraints=[FEMALE]), base)
    facts = storage.read_json(tmp_path / "dmgen.json")
    facts["config"][key] = value
    storage.write_json(tmp_path / "dmgen.json", facts)
    with pytest.raises(ValueError, match=rf"dmgen\.json.*{message}"):
        load_published(tmp_path, base)


def test_a_folder_without_the_file_is_refused(tmp_path, base):
    with pytest.raises(ValueError, match=r"no dmgen\.json"):
        load_published(tmp_path, base)
