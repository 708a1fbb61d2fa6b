"""The fit against its optimality conditions and closed forms; values against one text at a time."""

import copy
import json
import math

import pytest
import torch

from dmgen import features
from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.constraints.feature import FeatureError
from dmgen.estimates.score import Score
from dmgen.features import ClassifierHead
from dmgen.features.classifier_fit import MAX_GRADIENT
from dmgen.models.hf.tokenization import prompt_ids
from dmgen.target.ebm import EBM

TEXTS = ["", "a", "ab", "abc", "cab", "bbbb", "aac", "c", "ccaab", "b", "ba", "acca"]


def counts(texts):
    """A text's length and the number of each of its letters."""
    rows = [[len(text), *(text.count(letter) for letter in "abc")] for text in texts]
    return torch.tensor(rows, dtype=torch.float32)


def more_b(**changes):
    """A head that says "b" where 2 #b − 1 > #a, read from `counts`."""
    fields = {
        "weight": torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]]),
        "bias": torch.tensor([0.0, -1.0]),
        "labels": ("a", "b"),
        "base": "letters",
    }
    return ClassifierHead(**(fields | changes))


def drawn(n, width=6, seed=0):
    """n texts of three classes, their labels, and their embedding: correlated, of unequal scales.

    The first dimension is constant, up to rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator)
    hidden = torch.randn(n, width, generator=generator) @ mix * 10.0 ** torch.arange(-2, width - 2)
    hidden = hidden.double()
    hidden[:, 0] = 0.1 + 1e-9 * hidden[:, 1].sign()
    score = hidden[:, -3:] / hidden[:, -3:].std(0) + torch.randn(n, 3, generator=generator)
    texts = [f"text {i}" for i in range(n)]
    rows = dict(zip(texts, hidden, strict=True))
    labels = [f"class {c}" for c in score.argmax(1).tolist()]
    return texts, labels, lambda some: torch.stack([rows[text] for text in some])


# ---------------------------------------------------------------- the fit


def test_the_fit_is_the_optimum_of_its_objective():
    texts, labels, embed = drawn(450)
    found = features.fit_classifier(
        embed, texts[50:], labels[50:], l2=0.03, test=(texts[:50], labels[:50])
    )
    assert found.labels == ("class 0", "class 1", "class 2")
    hidden = embed(texts[50:]).double()
    truth = torch.tensor([found.labels.index(label) for label in labels[50:]])
    z = (hidden - hidden.mean(0)) / hidden.std(0, correction=0)
    z[:, 0] = 0.0  # the constant dimension, which must have no say

    def steepest(weight, bias):
        weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(z @ weight.T + bias, truth)
        (loss + 0.03 / 2 * (weight**2).sum()).backward()
        return torch.cat([weight.grad.ravel(), bias.grad]).abs().max().item()

    # The test computes z in another order: 1e-12 for the last digits.
    assert steepest(found.weight, found.bias) <= MAX_GRADIENT + 1e-12
    assert steepest(found.weight * 1.001, found.bias) > 10 * MAX_GRADIENT
    assert steepest(found.weight, found.bias + torch.tensor([1e-3, 0, 0])) > 10 * MAX_GRADIENT


def test_with_one_binary_dimension_it_finds_the_frequencies():
    """Without a penalty the model is saturated: P(label | x) is the share of the label at x."""
    table = {("x", "yes"): 30, ("x", "no"): 10, ("y", "yes"): 12, ("y", "no"): 48}
    pairs = [(*key, i) for key, n in table.items() for i in range(n)]
    texts, labels = [f"{x} {y} {i}" for x, y, i in pairs], [y for _, y, _ in pairs]

    def embed(some):
        return torch.tensor([[float(text[0] == "x")] for text in some])

    l2 = 1e-9
    found = features.fit_classifier(embed, texts, labels, l2=l2, test=(["x new"], ["no"]))
    p = found.log_prob(torch.tensor([[1.0], [0.0]])).exp()
    expected = torch.tensor([[10 / 40, 30 / 40], [48 / 60, 12 / 60]], dtype=torch.float64)
    # Stationarity: with the gaps e_x, e_y of p to the shares, 0.4 e_x + 0.6 e_y and
    # 0.4 z_x e_x + 0.6 z_y e_y are at most g = 1e-6 + l2 |W|; z = ±sqrt(odds), so with
    # z_x − z_y = 1 / sqrt(0.24) each gap is at most g (1 + |z|) sqrt(0.24) / 0.4 < 3 g.
    g = MAX_GRADIENT + l2 * found.weight.abs().max().item()
    torch.testing.assert_close(p, expected, rtol=0, atol=3 * g)
    assert found.test_accuracy.value == 0.0  # the new text is like those that are "yes"


def test_the_accuracy_is_that_of_texts_that_the_fit_has_not_seen():
    """With labels at random nothing can be learnt, however well 200 dimensions fit 320 texts."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(400, 200, generator=generator)
    labels = ["yes" if coin else "no" for coin in torch.rand(400, generator=generator) < 0.5]
    texts = [str(i) for i in range(400)]

    def embed(some):
        return hidden[[int(text) for text in some]]

    # Every text occurs twice: split by row, most of the held-out ones would have been seen.
    found = features.fit_classifier(embed, texts * 2, labels * 2, l2=1e-3)
    score = found.test_accuracy
    assert score.n == 2 * 80
    # Twice the same text tells nothing new: the error is that of 80.
    assert abs(score.value - 0.5) < 5 * math.sqrt(0.25 / 80)
    right = sum(found.labels[i] == label for i, label in zip(
        found.log_prob(hidden).argmax(1).tolist(), labels, strict=True))  # fmt: skip
    assert right / 400 > 0.5 + 5 * math.sqrt(0.25 / 400)


