"""Tasks: what a loss rewards, what a score counts, and that a constant answer earns nothing."""

import pytest
import torch
from torch.nn import functional as F

from mibench.metrics.intervals import balanced_accuracy, balanced_per_attribute
from mibench.record import AttributeScore
from mibench.scoring import attribute_scores, utility_scores
from mibench.task import Attributes, Classification

CLASSES = Classification(("cat", "dog", "owl"))
FACES = Attributes(("Smiling", "Young"))


def test_classes_are_learned_and_counted():
    logits = torch.tensor([[2.0, 0, 0], [0, 0, 1]])
    labels = torch.tensor([0, 1])
    assert CLASSES.outputs == 3
    torch.testing.assert_close(CLASSES.loss(logits, labels), F.cross_entropy(logits, labels))
    assert CLASSES.correct(logits, labels).tolist() == [1, 0]
    assert CLASSES.describe(labels[1]) == "dog"


def test_smoothing_keeps_the_answer_and_softens_the_loss():
    sure, labels = torch.tensor([[9.0, -9, -9]]), torch.tensor([0])
    smoothed = CLASSES.smoothed(0.1)
    assert smoothed.loss(sure, labels) > CLASSES.loss(sure, labels)
    expected = F.cross_entropy(sure, labels, label_smoothing=0.1)
    torch.testing.assert_close(smoothed.loss(sure, labels), expected)
    marks, yes = torch.tensor([[9.0, -9]]), torch.tensor([[1, 0]], dtype=torch.uint8)
    assert FACES.smoothed(0.1).loss(marks, yes) > FACES.loss(marks, yes)


def test_attributes_are_learned_and_counted_each_for_itself():
    logits = torch.tensor([[1.0, -1.0], [1.0, 1.0]])
    labels = torch.tensor([[1, 1], [1, 1]], dtype=torch.uint8)
    assert FACES.correct(logits, labels).tolist() == [0.5, 1]
    expected = F.binary_cross_entropy_with_logits(logits, labels.float())
    torch.testing.assert_close(FACES.loss(logits, labels), expected)
    assert FACES.describe(labels[0]) == "Smiling, Young"
    assert FACES.describe(torch.zeros(2, dtype=torch.uint8)) == ""


def test_a_constant_answer_gets_one_half_however_rare_the_attribute_is():
    torch.manual_seed(0)
    truth = torch.rand(4000, 3) < torch.tensor([0.5, 0.05, 0.95])
    always = torch.zeros_like(truth)
    estimate = balanced_accuracy(always, truth, 0)
    assert estimate.value == pytest.approx(0.5)
    assert balanced_per_attribute(truth, truth) == [1, 1, 1]
    assert balanced_accuracy(truth, truth, 0).low == 1


def test_balanced_accuracy_is_that_of_its_definition():
    torch.manual_seed(1)
    truth, told = torch.rand(300, 2) < 0.3, torch.rand(300, 2) < 0.4
    for at, value in enumerate(balanced_per_attribute(told, truth)):
        right = (told == truth)[:, at].float()
        rates = [right[truth[:, at] == answer].mean().item() for answer in (True, False)]
        assert value == pytest.approx(sum(rates) / 2, abs=1e-6)
    estimate = balanced_accuracy(told, truth, 0)
    assert estimate.low < estimate.value < estimate.high
    assert estimate.high - estimate.low < 0.15


def test_an_attribute_of_one_value_has_no_balanced_accuracy():
    truth = torch.tensor([[True, True], [False, True]])
    assert balanced_per_attribute(truth, truth) == [1, None]
    nothing = balanced_accuracy(truth[:, 1:], truth[:, 1:], 0)
    assert nothing.value is None
    assert nothing.reason


def test_utility_is_reported_for_what_the_images_are_labelled_with():
    logits, labels = torch.eye(3).repeat(4, 1), torch.tensor([0, 1, 2] * 3 + [1, 1, 1])
    (accuracy,) = utility_scores("validation ", CLASSES, logits, labels, 0)
    assert accuracy.metric == "validation accuracy"
    assert accuracy.value == pytest.approx(10 / 12)
    (unknown,) = utility_scores("validation ", CLASSES, None, labels, 0)
    assert unknown.value is None
    assert "another dataset" in unknown.reason
    assert attribute_scores(CLASSES, logits, logits, labels) == []


def test_each_attribute_is_reported_beside_the_undefended_model():
    labels = torch.tensor([[1, 1], [0, 1], [1, 1], [0, 1]], dtype=torch.uint8)
    good, poor = labels.float() * 2 - 1, torch.ones(4, 2)
    names = [score.metric for score in utility_scores("", FACES, good, labels, 0)]
    assert names == ["accuracy", "balanced accuracy"]
    first, second = attribute_scores(FACES, good, poor, labels)
    assert first == AttributeScore(
        name="Smiling", accuracy=1, balanced_accuracy=1, undefended_accuracy=0.5,
        undefended_balanced_accuracy=0.5,
    )  # fmt: skip
    assert second.balanced_accuracy is None
