"""Fixtures shared by all tests: small worlds whose every text can be listed, and run folders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import pytest
import torch
from worlds import as_table, tiny_gpt2, tiny_llama

from dmgen import EBM, Moment, feature, storage
from dmgen.experiment import versions
from dmgen.experiment.config import RunConfig
from dmgen.models import CausalLM, TabularLM
from dmgen.training.config import TrainerConfig


@pytest.fixture
def world() -> TabularLM:
    """Texts over "abc" of at most 4 tokens that end with ".", far from uniform."""
    return TabularLM.random("abc.", 4, eos=".", scale=1.0, seed=0)


@pytest.fixture(scope="module")
def base() -> TabularLM:
    """What the samplers' tests train from: all 1 to 4 letters of "abc", ended by "."."""
    return TabularLM.random("abc.", 4, eos=".", seed=1)


@pytest.fixture(scope="module")
def target(base: TabularLM) -> EBM:
    """Half of the texts hold "ab", which few of the base's do."""
    has_ab = feature(lambda text: "ab" in text, name="ab")
    return EBM.fit(base, [Moment(has_ab, 0.5)], n_samples=4000, seed=0)


@pytest.fixture
def as_tabular(world: TabularLM) -> Callable[[torch.Tensor], TabularLM]:
    """`as_table` for the fixture `world`."""
    return partial(as_table, world)


@pytest.fixture
def endless_world() -> TabularLM:
    """All texts of 4 tokens over "abc": there is no EOS."""
    return TabularLM.random("abc", 4, eos=None, scale=1.0, seed=1)


@pytest.fixture(scope="session")
def gpt2_lm() -> CausalLM:
    """A random GPT-2 over "abc" and one special token that is BOS, EOS and padding at once."""
    return tiny_gpt2()


@pytest.fixture(scope="session")
def llama_lm() -> CausalLM:
    """A random Llama over "abc" whose tokenizer puts a BOS, distinct from EOS, before all text."""
    return tiny_llama()


# A run folder as the command line leaves it, written by hand: no model is needed to read one.
NASTY = '<script>alert("x")</script> she said & left \x00'


def score_row(metric, model, value, stderr=0.01, **more):
    return {"metric": metric, "model": model, "value": value, "stderr": stderr, "n": 256,
            "signature": ""} | more  # fmt: skip


def evaluation(step, moment, verdict):
    low, high = moment - 0.03, moment + 0.03
    return {
        "step": step,
        "final": True,
        "seed": 2,
        "tolerance": 0.05,
        "rows": [
            score_row("E[female]", "base", 0.0531),
            score_row("E[female]", "target", 0.5),
            score_row("E[female]", "policy", moment, target=0.5, low=low, high=high,
                      verdict=verdict, n_to_decide=None),
            score_row("kl_target_policy", "", 0.347),
            score_row("kl_policy_base", "", 0.638),
            score_row("kl_target_base", "", 0.813),
            score_row("excess", "", -0.175),
            score_row("self_bleu_5", "policy", 7.55),
            score_row("distinct_1", "policy", 0.9361),
        ],
    }  # fmt: skip


TARGET = {
    "constraints": [{"moment": "female", "target": 0.5, "lambda": "2.863"}],
    "prompt": "",
    "max_new_tokens": 40,
    "log_z": {"value": 0.638, "stderr": 0.02, "n": 3072, "signature": ""},
    "base_moments": {"female": {"value": 0.054, "stderr": 0.002, "n": 3072, "signature": ""}},
    "moment_fit": {
        "names": ["female"], "lambdas": [2.863], "lambdas_stderr": [0.044], "targets": [0.5],
        "moments": [0.5], "moments_stderr": [0.01], "base_moments": [0.054],
        "base_moments_stderr": [0.002], "hits": [166], "log_z": 0.638, "log_z_stderr": 0.02,
        "kl_target_base": 0.794, "kl_target_base_stderr": 0.02, "ess": 620.0, "n_samples": 3072,
        "n_steps": 4, "rank": 1,
    },
}  # fmt: skip


@pytest.fixture
def make_run(tmp_path):
    """A function that writes a run folder; `n_steps` rows of metrics, and an evaluation or none."""

    def make(
        name, *, method="GDCpp", seed=0, n_steps=6, moment=0.327, verdict="not met", rate=1e-4
    ):
        folder = tmp_path / name
        config = RunConfig(
            base="tiny-bios",
            constraints=[{"moment": {"gender": "female"}, "target": 0.5}],
            method=method,
            n_steps=6,
            trainer=TrainerConfig(batch_size=64, learning_rate=rate, seed=seed),
        )
        versions.write_config(folder, config.to_mapping())
        storage.write_json(folder / "target.json", TARGET)
        rows = [
            {
                "step": step, "samples": 64 * step, "seconds": 1.5 * step, "log_z": 0.64,
                "log_z_stderr": 0.02, "ess": 20.0 + step, "kl_target_policy": 0.8 / step,
                "kl_target_proposal": 0.8, "proposal_updated": False, "learning_rate": rate,
                "advantage_mean": 0.01, "advantage_abs_mean": 0.5, "advantage_var": 2.0,
                "grad_variance": 3.0 / step, "grad_norm": 0.4, "moment/female": 0.05 * step,
            }
            for step in range(1, n_steps + 1)
        ]  # fmt: skip
        storage.write_rows(folder / "metrics.jsonl", rows)
        if verdict is not None:
            storage.write_rows(folder / "evaluations.jsonl", [evaluation(n_steps, moment, verdict)])
            pair = {
                "prompt": "", "base": "He was born.", "policy": NASTY,
                "features": {"base": {"female": 0.0}, "policy": {"female": 1.0}},
            }  # fmt: skip
            storage.write_rows(folder / "samples.jsonl", [pair] * 10)
            (folder / "policy").mkdir()
        return folder

    return make


@pytest.fixture
def plain_base():
    """What stands for the base where no model is drawn from."""

    class Base:
        max_new_tokens = 40

    return dataclasses.dataclass(Base)()