def test_accuracy_on_given_texts_counts_the_right_answers():
    texts, labels, embed = drawn(300)
    found = features.fit_classifier(
        embed, texts[100:], labels[100:], test=(texts[:100], labels[:100])
    )
    answers = found.log_prob(embed(texts[:100])).argmax(1).tolist()
    share = sum(found.labels[i] == y for i, y in zip(answers, labels[:100], strict=True)) / 100
    stderr = math.sqrt(share * (1 - share) / 100)
    assert 0.4 < share < 1
    assert found.test_accuracy.n == 100
    assert found.test_accuracy.value == pytest.approx(share, abs=1e-12)
    assert found.test_accuracy.stderr == pytest.approx(stderr, abs=1e-12)


def test_a_fit_is_repeatable_and_independent_of_batches():
    texts, labels, embed = drawn(200)
    one = features.fit_classifier(embed, texts, labels, seed=4, base="x")
    assert one == features.fit_classifier(embed, texts, labels, seed=4, base="x", batch_size=7)
    other = features.fit_classifier(embed, texts, labels, seed=5, base="x")
    assert not torch.equal(one.weight, other.weight)  # another fifth was held out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ["class 0"]}, "200 texts but 1 labels"),
        ({"labels": ["class 0"] * 200}, r"two classes or more.*\['class 0'\]"),
        ({"l2": 0.0}, "l2 must be positive"),
        ({"l2": math.nan}, "l2 must be positive"),
        ({"test": (["text 3"], ["class 0"])}, "'text 3'"),
        ({"test": (["new"], ["class 9"])}, "class 9"),
        ({"test": ([], [])}, "the 0 test texts"),
        ({"texts": ["a", "b", "a"], "labels": ["1", "2", "1"]}, "the 0 test texts"),
    ],
)
def test_what_cannot_be_fitted(changes, message):
    texts, labels, embed = drawn(200)
    arguments = {"texts": texts, "labels": labels} | changes
    with pytest.raises(ValueError, match=message):
        features.fit_classifier(embed, **arguments)


# ---------------------------------------------------------------- the head


def test_log_prob_by_hand():
    h = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    # Logits 1 and 2·2 − 1 = 3.
    expected = torch.tensor([[1.0, 3.0]], dtype=torch.float64).log_softmax(1)
    torch.testing.assert_close(more_b().log_prob(h), expected)
    # Standardised: #a is (1 − 3) / 4 = −0.5, #b is (2 − 0) / 1 = 2.
    mean, std = torch.tensor([0.0, 3.0, 0.0, 0.0]), torch.tensor([1.0, 4.0, 1.0, 1.0])
    expected = torch.tensor([[-0.5, 3.0]], dtype=torch.float64).log_softmax(1)
    torch.testing.assert_close(more_b(mean=mean, std=std).log_prob(h), expected)


