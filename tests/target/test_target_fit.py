"""Targets that survive the disk: what is read is equal to what was written, and prints the same."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dmgen import features
from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.constraints.feature import Feature, FeatureError, feature
from dmgen.estimates.score import Score
from dmgen.models import TabularLM
from dmgen.target.ebm import EBM
from dmgen.target.fit import TargetFit
from dmgen.target.moment_fit import MomentFit
from dmgen.target.moments import fit_lambdas

A, B = features.regex("a"), features.regex("b")
LENGTH = features.length("characters")
PYTHON_ONLY = feature(lambda text: text.startswith("c"), name="c first", binary=True)
V01 = Path(__file__).parents[1] / "data" / "run-0.1" / "target.json"

CONSTRAINTS = {
    "soft": [Moment(A, 0.4), Moment(LENGTH, 2.0)],
    "hybrid": [Pointwise(B), Moment(A, 0.6)],
    "hard moment": [Moment(A, 1.0), Moment(LENGTH, 2.5)],
    "hard zero": [Moment(A, 0.0), Moment(LENGTH, 2.0)],
    "hard conditional": [Moment(A, 1.0, given=B), Moment(LENGTH, 2.0)],
    "conditional": [Moment(A, 0.4, given=B), Pointwise(B)],
    "interval": [Moment(LENGTH, (2.5, 3.5)), Moment(A, (0.0, 0.9))],
    "all hard": [Pointwise(A), Pointwise(B)],
    "without YAML form": [Moment(PYTHON_ONLY, 0.3), Moment(PYTHON_ONLY, 0.5, given=A)],
}


def through_json(value):
    """What a strict reader of JSON gets; it has neither NaN nor infinities."""
    return json.loads(json.dumps(value, allow_nan=False))


@pytest.fixture
def fitted(world, request):
    return EBM.fit(world, CONSTRAINTS[request.param], n_samples=400, n_heldout=50, seed=0)


@pytest.mark.parametrize("fitted", CONSTRAINTS, indirect=True)
@pytest.mark.parametrize("given", [True, False], ids=["constraints", "from YAML forms"])
class TestRoundTrips:
    def test_of_the_value(self, fitted, given):
        fit = fitted.fitted
        again = TargetFit.from_dict(through_json(fit.to_dict()), fit.constraints if given else None)
        assert again == fit
        assert str(again) == str(fit)
        assert torch.equal(again.lambdas, fit.lambdas)
        assert again.log_z == fit.log_z
        assert again.base_moments == fit.base_moments
        assert [c.bounds for c in again.moments] == [c.bounds for c in fit.moments]

    def test_of_the_target(self, fitted, given, tmp_path):
        fitted.save(tmp_path / "new" / "folder")
        constraints = fitted.constraints if given else None
        again = EBM.load(tmp_path / "new" / "folder", fitted.base, constraints)
        assert again == fitted
        assert str(again) == str(fitted)
        assert again.to_dict() == fitted.to_dict()

    def test_of_the_moment_fit(self, fitted, given):
        fit = fitted.moment_fit
        again = MomentFit.from_dict(through_json(fit.to_dict()))
        assert again == fit
        assert str(again) == str(fit)
        for field in dataclasses.fields(fit):
            # JSON has one empty list for no targets and no intervals.
            found, expected = (np.ravel(getattr(x, field.name)) for x in (again, fit))
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", [name for name in CONSTRAINTS if name != "without YAML form"])
def test_loaded_from_yaml_forms_it_is_the_same_distribution(world, name, tmp_path):
    fitted = EBM.fit(world, CONSTRAINTS[name], n_samples=400, seed=0)
    fitted.save(tmp_path)
    again = EBM.load(tmp_path, world)
    assert again.constraints == fitted.constraints
    assert torch.equal(again.log_score(world.enumerate()), fitted.log_score(world.enumerate()))


def test_an_unfitted_target(world):
    target = EBM(world, [Moment(A, 1.0), Moment(LENGTH, 2.0)], [math.inf, -0.1], prompt="x")
    again = TargetFit.from_dict(through_json(target.fitted.to_dict()))
    assert again == target.fitted
    assert str(again) == str(target)
    assert (again.moment_fit, again.log_z, again.base_moments) == (None, None, {})
    assert again.lambdas.tolist() == [math.inf, -0.1]
    assert EBM.from_fit(world, again) == target


def test_numbers_that_are_not_finite():
    fit = fit_lambdas([[0.5]], [[-math.inf, 0.7]])  # of one sample: no errors, and no lower edge
    assert math.isnan(fit.lambdas_stderr[0])
    assert MomentFit.from_dict(through_json(fit.to_dict())) == fit
    score = Score(math.inf, math.nan, 1, "x")
    target = TargetFit([Moment(A, 0.5)], torch.tensor([0.3]), "", 4, fit, score, {"a": score})
    again = TargetFit.from_dict(through_json(target.to_dict()))
    assert again == target
    assert again.log_z.value == math.inf
    assert math.isnan(again.base_moments["a"].stderr)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "other"},
        {"max_new_tokens": 5},
        {"lambdas": torch.tensor([0.4, -0.1 + 1e-15], dtype=torch.float64)},
        {"log_z": Score(1.0, 0.1, 9)},
        {"base_moments": {"a": Score(0.3, 0.1, 9)}},
        {"constraints": [Moment(A, 0.5), Moment(LENGTH, 2.0)]},
        {"constraints": [Moment(B, 0.4), Moment(LENGTH, 2.0)]},
        {"constraints": [Moment(A, 0.4, given=B), Moment(LENGTH, 2.0)]},
    ],
)
def test_equality_looks_at_every_field(world, change):
    fit = EBM(world, CONSTRAINTS["soft"], [0.4, -0.1]).fitted
    other = dataclasses.replace(fit, **change)
    assert fit == dataclasses.replace(fit)
    assert other != fit
    assert EBM.from_fit(world, other) != EBM.from_fit(world, fit)
    assert EBM.from_fit(world, fit) == EBM.from_fit(world, fit)
    assert fit != "a fit"


def test_targets_of_other_bases_differ(world):
    fit = EBM(world, [Pointwise(A)]).fitted
    assert EBM.from_fit(world, fit) != EBM.from_fit(world.copy(), fit)


def test_moment_fits_differ_in_any_number():
    fit = fit_lambdas([[0.0], [0.0], [1.0]], [0.5])
    assert fit == fit_lambdas([[0.0], [0.0], [1.0]], [0.5])
    assert fit != fit_lambdas([[0.0], [0.0], [1.0]], [0.5 + 1e-12])
    assert fit != dataclasses.replace(fit, ess=fit.ess + 1e-12)
    assert fit != 5


# ---------------------------------------------------------------- version 0.1


def v01_constraints():
    return [
        Moment(features.regex("ab"), 0.4),
        Moment(features.length("characters"), (1.0, 3.0)),
        Pointwise(features.regex("a")),
    ]


def test_a_file_of_version_0_1():
    facts = json.loads(V01.read_text(encoding="utf-8"))
    fit = TargetFit.load(V01.parent, v01_constraints())
    assert fit.lambdas.tolist() == [2.519273691458294, -0.5954391339331558]
    assert fit.moment_fit.hits.tolist() == [57, 704]
    assert fit.log_z == Score(-2.3705822854322967, 0.05873408745699306, 2000)
    assert fit.moment_fit.to_dict() == facts["moment_fit"]
    assert fit.constraints == tuple(v01_constraints())
    assert TargetFit.from_dict(through_json(fit.to_dict())) == fit


def test_without_constraints_a_file_of_version_0_1_has_placeholders():
    fit = TargetFit.load(V01.parent)
    assert str(fit) == str(TargetFit.load(V01.parent, v01_constraints()))
    assert [c.name for c in fit.constraints] == ["ab", "length_characters", "a"]
    with pytest.raises(FeatureError, match=r"'ab'.*only in Python"):
        fit.features[0](["abc"])


def test_a_condition_of_version_0_1_is_part_of_the_name():
    row = {"moment": "female | sports", "target": 0.5, "lambda": "-inf"}
    facts = {"constraints": [row], "prompt": "", "max_new_tokens": 4, "log_z": None}
    with pytest.raises(ValueError, match=r"lambda -inf makes 'female | sports' a hard factor"):
        TargetFit.from_dict(facts | {"base_moments": {}})
    row |= {"target": 0.0}
    (moment,) = TargetFit.from_dict(facts | {"base_moments": {}}).constraints
    assert (moment.feature.name, moment.given.name) == ("female", "sports")


# ---------------------------------------------------------------- features


def test_a_feature_without_yaml_form_is_a_placeholder(world, tmp_path):
    phrased = Feature(
        PYTHON_ONLY.fn, "c first", binary=True, phrase=("begins with c", "begin with c"), noun="c"
    )
    EBM(world, [Pointwise(phrased)]).save(tmp_path)
    loaded = EBM.load(tmp_path, world)
    (placeholder,) = loaded.features
    assert (placeholder.name, placeholder.binary) == ("c first", True)
    assert (placeholder.phrase, placeholder.noun) == (phrased.phrase, "c")
    with pytest.raises(FeatureError, match=r"'c first'.*pass the constraints"):
        loaded.values(world.enumerate())
    whole = EBM.load(tmp_path, world, [Pointwise(phrased)])
    assert whole.values(world.enumerate())["c first"].sum() > 0


def test_a_family_of_the_users_own_is_a_placeholder_with_its_yaml_form(world, tmp_path):
    own = features.from_config({"begins": "c"}, families={"begins": begins})
    EBM(world, [Pointwise(own)]).save(tmp_path)
    (placeholder,) = EBM.load(tmp_path, world).features
    assert placeholder.config == {"begins": "c"}
    assert placeholder.phrase == ("begins with c", "begin with c")
    with pytest.raises(FeatureError, match="unknown kind of feature 'begins'"):
        placeholder(["c"])


def begins(letter):
    phrase = (f"begins with {letter}", f"begin with {letter}")
    return Feature(lambda text: text.startswith(letter), letter, binary=True, phrase=phrase)


def test_a_target_of_a_classifier_is_read_without_its_head(world, tmp_path):
    head = features.ClassifierHead(
        torch.tensor([[0.0], [2.0]]), torch.tensor([0.0, -3.0]), ("a", "b"), base="letters"
    )
    head.save_pretrained(tmp_path / "head")

    def count_b(texts):
        return torch.tensor([[float(text.count("b"))] for text in texts])

    config = {"classifier": {"head": str(tmp_path / "head"), "label": "b"}}
    more_b = features.from_config(config, embed=lambda base: count_b)
    target = EBM.fit(world, [Moment(more_b, 0.3)], n_samples=500, seed=0)
    target.save(tmp_path / "target")
    (tmp_path / "head").rename(tmp_path / "moved")
    again = EBM.load(tmp_path / "target", world)
    assert again == target
    assert str(again) == str(target)
    with pytest.raises(FeatureError, match=f"no classifier head in '{tmp_path}/head'"):
        again.values(world.enumerate())
    config["classifier"]["head"] = str(tmp_path / "moved")
    moved = Moment(features.from_config(config, embed=lambda base: count_b), 0.3)
    found = EBM.load(tmp_path / "target", world, [moved])
    assert torch.equal(found.log_score(world.enumerate()), target.log_score(world.enumerate()))


# ---------------------------------------------------------------- refusals


def test_other_constraints_than_those_of_the_file(world, tmp_path):
    EBM(world, [Moment(A, 0.4), Pointwise(B)], [0.5]).save(tmp_path)
    for other in (
        [Pointwise(B), Moment(A, 0.4)],
        [Moment(A, 0.5), Pointwise(B)],
        [Moment(A, 0.4)],
        [Moment(A, 0.4, given=B), Pointwise(B)],
        [Moment(LENGTH, 0.4), Pointwise(B)],
    ):
        with pytest.raises(ValueError, match=r"target\.json: it holds another target"):
            EBM.load(tmp_path, world, other)
    own = Moment(feature(len, name="a"), 0.4)  # told apart by name alone
    assert EBM.load(tmp_path, world, [own, Pointwise(B)]).constraints[0] == own


def test_files_that_are_missing_or_damaged(world, tmp_path):
    with pytest.raises(ValueError, match=r"no target in .*target\.json is missing"):
        EBM.load(tmp_path, world)
    path = tmp_path / "target.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"target\.json is damaged"):
        EBM.load(tmp_path, world)
    facts = EBM(world, [Moment(A, 0.5)], [0.3]).fitted.to_dict()
    for key in ("constraints", "prompt", "max_new_tokens", "log_z", "base_moments"):
        path.write_text(json.dumps({k: v for k, v in facts.items() if k != key}), encoding="utf-8")
        with pytest.raises(ValueError, match=rf"target\.json: .*'{key}' is missing"):
            EBM.load(tmp_path, world)
    for row in ({"momnt": "a"}, {"moment": "a"}, {"moment": "a", "target": 0.5}):
        path.write_text(json.dumps(facts | {"constraints": [row]}), encoding="utf-8")
        with pytest.raises(ValueError, match=r"target\.json: a constraint has 'pointwise'"):
            EBM.load(tmp_path, world)


@pytest.mark.parametrize(("change", "named"), [({"ess": None}, "ess"), ({"x": 1}, "x")])
def test_a_moment_fit_names_the_field_that_is_wrong(change, named):
    facts = fit_lambdas([[0.0], [1.0]], [0.5]).to_dict() | change
    facts = {key: value for key, value in facts.items() if value is not None}
    with pytest.raises(ValueError, match=f"check {named}$"):
        MomentFit.from_dict(facts)


def test_a_value_cannot_be_changed(world):
    target = EBM(world, [Moment(A, 0.5)], [0.3])
    with pytest.raises(dataclasses.FrozenInstanceError):
        target.fitted.prompt = "x"
    with pytest.raises(AttributeError):
        target.lambdas = torch.zeros(1)
    base = TabularLM.random("ab", 1, eos="b", seed=0)
    assert EBM.from_fit(base, target.fitted).max_new_tokens == target.max_new_tokens
