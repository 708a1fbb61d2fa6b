"""Other libraries' classifiers and rewards as features, and a target as a reward for theirs."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, TextClassificationPipeline
from worlds import letters, randomised

from dmgen import TabularLM, features
from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.constraints.feature import FeatureError, feature
from dmgen.target.ebm import EBM

TEXTS = ["a", "ab", "abc", "cab", "bbbb", "aac", "c", "ccaab", "b", "ba", "acca", "cc"]


# ---------------------------------------------------------------- pipelines of transformers


def pipeline(labels=("bad", "good", "great"), problem_type=None):
    tokenizer = letters("<pad>", "<end>", eos="<end>", pad="<pad>")
    tokenizer.model_max_length = 8
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        problem_type=problem_type,
    )
    model = randomised(BertForSequenceClassification(config), scale=0.8, seed=1).double().eval()
    return TextClassificationPipeline(model=model, tokenizer=tokenizer, device="cpu")


def logits(pipe, texts):
    """Of each text alone, so without padding, float64 `(N, C)`."""
    with torch.no_grad():
        rows = [pipe.model(**pipe.tokenizer(t, return_tensors="pt")).logits[0] for t in texts]
    return torch.stack(rows).double()


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_pipeline_says_what_its_model_says(batch_size):
    pipe = pipeline()
    scores = logits(pipe, TEXTS)
    assert set(scores.argmax(1).tolist()) == {0, 1, 2}  # or the test would show little
    # Two scores that rounding could swap would make the answer depend on the batch.
    assert scores.topk(2, dim=1).values.diff(dim=1).abs().min() > 1e-3
    good = partial(features.from_pipeline, pipe, batch_size=batch_size)
    assert good("good")(TEXTS).tolist() == (scores.argmax(1) == 1).tolist()
    assert good(["good", "great"])(TEXTS).tolist() == (scores.argmax(1) != 0).tolist()
    p = scores.softmax(1)
    # The pipeline rounds logits below 10 to float32, by 5e-7 at most, and p moves by a quarter.
    torch.testing.assert_close(good("good", threshold=None)(TEXTS), p[:, 1], rtol=0, atol=1e-6)
    assert (p[:, 1] - 0.4).abs().min() > 1e-4
    assert good("good", threshold=0.4)(TEXTS).tolist() == (p[:, 1] >= 0.4).tolist()


def test_pipeline_features_have_names_and_say_whether_they_are_binary():
    pipe = pipeline()
    both = features.from_pipeline(pipe, ["good", "great"])
    assert (both.name, both.binary) == ("good or great", True)
    number = features.from_pipeline(pipe, "good", threshold=None, name="how good")
    assert (number.name, number.binary) == ("how good", False)
    assert features.from_pipeline(pipe, "good") == features.from_pipeline(pipe, "good")
    assert features.from_pipeline(pipe, "good") != features.from_pipeline(pipeline(), "good")


def test_pipeline_of_labels_that_do_not_exclude_one_another():
    pipe = pipeline(problem_type="multi_label_classification")
    expected = logits(pipe, TEXTS).sigmoid()[:, 1]
    found = features.from_pipeline(pipe, "good", threshold=None)(TEXTS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    with pytest.raises(FeatureError, match="exclude one another"):
        features.from_pipeline(pipe, ["good", "great"], threshold=0.5)(TEXTS)


def test_pipeline_with_one_score():
    pipe = pipeline(labels=("toxic",))
    expected = logits(pipe, TEXTS).sigmoid()[:, 0]
    found = features.from_pipeline(pipe, "toxic", threshold=None)(TEXTS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="all texts would be alike"):
        features.from_pipeline(pipe, "toxic")


def test_pipeline_cuts_texts_that_are_too_long():
    pipe = pipeline()
    f = features.from_pipeline(pipe, "good", threshold=None)
    assert f(["abcabcab" + "ccc"]).item() == f(["abcabcab"]).item()


def test_pipeline_that_is_none_and_other_refusals():
    with pytest.raises(TypeError, match=r"from_pipeline needs .* got function"):
        features.from_pipeline(lambda texts: texts, "good")
    with pytest.raises(ValueError, match=r"'awful' is not among .*'bad', 'good', 'great'"):
        features.from_pipeline(pipeline(), "awful")
    with pytest.raises(ValueError, match="'LABEL' is twice among"):
        features.from_pipeline(pipeline(labels=("LABEL", "LABEL", "x")), "LABEL")
    with pytest.raises(ValueError, match="batch_size"):
        features.from_pipeline(pipeline(), "good", batch_size=0)


# ---------------------------------------------------------------- estimators of scikit-learn's kind


class ShareOfA:
    """Says "a" from a share of 0.3 on, although the probability is the share itself."""

    classes_ = np.array(["a", "other"])

    def predict(self, texts):
        return np.where(self.predict_proba(texts)[:, 0] >= 0.3, "a", "other")

    def predict_proba(self, texts):
        share = np.array([text.count("a") / len(text) for text in texts])
        return np.stack([share, 1 - share], axis=1)


SHARES = [text.count("a") / len(text) for text in TEXTS]


def test_estimator_answers_as_it_predicts():
    f = features.from_estimator(ShareOfA(), "a")
    assert (f.name, f.binary) == ("a", True)
    expected = [share >= 0.3 for share in SHARES]
    assert expected != [share >= 0.5 for share in SHARES]  # what its probabilities would say
    assert f(TEXTS).tolist() == expected
    assert features.from_estimator(ShareOfA(), "other")(TEXTS).tolist() == [not x for x in expected]


def test_estimator_probability_and_threshold():
    number = features.from_estimator(ShareOfA(), "a", threshold=None)
    assert number(TEXTS).tolist() == SHARES
    assert not number.binary
    some = features.from_estimator(ShareOfA(), "a", threshold=0.5)
    assert some(TEXTS).tolist() == [share >= 0.5 for share in SHARES]


def test_estimator_with_numbers_for_classes_and_no_probabilities():
    class Length:
        classes_ = np.array([1, 2, 3])

        def predict(self, texts):
            return np.array([min(len(text), 3) for text in texts])

    assert features.from_estimator(Length(), 1)(TEXTS).tolist() == [len(t) == 1 for t in TEXTS]
    long = features.from_estimator(Length(), {2, 3})
    assert long.name == "2 or 3"
    assert long(TEXTS).tolist() == [len(t) >= 2 for t in TEXTS]
    with pytest.raises(TypeError, match="Length has no predict_proba"):
        features.from_estimator(Length(), 1, threshold=0.5)
    with pytest.raises(ValueError, match=r"4 is not among .* 1, 2, 3"):
        features.from_estimator(Length(), 4)


def test_estimator_that_is_not_fitted():
    class Unfitted:
        def predict(self, texts):
            return texts

    with pytest.raises(TypeError, match=r"fitted classifier.*Unfitted has no classes_"):
        features.from_estimator(Unfitted(), "a")


# ---------------------------------------------------------------- reward functions of TRL's kind


def longer(prompts, completions, **kwargs):
    """A reward as TRL documents it."""
    return [float(len(c) - len(p)) for p, c in zip(prompts, completions, strict=True)]


def test_reward_is_called_with_lists_of_prompts_and_completions():
    f = features.from_reward(longer)
    assert (f.name, f.binary, f.with_prompt) == ("longer", None, True)
    assert f(["abc", "", "ab"], ["x", "y", ""]).tolist() == [2, -1, 2]


def test_reward_gets_its_columns_and_token_ids():
    seen = {}

    def reward(completions, completion_ids, ground_truth, **kwargs):
        seen.update(kwargs, ids=completion_ids, truth=ground_truth)
        return [1.0] * len(completions)

    f = features.from_reward(
        reward,
        columns={"ground_truth": "4"},
        tokenize=lambda texts: [list(map(ord, text)) for text in texts],
    )
    assert f(["ab", "c"], ["x", "x"]).tolist() == [1, 1]
    assert seen == {"prompts": ["x", "x"], "ids": [[97, 98], [99]], "truth": ["4", "4"]}


def test_reward_that_reads_conversations():
    def polite(prompts, completions, **kwargs):
        assert prompts[0] == [{"role": "user", "content": "Hi"}]
        assert all(len(c) == 1 and c[0]["role"] == "assistant" for c in completions)
        return ["please" in c[0]["content"] for c in completions]

    f = features.from_reward(polite, conversational=True)
    assert f.evaluate(["yes please", "no"], ["Hi", "Hi"])[0].tolist() == [1, 0]
    assert f.evaluate(["yes please", "no"], ["Hi", "Hi"])[1]  # bools: binary


def test_reward_serves_in_a_target(world):
    target = EBM.fit(world, [Moment(features.from_reward(longer), 2.5)], n_samples=4000, seed=0)
    every = world.enumerate()
    assert target.values(every)["longer"].tolist() == [len(text) for text in every.texts]

    def has_a(completions, **kwargs):
        return [float("a" in text) for text in completions]

    hard = EBM(world, [Pointwise(features.from_reward(has_a))])
    possible = torch.tensor(["a" in text for text in every.texts])
    assert torch.equal(hard.log_score(every) > -math.inf, possible)


def test_reward_without_a_value_for_every_text_is_an_error():
    def math_only(completions, **kwargs):
        return [None if "a" in text else 1.0 for text in completions]

    with pytest.raises(FeatureError, match=r"'math_only' returned \[1.0, None\]"):
        features.from_reward(math_only)(["b", "a"], ["", ""])
    with pytest.raises(FeatureError, match="'longer' is declared binary but returned 2"):
        features.from_reward(longer, binary=True)(["ab"], [""])


def test_rewards_that_are_refused():
    async def later(completions, **kwargs):
        return [0.0] * len(completions)

    class Later:
        async def __call__(self, completions, **kwargs):
            return [0.0] * len(completions)

    for coroutine in (later, Later(), partial(later, x=1)):
        with pytest.raises(TypeError, match="async"):
            features.from_reward(coroutine, name="later")
    with pytest.raises(TypeError, match="needs a function"):
        features.from_reward("a reward model")
    with pytest.raises(ValueError, match="name="):
        features.from_reward(lambda completions, **kwargs: completions)
    with pytest.raises(ValueError, match="columns cannot set prompts"):
        features.from_reward(longer, columns={"prompts": "x"})


# ---------------------------------------------------------------- a target as a reward

HAS_A = feature(lambda text: "a" in text, name="a")
HAS_B = feature(lambda text: "b" in text, name="b")
LENGTH = feature(len, name="length")


def rewards_of(reward, every):
    """As TRL's trainers call it, with columns and state of their own."""
    found = reward(
        prompts=every.prompts,
        completions=every.texts,
        completion_ids=every.tokens.tolist(),
        ground_truth=["x"] * len(every),
        trainer_state=None,
        log_extra=print,
        log_metric=print,
    )
    assert isinstance(found, list)
    assert all(type(value) is float for value in found)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.05, 1.0, 3.0])
