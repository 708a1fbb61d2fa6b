import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

import dmgen
from dmgen import Moment, Pointwise, TrainerConfig, features
from dmgen.estimates.f_divergence import f_divergence
from dmgen.experiment.config import (
    EvaluateConfig,
    FitConfig,
    RunConfig,
    with_absolute_paths,
)
from dmgen.training.methods import METHODS, make_objective

FEMALE = {"moment": {"gender": "female"}, "target": 0.5}
SPORTS = {"pointwise": {"wordlist": "sports"}}
SMALLEST = {"base": "tiny-bios", "constraints": [FEMALE]}


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(SMALLEST), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("run") / "config.yaml"


class TestReading:
    def test_what_is_left_out_is_default(self):
        config = RunConfig.from_mapping(SMALLEST)
        assert config == RunConfig(base="tiny-bios", constraints=[FEMALE])
        assert (config.method, config.prompt, config.device) == ("GDCpp", "", None)

    def test_the_three_seeds_differ_by_default(self):
        config = RunConfig.from_mapping(SMALLEST)
        assert len({config.fit.seed, config.trainer.seed, config.evaluate.seed}) == 3

    def test_a_run_writes_checkpoints_unless_told_otherwise(self):
        # Also if another setting of the trainer is given: a section is not all or nothing.
        config = RunConfig.from_mapping(SMALLEST | {"trainer": {"batch_size": 8}})
        assert config.trainer == TrainerConfig(batch_size=8, checkpoint_every=25)
        config = RunConfig.from_mapping(SMALLEST | {"trainer": {"checkpoint_every": None}})
        assert config.trainer.checkpoint_every is None

    def test_an_empty_section_is_all_defaults(self):
        assert RunConfig.from_mapping(SMALLEST | {"fit": None}).fit == FitConfig()

    @pytest.mark.parametrize(
        ("written", "read"),
        [("1e-4", 1e-4), ("1E4", 1e4), (".5e-3", 5e-4), ("1.5e-05", 1.5e-5), ("1", 1.0)],
    )
    def test_numbers_as_people_write_them(self, path, written, read):
        # PyYAML takes the first three for text.
        rate = RunConfig.load(path, [f"trainer.learning_rate={written}"]).trainer.learning_rate
        assert (rate, type(rate)) == (read, float)

    def test_every_method_has_its_class(self):
        assert {name: method.__name__ for name, method in METHODS.items()} == {
            name: name for name in METHODS
        }


class TestConstraints:
    def test_objects(self):
        given = {"moment": {"word": "goal"}, "target": "1e-3", "given": {"wordlist": "sports"}}
        interval = {"moment": {"gender": "male"}, "target": [0.4, 0.6]}
        config = RunConfig(base="x", constraints=[SPORTS, FEMALE, given, interval])
        assert config.build_constraints() == [
            Pointwise(features.wordlist("sports")),
            Moment(features.gender("female"), 0.5),
            Moment(features.word("goal"), 0.001, given=features.wordlist("sports")),
            Moment(features.gender("male"), (0.4, 0.6)),
        ]

    @pytest.mark.parametrize(
        ("constraint", "error", "message"),
        [
            ("sports", TypeError, r"constraints\.0: a constraint is \{pointwise"),
            ({}, ValueError, r"constraints\.0: a constraint is \{pointwise"),
            (SPORTS | FEMALE, ValueError, r"constraints\.0: a constraint is \{pointwise"),
            ({"momnt": {"gender": "female"}}, ValueError, "did you mean 'moment'"),
            (SPORTS | {"batch_size": 8}, ValueError, "did you mean 'trainer.batch_size'"),
            ({"moment": {"gender": "female"}}, ValueError, "needs its target"),
            (SPORTS | {"target": 1}, ValueError, "takes no target"),
            (
                {"pointwise": {"wordlist": {"words": 5, "name": "x"}}},
                TypeError,
                "or a list of words",
            ),
            ({"pointwise": {"wordlst": "sports"}}, ValueError, "did you mean 'wordlist'"),
            ({"pointwise": {"wordlist": "sprots"}}, ValueError, "unknown lexicon 'sprots'"),
            (FEMALE | {"target": "half"}, TypeError, "a target is a number"),
            (FEMALE | {"target": 1.5}, ValueError, r"\[0, 1\]"),
            (FEMALE | {"given": {"gendr": "male"}}, ValueError, "did you mean 'gender'"),
        ],
    )
    def test_wrong_ones(self, constraint, error, message):
        with pytest.raises(error, match=message):
            RunConfig(base="x", constraints=[constraint])

    @pytest.mark.parametrize("constraints", [[], None, {}, "sports"])
    def test_there_must_be_one(self, constraints):
        with pytest.raises(ValueError, match="at least one"):
            RunConfig(base="x", constraints=constraints)

    def test_one_name_for_two_features(self):
        own = {"pointwise": {"wordlist": {"words": ["ball"], "name": "sports"}}}
        with pytest.raises(ValueError, match="two different features are called 'sports'"):
            RunConfig(base="x", constraints=[SPORTS, own])
        RunConfig(base="x", constraints=[SPORTS, FEMALE, SPORTS])