def test_saved_and_loaded_it_is_equal(tmp_path):
    texts, labels, embed = drawn(200)
    fitted = features.fit_classifier(embed, texts, labels, base="tiny-bios")
    fitted.save_pretrained(tmp_path / "new" / "head")
    loaded = ClassifierHead.from_pretrained(tmp_path / "new" / "head")
    assert loaded == fitted
    assert loaded.test_accuracy == fitted.test_accuracy
    more_b().save_pretrained(tmp_path / "plain")
    assert ClassifierHead.from_pretrained(str(tmp_path / "plain")) == more_b()
    facts = json.loads((tmp_path / "plain" / "head.json").read_text(encoding="utf-8"))
    assert facts == {
        "labels": ["a", "b"],
        "base": "letters",
        "pooling": "mean",
        "test_accuracy": None,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"weight": more_b().weight + 1e-12},
        {"bias": more_b().bias + 1e-12},
        {"labels": ("a", "c")},
        {"base": "other"},
        {"mean": torch.zeros(4), "std": torch.ones(4)},
        {"test_accuracy": Score(0.5, 0.1, 25)},
    ],
)
def test_equality_looks_at_every_field(changes):
    assert more_b() == more_b()
    assert more_b(**changes) != more_b()
    assert more_b() != "a head"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(3, 4)}, r"weight .* must be \(2, 4\)"),
        ({"weight": torch.zeros(4)}, "weight"),
        ({"weight": torch.full((2, 4), math.nan)}, "finite"),
        ({"bias": torch.zeros(3)}, r"bias .* must be \(2,\)"),
        ({"mean": torch.zeros(4)}, "both mean and std"),
        ({"mean": torch.zeros(4), "std": torch.zeros(4)}, "std of a head must be positive"),
        ({"mean": torch.zeros(4), "std": torch.ones(3)}, r"std .* must be \(4,\)"),
        ({"labels": ("a", "a")}, "different labels"),
        ({"pooling": "last"}, "pooling"),
    ],
)
def test_impossible_heads(changes, message):
    with pytest.raises(ValueError, match=message):
        more_b(**changes)


def test_a_head_with_a_single_label_says_nothing():
    with pytest.raises(ValueError, match="two or more"):
        more_b(weight=torch.zeros(1, 4), bias=torch.zeros(1), labels=("a",))