def test_the_target_is_the_optimum_of_kl_regularised_reward(world, beta):
    """E_π[r] − β KL(π‖a) = β log Z − β KL(π‖p) for every π, so no π has more than p."""
    moments = [Moment(HAS_A, 0.7), Moment(LENGTH, 2.5), Moment(HAS_B, 0.3, given=HAS_A)]
    target = EBM(world, moments, [0.8, -0.4, 1.1])
    exact = target.exact()
    reward = rewards_of(target.as_reward(beta), exact.samples)
    log_p = exact.log_base + reward / beta
    log_z = torch.logsumexp(log_p, 0)
    assert log_z.item() == pytest.approx(exact.log_z, abs=1e-12)
    torch.testing.assert_close(log_p - log_z, exact.log_prob, rtol=0, atol=1e-12)

    def objective(log_policy):
        return (log_policy.exp() * (reward - beta * (log_policy - exact.log_base))).sum()

    for seed in range(5):
        policy = TabularLM.random("abc.", 4, eos=".", scale=2.0, seed=seed)
        log_policy = policy.log_prob(exact.samples)
        kl = exact.kl_policy_target(policy)
        expected = beta * exact.log_z - beta * kl
        assert objective(log_policy).item() == pytest.approx(expected, abs=1e-11)
        assert kl > 0.01
        # The gradient that a trainer follows vanishes at p, and not elsewhere.
    for at, flat in ((exact.log_prob, True), (exact.log_base, False)):
        free = at.clone().requires_grad_()
        objective(torch.log_softmax(free, 0)).backward()
        assert (free.grad.abs().max() < 1e-12) == flat