class TestUnknownKeys:
    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("bse=x", "unknown key 'bse' in the configuration; did you mean 'base'?"),
            ("trainer.learning_rat=1", "'learning_rat' in trainer; did you mean 'learning_rate'?"),
            ("trainr.seed=1", "unknown key 'trainr' in the configuration; did you mean 'trainer'?"),
            # A known key in the wrong place is pointed to its own.
            ("batch_size=8", "did you mean 'trainer.batch_size'?"),
            ("seed=8", "did you mean 'fit.seed' or 'trainer.seed' or 'evaluate.seed'?"),
            ("fit.zzz=8", "unknown key 'zzz' in fit. There are n_samples, seed"),
        ],
    )
    def test_the_nearest_is_named(self, path, override, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            RunConfig.load(path, [override])

    def test_a_missing_key(self):
        with pytest.raises(ValueError, match="'constraints' is missing"):
            RunConfig.from_mapping({"base": "x"})


class TestTypes:
    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("trainer.batch_size=ten", "trainer.batch_size must be a whole number, got 'ten'"),
            ("trainer.batch_size=1e2", "trainer.batch_size must be a whole number, got '1e2'"),
            ("n_steps=2.5", "n_steps must be a whole number, got 2.5"),
            ("fit.seed=true", "fit.seed must be a whole number, got True"),
            ("trainer.max_grad_norm=big", "must be a number or null, got 'big'"),
            ("trainer.first_batches_from_fit=1", "must be true or false, got 1"),
            ("prompt=3", "prompt must be text, got 3"),
            ("base=null", "base must be text, got None"),
            ("trainer=3", "trainer must be keys with values, got 3"),
        ],
    )
    def test_given_and_wanted_are_named(self, path, override, message):
        with pytest.raises(TypeError, match=re.escape(message)):
            RunConfig.load(path, [override])

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("base=", "base must name a model"),
            ("n_steps=0", "n_steps must be at least 1, got 0"),
            ("max_new_tokens=0", "max_new_tokens must be at least 1"),
            ("fit.n_samples=0", "fit: n_samples must be at least 1"),
            ("evaluate.n_samples=1", "evaluate: n_samples must be at least 2"),
            ("trainer.batch_size=0", "trainer: batch_size must be at least 1"),
            (
                "policy.rank=4",
                "policy: rank and alpha are settings of an adapter: set adapter: lora",
            ),
            ("policy={adapter: lora, rank: 0}", "policy: rank must be at least 1, got 0"),
            (
                "policy={adapter: lora, alpha: -1}",
                "policy: alpha must be above 0 and finite, got -1.0",
            ),
            (
                "policy.adapter=lore",
                "policy: adapter must be one of None, 'lora'; got 'lore'; did you mean 'lora'?",
            ),
            ("method=GDC++", "did you mean 'GDCpp'?"),
            ("dtype=bfloat", "did you mean 'bfloat16'?"),
            ("device=gpu", "device must be like 'cpu', 'cuda'"),
        ],
    )
    def test_ranges(self, path, override, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            RunConfig.load(path, [override])


class TestOverrides:
    def test_values_are_yaml_and_reach_sections_and_lists(self, path):
        config = RunConfig.load(
            path,
            ["fit.seed=7", "prompt=", "constraints.0.target=[0.4, 0.6]", "trainer.total_steps=9"],
        )
        assert (config.fit.seed, config.prompt, config.trainer.total_steps) == (7, "", 9)
        assert config.build_constraints()[0].target == (0.4, 0.6)

    def test_an_equals_sign_may_be_in_the_value(self, path):
        assert RunConfig.load(path, ["prompt=a=b"]).prompt == "a=b"

    @pytest.mark.parametrize("override", ["n_steps", "=3", ""])
    def test_not_key_value(self, path, override):
        with pytest.raises(ValueError, match="an override is key=value"):
            RunConfig.load(path, [override])

    @pytest.mark.parametrize("override", ["base.x=1", "constraints.1.target=1", "constraints.x=1"])
    def test_no_such_place(self, path, override):
        with pytest.raises(ValueError, match="has no part"):
            RunConfig.load(path, [override])

    def test_the_message_begins_with_file_and_overrides(self, path):
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))} n_steps=0: n_steps"):
            RunConfig.load(path, ["n_steps=0"])


