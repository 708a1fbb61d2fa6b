"""Fixtures shared by all tests: small worlds whose every text can be listed, and run folders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
import torch
from worlds import as_table, tiny_gpt2, tiny_llama

from dmgen import EBM, Moment, Pointwise, feature, storage
from dmgen.estimates.score import Score
from dmgen.evaluation.result import Evaluation, MomentRow
from dmgen.experiment import versions
from dmgen.experiment.config import RunConfig
from dmgen.experiment.result import TextPair
from dmgen.models import CausalLM, TabularLM
from dmgen.target.fit import TargetFit
from dmgen.target.moment_fit import MomentFit
from dmgen.training import run_folder
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


NASTY = '<script>alert("x")</script> she said & left \x00'


def make_evaluation(moment: float = 0.327, verdict: str = "not met") -> Evaluation:
    """Return an evaluation with this mean of the policy and this verdict on it."""

    def score(value: float) -> Score:
        return Score(value, 0.01, 256)

    models = ("base", "target", "policy")
    row = MomentRow(
        "female", 0.5, score(0.0531), score(0.5), score(moment),
        (moment - 0.03, moment + 0.03), verdict, None,
    )  # fmt: skip
    return Evaluation(
        moments=[row],
        kl_target_policy=score(0.347),
        kl_policy_base=score(0.638),
        kl_target_base=score(0.813),
        excess=score(-0.175),
        gain=score(0.466),
        tv=score(0.3),
        js=score(0.1),
        ess=150.0,
        length={model: score(22.0) for model in models},
        perplexity={model: score(9.0) for model in models},
        self_bleu={(model, 5): score(7.55) for model in ("base", "policy")},
        distinct={(model, 1): score(0.9361) for model in ("base", "policy")},
        n_samples=256,
    )


def make_target(constraints: Sequence[Pointwise | Moment]) -> TargetFit:
    """Return the fit of one soft moment, the first constraint; moments on an edge are hard."""
    first = constraints[0].name
    fit = MomentFit(
        names=(first,), targets=np.array([[0.5, 0.5]]), hits=np.array([166]),
        lambdas=np.array([2.863]), lambdas_stderr=np.array([0.044]),
        moments=np.array([0.5]), moments_stderr=np.array([0.01]),
        base_moments=np.array([0.054]), base_moments_stderr=np.array([0.002]),
        log_z=0.638, log_z_stderr=0.02, kl_target_base=0.794, kl_target_base_stderr=0.02,
        ess=620.0, n_samples=3072, n_steps=4, rank=1,
    )  # fmt: skip
    soft = [c for c in constraints if isinstance(c, Moment)]
    return TargetFit(
        constraints, torch.tensor([2.863] * len(soft), dtype=torch.float64), "", 40,
        moment_fit=fit, log_z=Score(0.638, 0.02, 3072),
        base_moments={first: Score(0.054, 0.002, 3072)},
    )  # fmt: skip


@pytest.fixture
def make_run(tmp_path):
    """Return a function that writes a run folder: rows of metrics, and an evaluation or none."""

    def make(
        name, *, method="GDCpp", seed=0, n_steps=6, moment=0.327, verdict="not met", rate=1e-4,
        constraints=({"moment": {"gender": "female"}, "target": 0.5},), prompt="",
    ):  # fmt: skip
        folder = tmp_path / name
        config = RunConfig(
            base="tiny-bios",
            constraints=constraints,
            prompt=prompt,
            method=method,
            n_steps=6,
            trainer=TrainerConfig(batch_size=64, learning_rate=rate, seed=seed),
        )
        versions.write_config(folder, config.to_mapping())
        make_target(config.build_constraints()).save(folder)
        for step in range(1, n_steps + 1):
            row = {
                "step": step, "samples": 64 * step, "seconds": 1.5 * step, "log_z": 0.64,
                "log_z_stderr": 0.02, "ess": 20.0 + step, "kl_target_policy": 0.8 / step,
                "kl_target_proposal": 0.8, "proposal_updated": False, "learning_rate": rate,
                "advantage_mean": 0.01, "advantage_abs_mean": 0.5, "advantage_var": 2.0,
                "grad_variance": 3.0 / step, "grad_norm": 0.4, "moment/female": 0.05 * step,
            }  # fmt: skip
            run_folder.append_metrics(folder, row)
        if verdict is not None:
            evaluation = make_evaluation(moment, verdict)
            run_folder.append_evaluation(folder, n_steps, evaluation, final=True, seed=2)
            features = {"base": {"female": 0.0}, "policy": {"female": 1.0}}
            pair = TextPair(prompt, "He was born.", NASTY, features)
            storage.write_rows(folder / "samples.jsonl", [dataclasses.asdict(pair)] * 10)
            (folder / "policy").mkdir()
        return folder

    return make


@pytest.fixture
def plain_base():
    """What stands for the base where no model is drawn from."""

    class Base:
        max_new_tokens = 40

    return dataclasses.dataclass(Base)()