@pytest.mark.parametrize("damage", ["no folder", "no weights", "no facts", "facts", "weights"])
def test_a_folder_without_a_head(tmp_path, damage):
    folder = tmp_path / "head"
    more_b().save_pretrained(folder)
    if damage == "no folder":
        folder = tmp_path / "nothing"
    elif damage == "no weights":
        (folder / "head.safetensors").unlink()
    elif damage == "no facts":
        (folder / "head.json").unlink()
    elif damage == "facts":
        (folder / "head.json").write_text('{"labels": ["a", "b"]}')
    else:
        (folder / "head.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"no classifier head in .*head\.json and head"):
        ClassifierHead.from_pretrained(folder)


# ---------------------------------------------------------------- the feature


def test_the_most_probable_label_wins():
    says_b = features.classifier(more_b(), counts, "b")
    assert (says_b.name, says_b.binary) == ("b", True)
    expected = [2 * text.count("b") - 1 > text.count("a") for text in TEXTS]
    assert says_b(TEXTS).tolist() == expected
    assert 0 < sum(expected) < len(TEXTS)
    # Of two labels a text has one; at a tie, 0 to 0, it is the first.
    assert (features.classifier(more_b(), counts, "a")(TEXTS) + says_b(TEXTS)).tolist() == [1] * 12


def test_threshold_and_probability():
    p = torch.tensor([1 / (1 + math.exp(t.count("a") - 2 * t.count("b") + 1)) for t in TEXTS])
    probability = features.classifier(more_b(), counts, "b", threshold=None, name="how b")
    assert (probability.name, probability.binary) == ("how b", False)
    torch.testing.assert_close(probability(TEXTS), p.double())
    sure = features.classifier(more_b(), counts, "b", threshold=0.9)
    assert sure.binary
    assert sure(TEXTS).tolist() == (p >= 0.9).tolist()


def test_the_empty_text_is_embedded_like_any_other():
    seen = []

    def embed(texts):
        seen.extend(texts)
        return counts(texts)

    # Its counts are 0, so the probabilities are softmax(bias).
    p = features.classifier(more_b(), embed, "b", threshold=None)([""]).item()
    assert p == pytest.approx(1 / (1 + math.e), abs=1e-12)
    assert seen == [""]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_values_do_not_depend_on_batches(batch_size):
    sizes = []

    def embed(texts):
        sizes.append(len(texts))
        return counts(texts)

    f = features.classifier(more_b(), embed, "b", threshold=None, batch_size=batch_size)
    assert torch.equal(f(TEXTS), features.classifier(more_b(), counts, "b", threshold=None)(TEXTS))
    assert max(sizes) <= batch_size
    assert sum(sizes) == len(TEXTS)


def test_it_serves_in_a_target_and_each_text_is_embedded_once(world):
    seen = []

    def embed(texts):
        seen.extend(texts)
        return counts(texts)

    says_b = features.classifier(more_b(), embed, "b")
    likely_b = features.classifier(more_b(), counts, "b", threshold=None, name="likely b")
    target = EBM.fit(world, [Moment(says_b, 0.6), Moment(likely_b, 0.5)], n_samples=5000, seed=0)
    every = world.enumerate()
    expected = [2 * text.count("b") - 1 > text.count("a") for text in every.texts]
    assert target.values(every)["b"].tolist() == expected
    assert len(seen) == len(set(seen))
    assert EBM(world, [Pointwise(says_b)]).exact().moments["b"] == 1.0


def test_made_twice_it_is_the_same_feature(tmp_path):
    more_b().save_pretrained(tmp_path)
    one, other = (features.classifier(tmp_path, counts, "b") for _ in range(2))
    assert one == other == features.classifier(more_b(), counts, "b")
    assert one != features.classifier(tmp_path, counts, "b", threshold=0.5)
    assert one != features.classifier(tmp_path, len, "b")


def test_bad_declarations(tmp_path):
    with pytest.raises(ValueError, match="'c' is not among"):
        features.classifier(more_b(), counts, "c")
    with pytest.raises(ValueError, match="no classifier head"):
        features.classifier(tmp_path, counts, "b")
    with pytest.raises(ValueError, match="batch_size"):
        features.classifier(more_b(), counts, "b", batch_size=0)
    with pytest.raises(TypeError, match="embed must be a function"):
        features.classifier(more_b(), "gpt2", "b")


@pytest.mark.parametrize(
    ("embed", "message"),
    [
        (lambda texts: counts(texts)[:, :3], r"reads hidden states \(N, 4\) of letters"),
        (lambda texts: counts(texts)[:1], r"embed must give \(2, D\) for 2 texts, got \(1, 4\)"),
        (lambda texts: counts(texts).numpy(), "got ndarray"),
        (lambda texts: counts(texts) / 0, "NaN or infinite states for the text 'a'"),
    ],
)
def test_embeddings_that_cannot_be_read(embed, message):
    with pytest.raises(FeatureError, match=message):
        features.classifier(more_b(), embed, "b")(["a", "b"])


# ---------------------------------------------------------------- on a language model


def mean_states(lm, *, over_padding=False):
    """The mean last hidden state over the tokens of a text, which follow the start token.

    A text without tokens has the state of the start token. All in double precision.
    """

    trunk = copy.deepcopy(lm.model.base_model).double()

    def embed(texts):
        start = prompt_ids(lm.tokenizer, "")
        rows = [start + lm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        width = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        lengths = torch.tensor([[width if over_padding else len(row)] for row in rows])
        position = torch.arange(width)
        counted = (position < lengths) & ((position >= len(start)) | (lengths == len(start)))
        with torch.no_grad():
            states = trunk(tokens).last_hidden_state
        return (states * counted.unsqueeze(-1)).sum(1) / counted.sum(1, keepdim=True)

    return embed


def gap_to_one_by_one(embed, fitted):
    f = features.classifier(fitted, embed, "more a", threshold=None)
    return (f(TEXTS) - torch.cat([f([text]) for text in TEXTS])).abs().max().item()


def test_a_text_has_the_same_value_alone_and_beside_longer_ones(gpt2_lm):
    texts = sorted({*TEXTS, *(a + b + c for a in "abc" for b in "abc" for c in ("", *"abc"))})
    labels = ["more a" if text.count("a") > text.count("b") else "else" for text in texts]
    # Alone a text has no padding, so the wrong way is right in batches of one.
    right, wrong = mean_states(gpt2_lm), mean_states(gpt2_lm, over_padding=True)
    fitted = features.fit_classifier(right, texts, labels, batch_size=1)
    # Rounding, 1e-15 a number, is all that may differ.
    assert gap_to_one_by_one(right, fitted) < 1e-10
    assert gap_to_one_by_one(wrong, fitted) > 1e-2
