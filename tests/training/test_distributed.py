"""Two processes that train one policy against one process with the same batch."""

import shutil
import textwrap

import pytest
import torch
from launching import launch

import dmgen
from dmgen.experiment.config import RunConfig
from dmgen.models import TabularLM
from dmgen.models.samples import Samples
from dmgen.training import distributed
from dmgen.training.distributed import Processes
from dmgen.training.rollout import draw_rows

SCRIPT = textwrap.dedent(
    """
    import atexit, json, pathlib, sys, torch, dmgen

    @atexit.register  # before dmgen's own, so that it runs after it
    def say_what_is_left():
        (out / f"left-{rank}.txt").write_text(str(torch.distributed.is_initialized()))

    torch.set_num_threads(1)
    base = dmgen.TabularLM.random("abc.", 4, eos=".", seed=1)
    has_ab = dmgen.feature(lambda text: "ab" in text, name="ab")
    target = dmgen.EBM.fit(base, [dmgen.Moment(has_ab, 0.5)], n_samples=2000, seed=0)
    out = pathlib.Path(sys.argv[1])
    found = {}
    for name, method, settings in (
        ("off-policy", dmgen.GDCpp, {"proposal_every": 4}),
        ("subset", dmgen.DPG, {"backward_size": 20, "average_decay": 0.9}),
        ("mixture", dmgen.GDCpp, {"base_share": 0.5, "reuse": 2, "proposal_rule": "policy"}),
        ("auto", dmgen.GDCpp, {"learning_rate": "auto", "baseline": "optimal"}),
        ("fit", dmgen.VarGrad, {"first_batches_from_fit": True}),
        ("guided", dmgen.GDCpp, {"credit": "token", "proposal_rule": "guided"}),
        ("anchored", dmgen.DPG, {"credit": "token", "anchor": "base", "gae_lambda": 0.9}),
        ("credit", dmgen.GDC, {"credit": "token", "anchor": "policy", "base_share": 0.5}),
    ):
        config = dmgen.TrainerConfig(**({"batch_size": 64, "learning_rate": 0.05} | settings))
        sampler = method(base.copy(), target, config)
        history = sampler.train(12, out=out / name)
        found[name] = {
            "rank": sampler.setup.processes.rank,
            "count": sampler.setup.processes.count,
            "logits": sampler.policy.logits.flatten().tolist(),
            "history": history.drop(columns="seconds").to_dict("list"),
        }
    rank = sampler.setup.processes.rank
    (out / f"rank-{rank}.json").write_text(json.dumps(found))
    # One of them fitted to a pointwise constraint, the other not fitted.
    different = dmgen.EBM(base, [dmgen.Pointwise(has_ab)])
    if rank:
        different = dmgen.EBM.fit(base, different.constraints, n_samples=2000, seed=0)
    try:
        dmgen.GDC(base.copy(), different, dmgen.TrainerConfig(batch_size=64)).train(1)
    except ValueError as error:
        (out / f"refused-{rank}.txt").write_text(str(error))
    """
)