class TestFiles:
    def test_not_there(self, tmp_path):
        with pytest.raises(ValueError, match="there is no configuration file"):
            RunConfig.load(tmp_path / "run.yaml")

    def test_a_run_folder_has_its_file_inside(self, tmp_path):
        (tmp_path / "config.yaml").write_text("base: x")
        with pytest.raises(ValueError, match=r"did you mean .*config\.yaml"):
            RunConfig.load(tmp_path)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("base: x\nbase: y\n", "line 1.*'base' is given twice"),
            ("base: x\nfit: {seed: 1, seed: 2}\n", "line 2.*'seed' is given twice"),
            ("base: x\n  prompt: y\n", r"is not YAML \(line 2\)"),
            ("prompt: caf\xe9\n", r"run\.yaml is not UTF-8 text"),
        ],
    )
    def test_not_yaml(self, tmp_path, text, message):
        (tmp_path / "run.yaml").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=message):
            RunConfig.load(tmp_path / "run.yaml")

    @pytest.mark.parametrize("text", ["", "- base", "base"])
    def test_not_a_mapping(self, tmp_path, text):
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(TypeError, match="keys with values"):
            RunConfig.load(tmp_path / "run.yaml", ["base=x"])


class TestRoundTrip:
    def test_to_mapping_says_everything(self):
        mapping = RunConfig.from_mapping(SMALLEST).to_mapping()
        assert set(mapping) == {f.name for f in fields(RunConfig)}
        assert set(mapping["trainer"]) == {f.name for f in fields(TrainerConfig)}

    # Reading declares features, which takes long on a busy machine; that is no failure.
    @settings(max_examples=60, deadline=None)
    @given(
        base=st.text(min_size=1),
        prompt=st.text(),
        target=st.floats(0.01, 0.4).map(lambda low: (low, low + 0.5)) | st.floats(0.01, 0.99),
        seed=st.integers(0, 2**40),
        rate=st.floats(1e-30, 1.0),
        method=st.sampled_from(sorted(METHODS)),
    )
    @example(base="1e4", prompt="\x85\r\n\u2028 é", target=0.5, seed=0, rate=1e-5, method="DPG")
    def test_written_and_read_again_it_is_equal(
        self, file, base, prompt, target, seed, rate, method
    ):
        config = RunConfig(
            base=base,
            # VarGrad takes no hard constraint.
            constraints=[FEMALE | {"target": target}, SPORTS][: 1 if method == "VarGrad" else 2],
            prompt=prompt,
            method=method,
            trainer=TrainerConfig(learning_rate=rate, seed=seed),
            evaluate=EvaluateConfig(seed=seed),
        )
        assert RunConfig.from_mapping(config.to_mapping()) == config
        file.write_text(config.to_yaml(), encoding="utf-8")
        assert RunConfig.load(file) == config


def test_targets_that_yaml_takes_for_text_are_numbers(file):
    file.write_text(
        "base: x\nconstraints:\n"
        "- {moment: {gender: female}, target: 1e-1}\n"
        "- {moment: {length: words}, target: [1e1, 20]}\n",
        encoding="utf-8",
    )
    config = RunConfig.load(file)
    assert [c["target"] for c in config.constraints] == [0.1, [10.0, 20.0]]


def test_mappings_may_be_merged(file):
    file.write_text(
        "base: x\nconstraints:\n- &a {moment: {gender: female}, target: 0.5}\n"
        "- {<<: *a, moment: {gender: male}}\n",
        encoding="utf-8",
    )
    assert RunConfig.load(file).constraints[1] == {"moment": {"gender": "male"}, "target": 0.5}


