"""From a configuration to objects: a classifier's model is that of the run, in its precision."""

import pytest
import torch

from dmgen import CausalLM, features
from dmgen.experiment.build import build_constraints, fit_target
from dmgen.experiment.config import FitConfig, RunConfig

FEMALE = {"moment": {"gender": "female"}, "target": 0.5}
SMALLEST = {"base": "tiny-bios-0.1", "constraints": [FEMALE]}


def modules_of(call):
    """The modules that compute in a call."""
    seen = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: seen.append(module) and None
    )
    try:
        call()
    finally:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", ["tiny-bios-0.1", "a copy"])
def test_a_classifier_on_the_states_of_the_base_loads_no_second_one(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    base = CausalLM.from_pretrained("tiny-bios-0.1", device="cpu")
    base.save_pretrained(tmp_path / "a copy")
    head = features.ClassifierHead(
        torch.zeros(2, 128), torch.tensor([0.0, 1.0]), ("a", "b"), base=name
    )
    head.save_pretrained(tmp_path / "head")
    constraint = {"pointwise": {"classifier": {"head": "head", "label": "b"}}}
    config = RunConfig(
        base=str(tmp_path / "a copy"), constraints=[constraint], fit=FitConfig(n_samples=32)
    )
    target = fit_target(config, base)
    inside = set(base.model.modules())
    for constraints in (build_constraints(config, base), target.constraints):
        seen = modules_of(lambda c=constraints: c[0].feature(["he sang"]))
        assert seen
        assert (set(seen) <= inside) == (name == "a copy")


@pytest.mark.parametrize(("dtype", "wanted"), [(None, "float32"), ("bfloat16", "bfloat16")])
def test_the_model_under_a_classifier_computes_in_the_precision_of_the_run(tmp_path, dtype, wanted):
    width = 128
    head = features.ClassifierHead(
        torch.zeros(2, width), torch.tensor([0.0, 1.0]), ("a", "b"), base="tiny-bios-0.1"
    )
    head.save_pretrained(tmp_path)
    constraint = {"pointwise": {"classifier": {"head": str(tmp_path), "label": "b"}}}
    config = RunConfig.from_mapping(SMALLEST | {"constraints": [constraint], "dtype": dtype})
    (constraint,) = build_constraints(config)
    seen = modules_of(lambda: constraint.feature(["he sang"]))
    assert constraint.feature(["he sang"]).tolist() == [1]
    assert next(seen[-1].parameters()).dtype == getattr(torch, wanted)


def test_the_model_under_a_classifier_goes_where_the_run_does(tmp_path, monkeypatch):
    head = features.ClassifierHead(
        torch.zeros(2, 4), torch.tensor([0.0, 1.0]), ("a", "b"), base="elsewhere"
    )
    head.save_pretrained(tmp_path)
    asked = []

    def load(name, **options):
        asked.append((name, options))
        raise ValueError("not here")

    monkeypatch.setattr(CausalLM, "from_pretrained", load)
    constraint = {"pointwise": {"classifier": {"head": str(tmp_path), "label": "b"}}}
    config = RunConfig(base="x", constraints=[constraint], device="cuda:1", dtype="float16")
    with pytest.raises(ValueError, match="not here"):
        build_constraints(config)[0].feature(["text"])
    assert asked == [("elsewhere", {"device": "cuda:1", "dtype": "float16"})]
