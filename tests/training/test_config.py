"""Settings: what is refused, and the learning rate at every step."""

import dataclasses
import json
import math

import numpy as np
import pytest

from dmgen.training.config import OPTIMIZERS, PROPOSAL_RULES, SCHEDULES, TrainerConfig


def test_the_defaults_are_those_of_the_paper():
    config = TrainerConfig()
    assert (config.batch_size, config.learning_rate, config.warmup_steps) == (512, 1.41e-5, 100)
    assert (config.optimizer, config.schedule, config.proposal_every) == ("adam", "constant", 10)
    assert config.max_grad_norm is None


def test_it_is_frozen_and_knows_no_other_setting():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainerConfig().batch_size = 3
    with pytest.raises(TypeError, match="batchsize"):
        TrainerConfig(batchsize=3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("batch_size", -1),
        ("micro_batch_size", 0),
        ("backward_size", 0),
        ("total_steps", 0),
        ("proposal_every", 0),
        ("checkpoint_every", 0),
        ("evaluate_every", -3),
        ("warmup_steps", -1),
        ("learning_rate", 0.0),
        ("learning_rate", -1e-5),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", math.nan),
        ("average_decay", 0.0),
        ("average_decay", 1.0),
        ("average_decay", math.nan),
        ("optimizer", "adamW"),
        ("schedule", "exponential"),
        ("proposal_rule", "js"),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be .*{value}"):
        TrainerConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 512.0),
        ("batch_size", True),
        ("batch_size", None),
        ("batch_size", "512"),
        ("learning_rate", "1e-4"),  # what YAML 1.1 makes of 1e-4
        ("seed", 0.5),
        ("seed", None),
        ("optimizer", None),
        ("first_batches_from_fit", 1),
        ("max_grad_norm", "1"),
        ("proposal_rule", 3),
    ],
)
def test_values_of_another_type_are_refused_by_name(name, value):
    with pytest.raises(TypeError, match=rf"{name} must be .*, got {value!r}"):
        TrainerConfig(**{name: value})


def test_every_allowed_value_is_accepted():
    for optimizer in OPTIMIZERS:
        TrainerConfig(optimizer=optimizer)
    for schedule in SCHEDULES:
        TrainerConfig(schedule=schedule, total_steps=10)
    for rule in (None, *PROPOSAL_RULES):
        TrainerConfig(proposal_rule=rule, credit="token")
    TrainerConfig(learning_rate=1, max_grad_norm=1)  # an int is a number


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_decay_needs_its_length(schedule):
    with pytest.raises(ValueError, match=f"{schedule}.*set total_steps"):
        TrainerConfig(schedule=schedule)


# ---------------------------------------------------------------- learning rate


def test_warmup_is_linear_and_reaches_the_peak():
    config = TrainerConfig(warmup_steps=3)
    assert [config.share_at(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_no_warmup_starts_at_the_peak():
    assert TrainerConfig(warmup_steps=0).share_at(0) == 1.0


def test_linear_decay_ends_at_zero_and_stays_there():
    config = TrainerConfig(warmup_steps=0, schedule="linear", total_steps=4)
    assert [config.share_at(step) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


def test_cosine_decay_is_half_a_cosine():
    config = TrainerConfig(warmup_steps=0, schedule="cosine", total_steps=4)
    expected = [0.5 + 0.5 * math.cos(math.pi * step / 4) for step in range(5)]
    assert [config.share_at(step) for step in range(5)] == pytest.approx(expected, abs=1e-12)
    assert config.share_at(9) == 0.0


def test_numbers_of_numpy_become_plain_ones_which_a_checkpoint_can_hold():
    config = TrainerConfig(
        batch_size=np.int64(64), learning_rate=np.float32(0.5), seed=np.int64(3), base_share=0
    )
    assert json.loads(json.dumps(dataclasses.asdict(config)))["learning_rate"] == 0.5
    assert (type(config.seed), type(config.batch_size)) == (int, int)
    assert config == TrainerConfig(batch_size=64, learning_rate=0.5, seed=3)
