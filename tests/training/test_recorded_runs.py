"""Runs of version 0.1, recorded: what was trained then is trained now, to the last bit.

`tests/data/recorded_runs.json` and `run-0.1` were written by version 0.1.0 itself.
"""

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import dmgen
from dmgen.storage import read_rows

DATA = Path(__file__).parents[1] / "data"
RECORD = json.loads((DATA / "recorded_runs.json").read_text())
SAME_MACHINE = RECORD["torch"] == torch.__version__ and RECORD["cpu"] == (
    torch.backends.cpu.get_cpu_capability()
)


def same_row(row, expected, rel):
    for key, value in expected.items():
        if key == "seconds":
            continue
        if value is None:  # JSON has no NaN
            assert row[key] is None or not math.isfinite(row[key]), key
        elif isinstance(value, bool):
            assert row[key] == value, key
        else:
            # The sums behind some columns are of terms near 1.
            assert row[key] == pytest.approx(value, rel=rel, abs=1e-13), key
    assert set(expected) <= set(row)


@pytest.mark.parametrize("name", RECORD["runs"])
def test_a_run_of_version_0_1_is_the_same_today(name, base):
    has_ab = dmgen.feature(lambda text: "ab" in text, name="ab")
    target = dmgen.EBM.fit(base, [dmgen.Moment(has_ab, 0.5)], n_samples=4000, seed=0)
    recorded = RECORD["runs"][name]
    common = {"batch_size": 256, "learning_rate": 0.05, "warmup_steps": 2, "seed": 3}
    config = dmgen.TrainerConfig(**(common | recorded["settings"]))
    policy = base.copy()
    trainer = getattr(dmgen, name)(policy, target, config, **recorded["options"])
    rows = trainer.train(15).to_dict("records")
    assert len(rows) == len(recorded["rows"])
    for row, expected in zip(rows, recorded["rows"], strict=True):
        # Rows were written with 15 decimals; another CPU rounds its last bits in its own way.
        same_row(row, expected, 1e-12 if SAME_MACHINE else 1e-6)
    if SAME_MACHINE:
        weights = policy.logits.detach().numpy().tobytes()
        assert hashlib.sha256(weights).hexdigest() == recorded["weights"]


@pytest.fixture
def one_thread():
    """The record was made by one thread; a float32 model sums in another order with more."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def test_a_run_of_version_0_1_goes_on(tmp_path, one_thread):
    """Four more steps from its checkpoint, beside those that version 0.1 took."""
    shutil.copytree(DATA / "run-0.1", tmp_path / "run")
    base = dmgen.CausalLM.from_pretrained(DATA / "base-0.1", device="cpu", max_new_tokens=4)
    saved = json.loads((tmp_path / "run" / "target.json").read_text())
    lambdas = [float(row["lambda"]) for row in saved["constraints"] if "lambda" in row]
    features = dmgen.features
    constraints = [
        dmgen.Moment(features.regex("ab"), 0.4),
        dmgen.Moment(features.length("characters"), (1, 3)),
        dmgen.Pointwise(features.regex("a")),
    ]
    target = dmgen.EBM(base, constraints, lambdas)
    config = dmgen.TrainerConfig(
        batch_size=128,
        learning_rate=3e-3,
        warmup_steps=1,
        proposal_every=2,
        checkpoint_every=3,
        evaluate_every=3,
        average_decay=0.9,
    )
    trainer = dmgen.GDCpp(base.copy(), target, config)
    trainer.resume(tmp_path / "run")
    assert trainer.step == 6
    rows = trainer.train(4, tmp_path / "run").to_dict("records")[6:]
    for row, expected in zip(rows, read_rows(DATA / "run-0.1-continued.jsonl"), strict=True):
        # A float32 model: matrix products of another CPU differ in the last digits.
        same_row(row, expected, 1e-12 if SAME_MACHINE else 1e-3)
