"""`Evaluation` as a table, a frame and plain values, and back."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.constraints.feature import feature
from dmgen.estimates.score import Score
from dmgen.evaluation.evaluate import evaluate
from dmgen.evaluation.result import Evaluation
from dmgen.models import TabularLM
from dmgen.target.ebm import EBM

HAS_A = feature(lambda text: "a" in text, name="a")
LENGTH = feature(len, name="length")
RUN_0_1 = Path(__file__).parents[1] / "data" / "run-0.1" / "evaluations.jsonl"


@pytest.fixture
def policy():
    return TabularLM.random("abc.", 4, eos=".", seed=8, scale=0.7)


def test_the_table_and_the_json_hold_every_number(world, policy):
    target = EBM(world, [Pointwise(HAS_A), Moment(LENGTH, (2.5, 3.5))], [0.4])
    found = evaluate(policy, target, n_samples=500, seed=0)
    frame = found.to_frame()
    assert len(frame) == 2 * 3 + 7 + 1 + 2 * 3 + 6 + 6
    row = frame[(frame.metric == "E[a]") & (frame.model == "policy")].iloc[0]
    assert (row.value, row.target, row.verdict) == (found.moments[0].policy.value, 1.0, "not met")
    value = frame[frame.metric == "excess"].value.item()
    assert value == found.excess.value
    bleu = frame[(frame.metric == "self_bleu_5") & (frame.model == "base")].iloc[0]
    assert bleu.signature == found.self_bleu["base", 5].signature
    loaded = json.loads(found.to_json())
    assert loaded == json.loads(json.dumps(found.to_dict()))
    assert len(loaded["rows"]) == len(frame)


def test_numbers_that_are_not_finite_are_null_in_json(world):
    never = feature(lambda text: "z" in text, name="never")
    found = evaluate(world.copy(), EBM(world, [Pointwise(never)]), n_samples=50, seed=0)
    assert math.isnan(found.kl_target_policy.value)  # no text of the target was seen
    rows = json.loads(found.to_json())["rows"]
    assert [r["value"] for r in rows if r["metric"] == "kl_target_policy"] == [None]


def test_print_is_a_table_with_aligned_columns(world, policy):
    target = EBM(world, [Pointwise(HAS_A), Moment(LENGTH, (2.5, 3.5))], [0.4])
    found = evaluate(policy, target, n_samples=500, seed=0)
    lines = str(found).split("\n")
    assert len(lines) == 1 + 2 + 7 + 2 + 6 + (found.ess < 100)
    for label in ("base", "target p", "policy π", "verdict"):
        assert label in lines[0]
    at = lines[0].index("policy π")
    for line, score in ((lines[1], found.moments[0].policy), (lines[10], found.length["policy"])):
        assert line[at:].startswith(str(score))
    assert "2.5 to 3.5" in str(found)


# ---------------------------------------------------------------- and back


@pytest.fixture
def evaluation(world, policy):
    target = EBM(world, [Pointwise(HAS_A), Moment(LENGTH, (2.5, 3.5))], [0.4])
    return evaluate(policy, target, n_samples=500, seed=0)


def test_json_gives_an_equal_evaluation_with_an_equal_print(evaluation):
    loaded = Evaluation.from_dict(json.loads(evaluation.to_json()))
    assert loaded == evaluation
    assert str(loaded) == str(evaluation)
    assert (loaded.n_samples, loaded.samples) == (500, {})
    assert loaded.moments == evaluation.moments
    assert loaded.self_bleu == evaluation.self_bleu
    assert loaded.distinct == evaluation.distinct


@pytest.mark.parametrize("change", [
    {"n_samples": 501}, {"tolerance": 0.06}, {"ess": 3.0}, {"tv": Score(0.5, 0.1, 1000)},
    {"js": Score(math.nan, math.nan, 1000)}, {"length": {}}, {"moments": []},
])  # fmt: skip
def test_every_number_counts_for_equality(evaluation, change):
    assert dataclasses.replace(evaluation, **change) != evaluation
    assert dataclasses.replace(evaluation, samples={}) == evaluation
    assert evaluation != "evaluation"


def test_numbers_that_are_not_finite_come_back(world):
    never = feature(lambda text: "z" in text, name="never")
    undefined = evaluate(world.copy(), EBM(world, [Pointwise(never)]), n_samples=50, seed=0)
    infinite = dataclasses.replace(
        undefined,
        kl_target_policy=Score(math.inf, math.nan, 100),
        gain=Score(-math.inf, math.inf, 100),
    )
    for found in (undefined, infinite):
        loaded = Evaluation.from_dict(json.loads(found.to_json()))
        assert loaded == found
        assert str(loaded) == str(found)
    assert undefined != infinite
    assert loaded.gain == Score(-math.inf, math.inf, 100)


def test_rows_of_version_0_1_are_read():
    rows = [json.loads(line) for line in RUN_0_1.read_text(encoding="utf-8").splitlines()]
    assert rows
    for row in rows:
        found = Evaluation.from_dict(row)
        assert 2 * found.n_samples == found.tv.n
        assert [m.name for m in found.moments] == ["ab", "length_characters", "a"]
        assert found.moments[1].target == (1.0, 3.0)
        assert Evaluation.from_dict(json.loads(found.to_json())) == found
        assert json.loads(found.to_json())["rows"] == row["rows"]


def test_a_missing_number_is_named(evaluation):
    plain = evaluation.to_dict()
    rows = [row for row in plain["rows"] if row["metric"] != "excess"]
    with pytest.raises(KeyError, match="excess"):
        Evaluation.from_dict(plain | {"rows": rows})
