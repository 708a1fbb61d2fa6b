import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

import dmgen
from dmgen import storage
from dmgen.cli import app
from dmgen.experiment import build
from dmgen.experiment.config import RunConfig
from dmgen.experiment.folder import WRITTEN, finished_config
from dmgen.experiment.publish import load_published
from dmgen.training import run_folder

EBM_FIT = dmgen.EBM.fit

WORDS = [
    *["<eos>", "he", "she", "his", "her", "was", "is", "a", "the", "in", "of", "and", "born"],
    *["singer", "player", "writer", "football", "club", "team", "king", "art", "book", "city"],
    *["river", "won", "wrote", "old", "new", "[red]", "first"],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny GPT-2 with random weights over a few words, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("models") / "toy"
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(WORDS),
                n_positions=32,
                n_embd=16,
                n_layer=1,
                n_head=2,
                bos_token_id=0,
                eos_token_id=0,
                # Wide enough that texts are far from uniform.
                initializer_range=0.3,
            )
        ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config(model, tmp_path_factory):
    """A configuration that trains for a moment."""
    path = tmp_path_factory.mktemp("configs") / "run.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "base": str(model),
                "constraints": [{"moment": {"gender": "female"}, "target": 0.5}],
                "max_new_tokens": 6,
                "n_steps": 6,
                "fit": {"n_samples": 200},
                "trainer": {
                    "batch_size": 32,
                    "learning_rate": 1e-3,
                    "warmup_steps": 1,
                    "proposal_every": 2,
                    "checkpoint_every": 2,
                },
                "evaluate": {"n_samples": 64},
            }
        )
    )
    return path