@pytest.mark.slow
def test_two_processes_are_one_with_the_same_batch(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    (one,) = launch(script, tmp_path / "one", 1)
    first, second = launch(script, tmp_path / "two", 2)
    for name, alone in one.items():
        assert (first[name]["rank"], second[name]["rank"]) == (0, 1)
        assert first[name]["count"] == 2
        # The processes agree to the last bit, and with the single one up to the order of sums.
        assert first[name]["logits"] == second[name]["logits"]
        both = torch.tensor(first[name]["logits"], dtype=torch.float64)
        torch.testing.assert_close(
            both, torch.tensor(alone["logits"], dtype=torch.float64), rtol=0, atol=1e-8
        )
        for column in ("ess", "log_z", "kl_target_policy", "advantage_var", "moment/ab"):
            theirs, mine = (
                torch.tensor(x["history"][column], dtype=torch.float64)
                for x in (first[name], alone)
            )
            torch.testing.assert_close(theirs, mine, rtol=0, atol=1e-8)
        rows = (tmp_path / "two" / name / "metrics.jsonl").read_text().splitlines()
        assert len(rows) == 12  # one process writes
    assert not list((tmp_path / "one").glob("refused-*"))
    for rank in (0, 1):
        refused = (tmp_path / "two" / f"refused-{rank}.txt").read_text()
        assert "give EBM.fit a seed" in refused
        # Threads of a group that is left may abort a process that has ended well.
        assert (tmp_path / "two" / f"left-{rank}.txt").read_text() == "False"
    shutil.rmtree(tmp_path / "two")


def draw(parts, rows, seed=5):
    generator = torch.Generator().manual_seed(seed)
    drawn = draw_rows(parts, rows, prompt="", max_new_tokens=3, generator=generator)
    return [m for m, _ in drawn], Samples.cat([s for _, s in drawn]), generator.get_state()


@pytest.mark.parametrize("n_base", [0, 3, 5, 8])
def test_the_rows_of_all_processes_are_the_whole_draw(n_base):
    base, policy = (TabularLM.random("abc.", 3, eos=".", seed=seed) for seed in (1, 2))
    parts = [(base, n_base), (policy, 8 - n_base)]
    _, whole, state = draw([part for part in parts if part[1]], range(8))
    for count in (2, 4):
        pieces = []
        for rank in range(count):
            _, own, after = draw(parts, Processes(rank, count).rows(8))
            pieces.append(own)
            assert torch.equal(after, state)
        together = Samples.cat(pieces)
        assert together.texts == whole.texts
        assert torch.equal(together.log_prob, whole.log_prob)
    assert len(set(whole.texts)) > 3


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="multiple of 3"):
        Processes(0, 3).rows(64)
    assert Processes(1, 2).rows(64) == range(32, 64)


def test_a_single_process_gathers_itself():
    x = torch.arange(3.0)
    assert Processes.here(x.device) == Processes()
    assert Processes().gather(x) is x


@pytest.mark.parametrize(
    ("device", "cuda", "cpu"),
    [("cpu", True, True), ("cpu", False, True), ("cuda:0", True, False)],
)
def test_they_talk_where_the_policy_is(device, cuda, cpu, monkeypatch):
    """A policy on the CPU of a machine with GPUs has no use for NCCL."""
    asked = []

    class State:
        backend = "none"

        def __init__(self, cpu):
            asked.append(cpu)

        def wait_for_everyone(self):
            pass

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(distributed, "PartialState", State)
    found = Processes.here(torch.device(device))
    assert (found.rank, found.count) == (1, 2)
    assert asked == []
    found.wait()
    assert asked == [cpu]


def test_a_configuration_is_checked_without_the_other_processes(monkeypatch):
    """One of them may read it alone; and what it is checked on is no policy of theirs."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(distributed, "PartialState", None)
    RunConfig(base="x", constraints=[{"pointwise": {"word": "goal"}}])


@pytest.mark.parametrize("differ", ["lambdas", "log_z"])
def test_processes_of_different_targets_are_refused(differ, base, target, monkeypatch):
    """Also those without a λ, whose Z are of different draws."""
    monkeypatch.setattr(Processes, "here", lambda _: Processes(0, 2))
    monkeypatch.setattr(Processes, "gather", lambda _, own: torch.cat([own, own + 0.5]))
    hard = dmgen.Pointwise(dmgen.feature(lambda text: "ab" in text, name="ab"))
    given = target if differ == "lambdas" else dmgen.EBM.fit(base, [hard], n_samples=500, seed=0)
    sampler = dmgen.GDC(base.copy(), given, dmgen.TrainerConfig(batch_size=64))
    with pytest.raises(ValueError, match="different λ or Z"):
        sampler.train(1)
    assert sampler.step == 0