def test_a_run_finds_its_files_from_any_folder(tmp_path, monkeypatch):
    head = features.ClassifierHead(
        torch.zeros(2, 4), torch.tensor([0.0, 1.0]), ("a", "b"), base="tiny-bios"
    )
    head.save_pretrained(tmp_path / "head")
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    classifier = {"classifier": {"head": "head", "label": "b"}}
    moment = {"moment": {"gender": "female"}, "target": 0.5, "given": classifier}
    config = RunConfig(base="model", constraints=[{"pointwise": classifier}, moment])
    found = with_absolute_paths(config)
    assert found.base == str(tmp_path / "model")
    heads = [found.constraints[0]["pointwise"], found.constraints[1]["given"]]
    assert {row["classifier"]["head"] for row in heads} == {str(tmp_path / "head")}
    assert with_absolute_paths(RunConfig(base="gpt2", constraints=[FEMALE])).base == "gpt2"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "FDPG", "method_options": {"divergence": "jss"}}, "unknown divergence 'jss'"),
        ({"method": "VarGrad", "trainer": {"baseline": "z"}}, "baseline of 'vargrad'"),
        ({"method": "KLControl", "trainer": {"backward_size": 8}}, "backward_size"),
        ({"method": "KLControl", "method_options": {"clip": 3.0}}, "clip must"),
        ({"method": "FDPG", "method_options": {"divergence": ["alpha", "x"]}}, "finite number a"),
        ({"method": "VarGrad", "constraints": [SPORTS]}, "VarGrad minimises .*sports"),
        ({"method": "VarGrad", "constraints": [FEMALE | {"target": 0}]}, "VarGrad .*female"),
        (
            {
                "method": "FDPG",
                "method_options": {"divergence": "reverse_kl"},
                "constraints": [FEMALE, SPORTS],
            },
            "FDPG with divergence 'reverse_kl' minimises a loss that is infinite",
        ),
    ],
)
def test_what_a_method_refuses_is_refused_before_the_work_of_a_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        RunConfig.from_mapping(SMALLEST | settings)


@pytest.mark.parametrize("divergence", ["js", "kl", ["alpha", 1.0], "tv"])
def test_what_is_finite_takes_pointwise_constraints(divergence):
    options = {"divergence": divergence}
    mapping = SMALLEST | {"method": "FDPG", "method_options": options, "constraints": [SPORTS]}
    assert RunConfig.from_mapping(mapping).method == "FDPG"


@pytest.mark.parametrize("a", [0.5, "5e-1"])
def test_a_divergence_with_a_number_can_be_written_in_yaml(a):
    options = {"divergence": ["alpha", a]}
    config = RunConfig.from_mapping(SMALLEST | {"method": "FDPG", "method_options": options})
    objective = make_objective(config.method, config.method_options)
    assert objective.divergence == f_divergence(("alpha", 0.5)).name == "alpha=0.5"


# Prints the files that are opened, and whether transformers is imported, by reading a configuration
# after another one has brought all imports.
OPENED = """
import sys
from pathlib import Path
import dmgen

RunConfig = dmgen.experiment.RunConfig
first, second = sys.argv[1:]
RunConfig.load(first)
opened = []
sys.addaudithook(lambda event, args: event == "open" and opened.append(str(args[0])))
config = RunConfig.load(second)
opened = [path for path in opened if not path.startswith(str(Path(dmgen.__file__).parent))]
print(opened == [second], "transformers" in sys.modules, config.method)
"""


def test_reading_opens_no_other_file_and_imports_no_transformers(tmp_path):
    """Neither the folder of the base nor the head of a classifier need be there."""
    classifier = {"pointwise": {"classifier": {"head": "/nowhere/head", "label": "b"}}}
    paths = [tmp_path / name for name in ("first.yaml", "second.yaml")]
    for path in paths:
        config = {"base": "/nowhere/base", "constraints": [FEMALE, classifier, SPORTS]}
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", OPENED, *map(str, paths)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(dmgen.__file__).parents[1])},
        check=False,
    )
    assert done.stdout.split() == ["True", "False", "GDCpp"], done.stdout + done.stderr


def test_first_batches_from_fit_need_the_texts_of_one():
    few = {"trainer": {"first_batches_from_fit": True, "batch_size": 32}, "fit": {"n_samples": 31}}
    with pytest.raises(ValueError, match=r"a batch of 32 texts .* fit\.n_samples is 31"):
        RunConfig.from_mapping(SMALLEST | few)