def dmgen_command(*arguments):
    """Runs the command line here; a traceback fails the test."""
    result = CliRunner().invoke(app.main, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A finished run: its folder and what was printed."""
    out = tmp_path_factory.mktemp("runs") / "first"
    result = dmgen_command("train", config, "--out", out)
    assert result.exit_code == 0, result.output
    return out, result


def refused(result, message, code=2):
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.output
    assert message in result.stderr


def no_model(*_, **__):
    raise AssertionError("a model was loaded before the arguments were checked")


def metrics(out):
    """The rows of a run, without the one column that is not reproducible."""
    rows = storage.read_rows(out / "metrics.jsonl")
    return [{k: repr(v) for k, v in row.items() if k != "seconds"} for row in rows]


def weights(out):
    return (out / "policy" / "model.safetensors").read_bytes()


class TestTrain:
    def test_the_folder(self, finished, model):
        out, _ = finished
        # Only a run with credit by token has a prefix value.
        assert {path.name for path in out.iterdir()} == set(WRITTEN) - {"prefix_value.safetensors"}
        assert RunConfig.load(out / "config.yaml").base == str(model.resolve())
        assert "# torch " in (out / "config.yaml").read_text()
        assert [row["step"] for row in storage.read_rows(out / "metrics.jsonl")] == [
            1,
            2,
            3,
            4,
            5,
            6,
        ]
        pairs = storage.read_rows(out / "samples.jsonl")
        base = dmgen.CausalLM.from_pretrained(model, max_new_tokens=6)
        # The same random numbers: what the base says to seed 2, the seed of the evaluation.
        assert [row["base"] for row in pairs] == base.sample(len(pairs), seed=2).texts
        assert any(row["policy"] != row["base"] for row in pairs)

    def test_the_target_is_kept_exactly(self, finished, model):
        out, _ = finished
        stored = json.loads((out / "target.json").read_text())
        fitted = dmgen.EBM.fit(
            dmgen.CausalLM.from_pretrained(model, max_new_tokens=6),
            [dmgen.Moment(dmgen.features.gender("female"), 0.5)],
            n_samples=200,
            seed=1,
        )
        assert [float(row["lambda"]) for row in stored["constraints"]] == fitted.lambdas.tolist()
        assert stored["moment_fit"]["moments"] == [pytest.approx(0.5)]
        assert stored["moment_fit"]["ess"] == fitted.moment_fit.ess
        assert stored["log_z"]["value"] == fitted.log_z.value

    def test_transformers_loads_the_policy(self, finished, model):
        policy, base = (
            AutoModelForCausalLM.from_pretrained(folder)
            for folder in (finished[0] / "policy", model)
        )
        assert policy.config.vocab_size == len(WORDS)
        pairs = zip(policy.parameters(), base.parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs)

    def test_what_is_printed(self, finished):
        out, result = finished
        for part in ("female: mean 0.5", "lambda", "99 %", "before and after", str(out)):
            assert part in result.stdout
        # Neither a bar nor a note of transformers where nobody looks.
        assert result.stderr == ""

    def test_an_adapter(self, config, tmp_path):
        pytest.importorskip("peft")
        lora = ["policy={adapter: lora, rank: 2}", "trainer.learning_rate=1e-2"]
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        assert dmgen_command("train", config, *lora, "--out", whole).exit_code == 0
        dmgen_command("train", config, *lora, "n_steps=3", "--out", parts)
        trained = [k for k in run_folder.load_checkpoint(parts)[0] if k.startswith("policy.")]
        assert trained
        assert all(".lora_" in name for name in trained)
        # It goes on as what it is, and what it leaves is a whole model.
        refused(dmgen_command("train", config, "--out", parts, "--resume"), "another policy")
        dmgen_command("train", parts / "config.yaml", "n_steps=6", "--out", parts, "--resume")
        assert weights(parts) == weights(whole)
        assert dmgen_command("evaluate", parts, "-n", 16).exit_code == 0

    def test_an_adapter_in_half_precision_is_measured_in_full(self, config, tmp_path):
        """Rounded to bfloat16, its sum with the weights would be the weights of the base again."""
        pytest.importorskip("peft")
        out = tmp_path / "run"
        lora = ["policy={adapter: lora, rank: 2}", "dtype=bfloat16"]
        assert dmgen_command("train", config, *lora, "--out", out).exit_code == 0
        settings = finished_config(out)
        policy = build.load_finished_policy(out, settings)
        base = build.load_finished_base(settings)
        assert policy.dtype == base.dtype == torch.float32
        texts = base.sample(64, seed=0)
        moved = policy.log_prob(texts) - base.log_prob(texts)
        assert moved.abs().max() > 1e-4
        # By the adapter alone: not by weights that are rounded here and not there.
        embeddings = [lm.model.get_input_embeddings().weight for lm in (base, policy)]
        assert torch.equal(*embeddings)

    def test_print_config_only_prints(self, config, tmp_path, monkeypatch):
        monkeypatch.setattr(dmgen.CausalLM, "from_pretrained", no_model)
        result = dmgen_command("train", config, "trainer.batch_size=7", "--print-config")
        shown = RunConfig.from_mapping(yaml.safe_load(result.stdout))
        assert shown == RunConfig.load(config, ["trainer.batch_size=7"])

    def test_a_base_is_found_from_any_folder(self, config, model, tmp_path, monkeypatch):
        monkeypatch.chdir(model.parent)
        out = tmp_path / "run"
        result = dmgen_command("train", config, "base=toy", "n_steps=1", "--out", out)
        assert result.exit_code == 0, result.output
        monkeypatch.chdir(tmp_path)
        assert dmgen_command("evaluate", out, "-n", 16).exit_code == 0


class TestEvaluateAndSample:
    @pytest.fixture(autouse=True)
    def never_fit(self, monkeypatch):
        monkeypatch.setattr(dmgen.EBM, "fit", no_model)

    def test_evaluate_gives_the_figures_that_the_run_ended_with(self, finished):
        out, _ = finished
        (final,) = storage.read_rows(out / "evaluations.jsonl")
        assert (final["step"], final["final"], final["n_samples"]) == (6, True, 64)
        result = dmgen_command("evaluate", out, "--json")
        assert json.loads(result.stdout)["rows"] == final["rows"]
        assert result.stderr == ""
        other = dmgen_command("evaluate", out, "--json", "--seed", 3)
        assert json.loads(other.stdout)["rows"] != final["rows"]
        fewer = dmgen_command("evaluate", out, "-n", 32)
        assert "99 %" in fewer.stdout
        assert "32" in fewer.stdout

    def test_in_half_precision_too(self, config, tmp_path):
        out = tmp_path / "run"
        # Steps large enough that weights rounded to bfloat16 would be other weights.
        half = ["dtype=bfloat16", "trainer.learning_rate=1e-2"]
        # The other tests here are to do without a fit; this one makes a run.
        with pytest.MonkeyPatch.context() as allowed:
            allowed.setattr(dmgen.EBM, "fit", EBM_FIT)
            assert dmgen_command("train", config, *half, "--out", out).exit_code == 0
        (final,) = storage.read_rows(out / "evaluations.jsonl")
        result = dmgen_command("evaluate", out, "--json")
        assert json.loads(result.stdout)["rows"] == final["rows"]

    def test_a_run_without_its_last_file_is_not_finished(self, finished, tmp_path):
        out = tmp_path / "run"
        shutil.copytree(finished[0], out)
        (out / "policy" / "dmgen.json").unlink()
        refused(dmgen_command("sample", out), "is not finished; go on with it")

    def test_a_target_that_is_no_target(self, finished, tmp_path):
        out = tmp_path / "run"
        shutil.copytree(finished[0], out)
        for text, message in (("", "target.json is damaged"), ("{}", "'constraints' is missing")):
            (out / "target.json").write_text(text)
            refused(dmgen_command("evaluate", out), message)

    def test_a_run_of_version_0_1(self, tmp_path):
        data = Path(__file__).parents[1] / "data"
        out = shutil.copytree(data / "run-0.1", tmp_path / "run")
        path = out / "config.yaml"
        path.write_text(path.read_text().replace("/home/ada/base", str(data / "base-0.1")))
        final = storage.read_rows(out / "evaluations.jsonl")[-1]
        result = dmgen_command("evaluate", out, "--json")
        assert result.exit_code == 0, result.output
        rows = json.loads(result.stdout)["rows"]
        assert len(rows) == len(final["rows"])
        for row, old in zip(rows, final["rows"], strict=True):
            assert (row["metric"], row["model"], row["n"]) == (
                old["metric"], old["model"], old["n"],
            )  # fmt: skip
            # To rounding: 0.1 took the sums in another order.
            for key in ("value", "stderr"):
                if old[key] is None:
                    assert row[key] is None
                else:
                    assert row[key] == pytest.approx(old[key], rel=1e-9, abs=1e-12)

    def test_sample(self, finished):
        out, _ = finished
        policy = dmgen.CausalLM.from_pretrained(out / "policy", max_new_tokens=6)
        drawn = policy.sample(3, seed=5)
        lines = dmgen_command("sample", out, "-n", 3, "--seed", 5).stdout.splitlines()
        assert lines == [f"{i}  {text}".rstrip() for i, text in enumerate(drawn.texts, 1)]
        result = dmgen_command("sample", out, "-n", 3, "--seed", 5, "--json")
        rows = [json.loads(line) for line in result.stdout.splitlines()]
        assert [row["text"] for row in rows] == drawn.texts
        assert [row["log_prob"] for row in rows] == drawn.log_prob.tolist()
        female = dmgen.features.gender("female")(drawn.texts).tolist()
        assert [row["features"]["female"] for row in rows] == female

    def test_without_a_seed_the_texts_are_new(self, finished):
        first, second = (dmgen_command("sample", finished[0], "-n", 20).stdout for _ in range(2))
        assert first != second

    @pytest.mark.parametrize("command", ["evaluate", "sample"])
    def test_no_run_there(self, command, tmp_path):
        refused(dmgen_command(command, tmp_path), f"there is no run in {tmp_path}")

    def test_evaluate_of_too_few(self, finished):
        refused(dmgen_command("evaluate", finished[0], "-n", 1), "n_samples must be at least 2")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_no_such_device(self, finished):
        result = dmgen_command("sample", finished[0], "--device", "cuda:0")
        refused(result, "torch sees no CUDA")

    def test_a_target_that_does_not_belong(self, finished, tmp_path):
        out = tmp_path / "run"
        out.mkdir()
        for name in ("config.yaml", "target.json"):
            (out / name).write_text((finished[0] / name).read_text())
        (out / "policy").symlink_to(finished[0] / "policy")
        text = (out / "config.yaml").read_text()
        (out / "config.yaml").write_text(text.replace("target: 0.5", "target: 0.6"))
        refused(dmgen_command("evaluate", out), "target.json: it holds another target")


class TestRefusals:
    def test_an_unknown_key(self, config, tmp_path, monkeypatch):
        monkeypatch.setattr(dmgen.CausalLM, "from_pretrained", no_model)
        out = tmp_path / "run"
        result = dmgen_command("train", config, "trainer.learning_rat=1", "--out", out)
        refused(result, "did you mean 'learning_rate'?")
        assert not out.exists()

    def test_several_processes(self, config, tmp_path, monkeypatch):
        monkeypatch.setattr(dmgen.CausalLM, "from_pretrained", no_model)
        monkeypatch.setenv("WORLD_SIZE", "2")
        out = tmp_path / "run"
        refused(dmgen_command("train", config, "--out", out), "started it in 2 processes")
        assert not out.exists()

    def test_a_folder_in_use(self, config, finished, monkeypatch):
        monkeypatch.setattr(dmgen.CausalLM, "from_pretrained", no_model)
        out, _ = finished
        before = weights(out)
        refused(dmgen_command("train", config, "--out", out), f"{out} already holds a run")
        refused(dmgen_command("demo", "--out", out), f"{out} already holds a run")
        assert weights(out) == before

    def test_a_file_for_a_folder(self, config):
        refused(dmgen_command("train", config, "--out", config), "is a file")

    def test_a_folder_without_the_right_to_write(self, config, tmp_path, monkeypatch):
        monkeypatch.setattr(dmgen.CausalLM, "from_pretrained", no_model)
        monkeypatch.setattr(os, "access", lambda _, mode: mode != os.W_OK)
        refused(dmgen_command("train", config, "--out", tmp_path), "may not be written to")

    def test_too_few_texts_of_the_fit_for_a_batch(self, config, tmp_path, monkeypatch):
        monkeypatch.setattr(dmgen.CausalLM, "from_pretrained", no_model)
        few = ["trainer.first_batches_from_fit=true", "fit.n_samples=31"]
        result = dmgen_command("train", config, *few, "--out", tmp_path / "run")
        refused(result, "a batch of 32 texts from the fit, and fit.n_samples is 31")

    def test_no_folder(self, config):
        refused(dmgen_command("train", config), "--out")

    def test_no_configuration(self, tmp_path):
        result = dmgen_command("train", tmp_path / "x.yaml", "--out", tmp_path / "run")
        refused(result, "there is no configuration file")

    def test_a_missing_model(self, config, tmp_path):
        missing = tmp_path / "no" / "model"
        result = dmgen_command("train", config, f"base={missing}", "--out", tmp_path / "run")
        refused(result, str(missing))

    def test_an_unreachable_moment(self, config, tmp_path):
        out = tmp_path / "run"
        constraint = "constraints=[{moment: {word: Schwarzschild}, target: 0.5}]"
        refused(dmgen_command("train", config, constraint, "--out", out), "'Schwarzschild'")
        # Nothing was begun, so the same folder can be used again.
        assert list(out.iterdir()) == []

    def test_traceback_on_demand(self, tmp_path):
        result = CliRunner().invoke(app.main, ["--traceback", "sample", str(tmp_path)])
        assert isinstance(result.exception, ValueError)

    def test_usage(self):
        assert dmgen_command("train").exit_code == 2
        assert dmgen_command("trian").exit_code == 2


class TestResume:
    @pytest.mark.parametrize("from_fit", [False, True])
    def test_resumed_equals_uninterrupted(self, config, tmp_path, from_fit):
        settings = [f"trainer.first_batches_from_fit={from_fit}", "trainer.average_decay=0.9"]
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        dmgen_command("train", config, *settings, "--out", whole)
        dmgen_command("train", config, *settings, "n_steps=3", "--out", parts)
        assert weights(parts) != weights(whole)
        target = (parts / "target.json").read_bytes()
        again = dmgen_command(
            "train", parts / "config.yaml", "n_steps=6", "--out", parts, "--resume"
        )
        assert again.exit_code == 0, again.output
        assert metrics(parts) == metrics(whole)
        assert weights(parts) == weights(whole)
        assert (parts / "target.json").read_bytes() == target
        assert RunConfig.load(parts / "config.yaml").n_steps == 6
        evaluations = [storage.read_rows(out / "evaluations.jsonl")[-1] for out in (whole, parts)]
        assert evaluations[0] == evaluations[1]

    def test_a_run_stopped_before_its_first_checkpoint(self, config, finished, tmp_path):
        out = tmp_path / "run"
        dmgen_command("train", config, "--out", out)
        for checkpoint in (out / "checkpoints").iterdir():
            for file in checkpoint.iterdir():
                file.unlink()
            checkpoint.rmdir()
        (out / "evaluations.jsonl").unlink()
        (out / "policy").rename(tmp_path / "elsewhere")
        # A new run is refused here too, with the way to go on.
        refused(dmgen_command("train", config, "--out", out), "--resume")
        result = dmgen_command("train", out / "config.yaml", "--out", out, "--resume")
        assert result.exit_code == 0, result.output
        assert metrics(out) == metrics(finished[0])
        assert weights(out) == weights(finished[0])

    def test_a_failure_after_training_costs_nothing(self, config, finished, tmp_path, monkeypatch):
        def fail(*_, **__):
            raise ArithmeticError("the bound is violated")

        out = tmp_path / "run"
        with monkeypatch.context() as patched:
            patched.setattr("dmgen.training.run_folder.append_evaluation", fail)
            result = dmgen_command("train", config, "--out", out)
        assert result.exit_code == 1
        assert "Error: the bound is violated" in result.stderr
        assert f"dmgen train {out}/config.yaml --out {out} --resume" in result.stderr
        assert weights(out) == weights(finished[0])
        again = dmgen_command("train", out / "config.yaml", "--out", out, "--resume")
        assert again.exit_code == 0, again.output
        assert len(metrics(out)) == 6
        (final,) = storage.read_rows(out / "evaluations.jsonl")
        assert final["step"] == 6

    @pytest.mark.parametrize("where", ["dmgen.storage.write_rows", "dmgen.report.write_model_card"])
    def test_a_failure_while_writing_is_made_good(self, where, config, tmp_path, monkeypatch):
        def stop(*_, **__):
            raise KeyboardInterrupt

        out = tmp_path / "run"
        with monkeypatch.context() as patched:
            patched.setattr(where, stop)
            assert dmgen_command("train", config, "--out", out).exit_code == 130
        again = dmgen_command("train", out / "config.yaml", "--out", out, "--resume")
        assert again.exit_code == 0, again.output
        assert len(metrics(out)) == 6
        assert (out / "policy" / "README.md").is_file()
        assert len(storage.read_rows(out / "samples.jsonl")) > 0
        # Nor does the card of fewer steps stand for that of more.
        more = (out / "config.yaml", "--out", out, "--resume", "n_steps=8")
        with monkeypatch.context() as patched:
            patched.setattr(where, stop)
            stopped = dmgen_command("train", *more)
        assert stopped.exit_code == 130
        assert "to go on from it" in stopped.stderr
        assert not (out / "policy" / "README.md").exists()
        assert dmgen_command("train", *more).exit_code == 0
        refused(dmgen_command("train", *more), "is finished")

    def test_ctrl_c_while_fitting_leaves_nothing(self, config, tmp_path, monkeypatch):
        def stop(*_, **__):
            raise KeyboardInterrupt

        out = tmp_path / "run"
        monkeypatch.setattr(dmgen.EBM, "fit", stop)
        assert dmgen_command("train", config, "--out", out).exit_code == 130
        assert list(out.iterdir()) == []

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("constraints.0.target=0.4", "begun with another constraints"),
            ("method=DPG", "begun with another method"),
            ("fit.seed=5", "begun with another fit"),
            ("n_steps=6", "is finished: it took 6 steps"),
            ("n_steps=4", "is finished: it took 6 steps"),
        ],
    )
    def test_what_cannot_go_on(self, finished, override, message, monkeypatch):
        monkeypatch.setattr(dmgen.CausalLM, "from_pretrained", no_model)
        out, _ = finished
        result = dmgen_command("train", out / "config.yaml", override, "--out", out, "--resume")
        refused(result, message)

    def test_nothing_to_resume(self, config, tmp_path):
        result = dmgen_command("train", config, "--out", tmp_path, "--resume")
        refused(result, f"there is no run in {tmp_path}")

    def test_stopped_before_the_first_checkpoint(self, config, tmp_path, monkeypatch):
        def stop(*_, **__):
            raise KeyboardInterrupt

        out = tmp_path / "run"
        monkeypatch.setattr(dmgen.GDCpp, "train", stop)
        result = dmgen_command("train", config, "--out", out)
        assert result.exit_code == 130
        assert "keeps λ, but there was no checkpoint yet; to train again" in result.stderr

    @pytest.mark.slow
    def test_ctrl_c(self, config, tmp_path):
        out, home = tmp_path / "run", Path(dmgen.__file__).parents[1]
        process = subprocess.Popen(
            [sys.executable, "-m", "dmgen", "train", config, "n_steps=100000", "--out", out],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(home)},
            # A shell that starts the tests in the background has them ignore it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        rows = out / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (rows.exists() and len(storage.read_rows(rows)) >= 3):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "no step was taken in two minutes"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 130, stderr
        assert "Stopped after step" in stderr
        assert f"dmgen train {out}/config.yaml --out {out} --resume" in stderr
        assert "Traceback" not in stderr
        # Every row is whole, and the run goes on from a checkpoint as if nothing had happened.
        last = max(int(p.name.removeprefix("step-")) for p in (out / "checkpoints").glob("step-*"))
        assert 0 < last <= storage.read_rows(rows)[-1]["step"]
        steps = f"n_steps={last + 2}"
        again = dmgen_command("train", out / "config.yaml", steps, "--out", out, "--resume")
        assert again.exit_code == 0, again.output
        whole = tmp_path / "whole"
        dmgen_command("train", config, steps, "--out", whole)
        assert metrics(out) == metrics(whole)
        assert weights(out) == weights(whole)


class TestDemo:
    def test_it_runs_and_its_folder_serves_the_other_commands(self, config, tmp_path, monkeypatch):
        small = RunConfig.load(config)
        # The demo's own configuration must stay one that a newcomer can read and go on from.
        assert app.DEMO["base"] == "tiny-bios"
        assert app.DEMO["constraints"] == small.constraints
        monkeypatch.setattr(app, "DEMO", small.to_mapping())
        monkeypatch.chdir(tmp_path)
        result = dmgen_command("demo", "--seed", 4)
        assert result.exit_code == 0, result.output
        assert "dmgen sample runs/demo -n 20" in result.stdout
        config = RunConfig.load("runs/demo/config.yaml")
        assert (config.trainer.seed, config.fit.seed, config.evaluate.seed) == (4, 5, 6)
        assert dmgen_command("evaluate", "runs/demo").exit_code == 0
        assert dmgen_command("sample", "runs/demo", "-n", 2).exit_code == 0


@pytest.mark.parametrize("command", [[], ["demo"], ["train"], ["evaluate"], ["sample"]])
def test_help(command):
    result = dmgen_command(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


START = """
import sys
from dmgen.cli import main
try:
    main(sys.argv[1:], prog_name="dmgen")
except SystemExit:
    print(sorted({"torch", "transformers", "pandas", "scipy", "numpy"} & sys.modules.keys()))
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"]])
def test_help_and_version_load_no_large_library(arguments):
    """Both ways to start end in `dmgen.cli.main`."""
    done = subprocess.run(
        [sys.executable, "-c", START, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(dmgen.__file__).parents[1])},
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    assert "dmgen" in done.stdout


def test_version():
    assert dmgen_command("--version").stdout == f"dmgen {dmgen.__version__}\n"


class TestEvidence:
    def test_fit_plans(self, config):
        result = dmgen_command("fit", config, "fit.n_samples=400")
        assert result.exit_code == 0, result.output
        assert "female" in result.stdout
        assert "of 400 texts" in result.stdout
        found = json.loads(dmgen_command("fit", config, "--json").stdout)
        (row,) = found["plan"]
        assert row["n_samples"] == 200
        assert 0 < row["hits"] < 200
        # A fifth of the error takes 25 times the texts.
        needs = row["samples_for_stderr"]
        assert needs["0.02"] == pytest.approx(25 * needs["0.1"], rel=0.01)
        wanted = 200 * (row["lambda_stderr"] / 0.1) ** 2
        assert wanted <= needs["0.1"] <= wanted + 1

    def test_report_and_compare(self, config, finished, tmp_path):
        out, _ = finished
        page = tmp_path / "page.html"
        assert dmgen_command("report", out, "--out", page, "--png").exit_code == 0
        assert page.is_file()
        assert list(tmp_path.glob("page-*.png"))
        other = tmp_path / "other"
        assert dmgen_command("train", config, "--out", other, "trainer.seed=9").exit_code == 0
        both = tmp_path / "both.html"
        result = dmgen_command("compare", out, other, "--out", both)
        assert result.exit_code == 0, result.output
        assert "2 runs, 1 settings compared" in both.read_text(encoding="utf-8")

    def test_wrong_arguments(self, config, finished, tmp_path):
        refused(dmgen_command("report", tmp_path), "there is no run in")
        refused(dmgen_command("compare", finished[0]), "two run folders at least")
        refused(
            dmgen_command("train", config, "--out", tmp_path / "x", "--track", "paper"),
            "--track must be one of 'tensorboard'",
        )
        from accelerate.tracking import get_available_trackers

        there = {tracker.value for tracker in get_available_trackers()}
        for missing in {"tensorboard", "wandb", "mlflow"} - there:
            refused(
                dmgen_command("train", config, "--out", tmp_path / "x", "--track", missing),
                f"pip install {missing}",
            )
            assert not (tmp_path / "x").exists()
        refused(
            dmgen_command("train", config, "--out", tmp_path / "x", "method_options.divergence=js"),
            "unknown option of GDCpp 'divergence'. There are none",
        )

    def test_the_policy_carries_its_certificate(self, finished):
        folder = finished[0] / "policy"
        assert "KL(π‖a)" in (folder / "README.md").read_text(encoding="utf-8")
        target = load_published(folder)
        kept = json.loads((finished[0] / "target.json").read_text(encoding="utf-8"))
        assert [repr(x) for x in target.lambdas.tolist()] == [
            row["lambda"] for row in kept["constraints"]
        ]

    @pytest.mark.parametrize(
        ("method", "options"),
        [
            ("FDPG", ["method_options.divergence=tv"]),
            ("KLControl", ["method_options.kl_coefficient=0.1", "method_options.kl_target=null"]),
            ("Reinforce", []),
        ],
    )
    def test_every_kind_of_method_runs_from_a_file(self, method, options, config, tmp_path):
        out = tmp_path / "run"
        settings = [f"method={method}", *options, "n_steps=2", "trainer.proposal_every=10"]
        result = dmgen_command("train", config, "--out", out, *settings)
        assert result.exit_code == 0, result.output
        assert len(storage.read_rows(out / "metrics.jsonl")) == 2