def test_a_violated_constraint_counts_the_floor(world):
    # A soft factor keeps its value below the floor too.
    target = EBM(world, [Pointwise(HAS_A), Moment(LENGTH, 2.5), Pointwise(HAS_B)], [-3.0])
    every = world.enumerate()
    reward = rewards_of(target.as_reward(0.5, floor=-6.0), every)
    expected = [0.5 * (-3 * len(t) - 6 * ("a" not in t) - 6 * ("b" not in t)) for t in every.texts]
    torch.testing.assert_close(reward, torch.tensor(expected, dtype=torch.float64))


def test_a_hard_moment_counts_the_floor_too(world):
    target = EBM(world, [Moment(HAS_A, 1.0), Moment(HAS_B, 0.0)], [math.inf, -math.inf])
    every = world.enumerate()
    reward = rewards_of(target.as_reward(), every)
    expected = [-20.0 * ("a" not in t) - 20.0 * ("b" in t) for t in every.texts]
    torch.testing.assert_close(reward, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("floor", [-2.0, -6.0, -20.0])
def test_the_optimum_violates_at_most_as_often_as_promised(world, floor):
    target = EBM(world, [Pointwise(HAS_A), Moment(LENGTH, 2.5)], [0.4])
    exact = target.exact()
    reward = rewards_of(target.as_reward(2.0, floor=floor), exact.samples)
    optimum = torch.softmax(exact.log_base + reward / 2.0, 0)
    violates = exact.log_prob == -math.inf
    tilt = torch.tensor([0.4 * len(t) for t in exact.samples.texts], dtype=torch.float64)
    bound = math.exp(floor - exact.log_z) * (exact.log_base + tilt).exp().sum().item()
    assert 0 < optimum[violates].sum().item() <= bound
    # Among the texts that keep the constraint the proportions are those of the target.
    kept = optimum[~violates] / optimum[~violates].sum()
    torch.testing.assert_close(kept, exact.log_prob[~violates].exp(), rtol=0, atol=1e-12)


def test_a_feature_that_reads_the_prompt_gets_that_of_each_completion(world):
    reads = feature(lambda text, prompt: len(prompt) + len(text), name="p", with_prompt=True)
    reward = EBM(world, [Moment(reads, 2.0)], [0.5]).as_reward()
    assert reward(prompts=["x", "long"], completions=["ab", ""]) == [1.5, 2.0]


def test_values_are_shared_with_the_target(world):
    seen = []
    count = feature(lambda text: seen.append(text) or len(text), name="n")
    target = EBM(world, [Moment(count, 2.0)], [0.5])
    every = world.enumerate()
    target.values(every)
    rewards_of(target.as_reward(), every)
    assert len(seen) == len(every)


def test_rewards_that_cannot_be(world):
    target = EBM(world, [Pointwise(HAS_A)])
    for beta in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="beta"):
            target.as_reward(beta)
    for floor in (0.0, 1.0, -math.inf, math.nan):
        with pytest.raises(ValueError, match="floor"):
            target.as_reward(floor=floor)
    with pytest.raises(TypeError, match="standard format"):
        target.as_reward()(prompts=["x"], completions=[[{"role": "assistant", "content": "a"}]])
    assert target.as_reward().__name__ == "dmgen_reward"
