"""The training loop: going on after a kill, averaging, batches and augmentation."""

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from mibench.errors import DivergedError
from mibench.files import canonical_json
from mibench.protocol import Recipe
from mibench.training import JUDGED, Judging, augment, optimise, shuffled_batch

STEPS = 12


class MemoryCheckpoint:
    """A checkpoint that keeps all it is given, in memory, and wants one after every ``every``."""

    def __init__(self, every=1):
        self.every = every
        self.asked = 0
        self.saved = []

    def load(self):
        return self.saved[-1] if self.saved else None

    def save(self, tensors, facts):
        copied = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self.saved.append((copied, json.loads(canonical_json(facts))))

    def due(self):
        self.asked += 1
        return self.asked % self.every == 0


class Killed(BaseException):
    """Ends a training from outside."""


def network(seed=0):
    """Has every kind of state: running statistics, counters, dropout's draws, a frozen part."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
    )
    net[0].bias.requires_grad_(requires_grad=False)
    return net


def recipe(**changes):
    values = {"steps": STEPS, "lr": 0.05, "precision": "fp32", "warmup": 0.2} | changes
    return Recipe(**values)


def train(net, checkpoint, how, *, kill_at=None, seed=4, judging=None):
    def losses(step):
        if step.index == kill_at:
            raise Killed
        x = torch.randn(16, 6, generator=step.generator)
        y = x[:, :3] * 2
        return {"fit": F.mse_loss(net(x), y), "size": 1e-3 * net[4].weight.square().sum()}

    return optimise(
        net, losses, how, seed=seed, checkpoint=checkpoint, title="toy", judging=judging
    )


def assert_same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("average", [None, 0.9])
@pytest.mark.parametrize(("every", "kill_at"), [(1, 7), (3, 8), (5, 3), (1, STEPS - 1)])
def test_a_killed_run_ends_where_an_undisturbed_one_ends(optimizer, average, every, kill_at):
    how = recipe(optimizer=optimizer, clip=1.0, average=average)
    undisturbed = network()
    facts = train(undisturbed, MemoryCheckpoint(10**6), how)

    checkpoint = MemoryCheckpoint(every)
    with pytest.raises(Killed):
        train(network(), checkpoint, how, kill_at=kill_at)
    assert len(checkpoint.saved) == kill_at // every
    # Where something was saved, the new process may begin from any weights.
    resumed = network(seed=99 if checkpoint.saved else 0)
    resumed[0].bias.data.copy_(undisturbed[0].bias)
    again = train(resumed, checkpoint, how)

    assert_same_state(resumed, undisturbed)
    assert again == facts


def test_a_finished_checkpoint_is_not_trained_further():
    how, checkpoint = recipe(), MemoryCheckpoint()
    first = network()
    train(first, checkpoint, how)
    second = network(seed=99)
    train(second, checkpoint, how, kill_at=0)
    assert_same_state(first, second)


def test_another_seed_ends_elsewhere():
    one, two = network(), network()
    train(one, MemoryCheckpoint(), recipe(), seed=1)
    train(two, MemoryCheckpoint(), recipe(), seed=2)
    assert not torch.equal(one[0].weight, two[0].weight)


def test_the_global_random_state_neither_matters_nor_changes():
    found = []
    for before in (1, 2):
        net = network()
        torch.manual_seed(before)
        state = torch.get_rng_state()
        train(net, MemoryCheckpoint(), recipe())
        assert torch.equal(torch.get_rng_state(), state)
        found.append(net)
    assert_same_state(*found)


def test_training_learns_leaves_evaluation_mode_and_keeps_frozen_parts():
    net, frozen = network(), network()[0].bias.clone()
    facts = train(net, MemoryCheckpoint(), recipe(steps=150, optimizer="adamw", lr=0.02))
    course = facts["fit"]
    assert course[0][0] == 0
    assert course[-1][0] == 149
    assert course[-1][1] < 0.6 * course[0][1]
    assert len(course) <= 51
    assert not net.training
    assert torch.equal(net[0].bias, frozen)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_training_that_diverges_ends_in_one_line_and_keeps_its_last_good_state(value):
    net, checkpoint, seen = network(), MemoryCheckpoint(every=99), []

    def losses(step):
        seen.append(net[0].weight.detach().clone())
        fit = net(torch.ones(4, 6)).mean()
        return {"fit": fit, "size": fit.square() * (value if step.index >= 5 else 1.0)}

    with pytest.raises(DivergedError, match=r"toy diverged at step 5: the loss term size is .*4"):
        optimise(net, losses, recipe(), seed=0, checkpoint=checkpoint, title="toy")
    ((tensors, facts),) = checkpoint.saved
    assert facts["step"] == 4
    assert torch.equal(tensors["module.0.weight"], seen[4])


def test_the_average_is_that_of_all_steps_with_a_shorter_memory_at_first():
    net, decay, checkpoint = network(), 0.8, MemoryCheckpoint()
    expected = {name: value.clone() for name, value in net.state_dict().items()}
    train(net, checkpoint, recipe(average=decay))
    for index, (tensors, _) in enumerate(checkpoint.saved):
        keep = min(decay, (1 + index) / (10 + index))
        for name in expected:
            now = tensors[f"module.{name}"]
            mixed = keep * expected[name] + (1 - keep) * now if now.is_floating_point() else now
            expected[name] = mixed
    assert len(checkpoint.saved) == STEPS
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    last = checkpoint.saved[-1][0]["module.0.weight"]
    assert not torch.allclose(net[0].weight, last, atol=1e-4)


def test_without_an_average_the_last_weights_stay():
    net, checkpoint = network(), MemoryCheckpoint()
    train(net, checkpoint, recipe())
    assert torch.equal(net[0].weight, checkpoint.saved[-1][0]["module.0.weight"])


def test_the_rate_rises_to_its_peak_and_falls_to_zero():
    net, checkpoint = nn.Linear(1, 1), MemoryCheckpoint()
    how = recipe(steps=40, optimizer="adamw", lr=0.1, weight_decay=0.0, warmup=0.25)
    net.weight.data.zero_()
    # With a constant gradient every step of Adam is as long as the rate.
    optimise(
        net, lambda _: {"w": net.weight.sum()}, how, seed=0, checkpoint=checkpoint, title="toy"
    )
    places = [0.0, *(float(tensors["module.weight"]) for tensors, _ in checkpoint.saved)]
    rates = [before - after for before, after in itertools.pairwise(places)]
    assert max(rates) == pytest.approx(0.1, rel=0.05)
    peak = rates.index(max(rates))
    assert peak in (9, 10, 11)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.002


def told(errors, seen=None):
    """A judge that finds these errors, one after the other, and keeps the judged states."""
    found = iter(errors)

    def error(module):
        assert not module.training
        assert not torch.is_grad_enabled()
        torch.rand(3)  # must not disturb the training
        if seen is not None:
            seen.append({name: value.clone() for name, value in module.state_dict().items()})
        return next(found)

    return error


@pytest.mark.parametrize("average", [None, 0.8])
def test_the_best_of_the_judged_states_is_kept(average):
    how, seen, net = recipe(average=average), [], network()
    course = train(net, MemoryCheckpoint(), how, judging=Judging(told([3, 1, 1, 2.0], seen), 3))
    assert course[JUDGED] == [[3, 3], [6, 1], [9, 1], [12, 2]]
    for name, value in net.state_dict().items():
        assert torch.equal(value, seen[1][name])
    assert not net.training
    # What is judged is what would be used: the training itself is as without a judge.
    plain = network()
    assert course["fit"] == train(plain, MemoryCheckpoint(), how)["fit"]
    for name, value in plain.state_dict().items():
        assert torch.equal(value, seen[3][name])


def test_the_last_step_is_judged_too():
    course = train(network(), MemoryCheckpoint(), recipe(), judging=Judging(told([3, 2, 1]), 5))
    assert [step for step, _ in course[JUDGED]] == [5, 10, 12]


@pytest.mark.parametrize(
    ("errors", "patience", "last"),
    [
        ([5, 4, 4, 4, 1], 2, 8),
        ([5, 4, 4.5, 3, 3, 3], 2, 12),
        ([1, 2], 1, 4),
        ([6, 5, 4, 3, 2, 1], 1, 12),
        ([1, 2, 3, 4, 5, 6], None, 12),
    ],
)
def test_patience_ends_the_training(errors, patience, last):
    net, checkpoint = network(), MemoryCheckpoint(every=99)
    course = train(net, checkpoint, recipe(), judging=Judging(told(errors), 2, patience))
    assert course[JUDGED][-1][0] == last
    assert checkpoint.saved[-1][1]["step"] == last
    # Ended for good: who goes on from here does not train or judge again.
    again = network(seed=99)
    judging = Judging(told([]), 2, patience)
    assert train(again, checkpoint, recipe(), kill_at=last, judging=judging) == course
    assert_same_state(again, net)


@pytest.mark.parametrize("average", [None, 0.9])
@pytest.mark.parametrize(("every", "kill_at"), [(1, 7), (3, 8), (5, 11)])
def test_a_killed_run_remembers_its_best_state(average, every, kill_at):
    how, errors = recipe(average=average), {2: 5.0, 4: 1.0, 6: 3.0, 8: 4.0, 10: 2.0, 12: 6.0}
    undisturbed = network()
    facts = train(undisturbed, MemoryCheckpoint(99), how, judging=Judging(told(errors.values()), 2))
    checkpoint = MemoryCheckpoint(every)
    judging = Judging(told(errors.values()), 2)
    with pytest.raises(Killed):
        train(network(), checkpoint, how, kill_at=kill_at, judging=judging)
    reached = checkpoint.saved[-1][1]["step"]
    resumed = network(seed=99)
    resumed[0].bias.data.copy_(undisturbed[0].bias)
    left = [error for step, error in errors.items() if step > reached]
    again = train(resumed, checkpoint, how, judging=Judging(told(left), 2))
    assert again == facts
    assert_same_state(resumed, undisturbed)


def test_a_judgement_that_is_not_a_number_ends_in_one_line():
    judging = Judging(told([1.0, float("nan")]), 4)
    with pytest.raises(DivergedError, match=r"toy diverged before step 8: .* is nan\. Lower"):
        train(network(), MemoryCheckpoint(), recipe(), judging=judging)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_shows_every_image_once(count, batch, epoch, seed):
    batch = min(batch, count)
    steps = count // batch
    seen = torch.cat([shuffled_batch(count, batch, seed, epoch * steps + i) for i in range(steps)])
    assert len(seen) == count - count % batch
    assert len(set(seen.tolist())) == len(seen)
    assert int(seen.min()) >= 0
    assert int(seen.max()) < count


@given(st.integers(1, 20), st.integers(1, 60))
def test_a_batch_is_never_larger_than_the_set(count, batch):
    assert len(shuffled_batch(count, batch, 0, 3)) == min(count, batch)


def test_epochs_have_orders_of_their_own():
    first, second = shuffled_batch(50, 50, 0, 0), shuffled_batch(50, 50, 0, 1)
    assert not torch.equal(first, second)
    assert not torch.equal(first, shuffled_batch(50, 50, 1, 0))
    assert torch.equal(first, shuffled_batch(50, 50, 0, 0))
    assert not torch.equal(first, torch.arange(50))


def placed(image, pad, flip):
    """All images that a flip and a shift can make of one."""
    image = image.flip(2) if flip else image
    side = image.shape[-1]
    wide = F.pad(image[None], (pad,) * 4, mode="reflect")[0]
    return {
        (dy, dx): wide[:, dy : dy + side, dx : dx + side]
        for dy in range(2 * pad + 1)
        for dx in range(2 * pad + 1)
    }


@given(st.booleans(), st.integers(0, 3), st.integers(0, 1000))
def test_augmentation_gives_a_flipped_and_shifted_copy(flip, crop, seed):
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    before = images.clone()
    draws = torch.Generator().manual_seed(seed + 1)
    made = augment(images, recipe(flip=flip, crop=crop), draws)
    assert made.shape == images.shape
    assert torch.equal(images, before)
    for new, old in zip(made, images, strict=True):
        options = [
            option for flipped in ({False, flip}) for option in placed(old, crop, flipped).values()
        ]
        assert any(torch.equal(new, option) for option in options)


def test_augmentation_uses_all_shifts_and_both_sides_per_image():
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    draws = torch.Generator().manual_seed(1)
    made = augment(image.expand(400, 3, 8, 8), recipe(crop=1), draws)
    found = {False: set(), True: set()}
    for new in made:
        for flip in (False, True):
            found[flip] |= {
                at for at, option in placed(image, 1, flip).items() if torch.equal(new, option)
            }
    assert all(len(shifts) == 9 for shifts in found.values())


def test_no_augmentation_is_no_change():
    images = torch.rand(3, 3, 8, 8)
    made = augment(images, recipe(flip=False, crop=0), torch.Generator())
    assert torch.equal(made, images)
