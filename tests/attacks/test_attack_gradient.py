"""The gradient attack and the choice of weights."""

import functools
import json
import math

import pytest
import torch
from torch.nn import functional as F

from mibench.attacks import budget
from mibench.attacks.descent import Descent, Schedule, descend
from mibench.attacks.gradient import Gradient, total_variation
from mibench.attacks.spectrum import Spectrum
from mibench.attacks.tuning import best_weight, mean_course
from mibench.errors import ThreatModelError
from mibench.threat import Adversary, Knowledge, Target

SMALL = {"steps": 200, "restarts": 1, "tuning_images": 2}


@functools.cache
def rotation(size):
    draws = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(size, size, generator=draws)).Q


def rotated(images):
    """A linear client that can be undone: an orthogonal mixture of all values."""
    return (images.flatten(1) @ rotation(images[0].numel()),)


def made(workshop, target, pictures, **params):
    attack = Gradient(Gradient.Params(**(SMALL | params)), workshop)
    attack.prepare(target, pictures(4), pictures(4, seed=1))
    return attack


def test_it_undoes_a_reversible_linear_client(workshop, make_target, pictures):
    attack = made(workshop, make_target(rotated), pictures, lr=0.2)
    secret = pictures(3, seed=2).images()
    torch.manual_seed(0)
    rebuilt = attack.reconstruct(rotated(secret))
    assert rebuilt.shape == secret.shape
    assert rebuilt.min() >= 0
    assert rebuilt.max() <= 1
    per_image = (rebuilt - secret).square().flatten(1).mean(1)
    assert all(-10 * math.log10(error) > 25 for error in per_image.tolist())


def test_images_of_a_batch_do_not_meet(workshop, make_target, pictures):
    attack = made(workshop, make_target(rotated), pictures, steps=15, restarts=2)
    (share,) = rotated(pictures(4, seed=2).images())
    other = share.clone()
    other[3] = 10 * torch.randn(share.shape[1])
    torch.manual_seed(0)
    one = attack.reconstruct((share,))
    torch.manual_seed(0)
    two = attack.reconstruct((other,))
    torch.testing.assert_close(one[:3], two[:3], rtol=1e-4, atol=1e-5)
    assert (one[3] - two[3]).abs().max() > 0.1


def constructed(attack, monkeypatch, objective):
    """Makes the descent return images that say which start they come from."""
    restarts, count = objective.shape

    def descended(shares, weights, starts):
        assert len(shares[0]) == len(weights) == count
        assert starts == restarts
        images = torch.arange(float(restarts * count)).view(count, restarts, 1, 1, 1) / 100
        final = objective.T.flatten()
        run = Descent([], final, torch.ones_like(final), final[:, None], [0])
        return images.expand(-1, -1, 3, 16, 16), run

    monkeypatch.setattr(attack, "_descend", descended)
    found = attack.reconstruct((torch.zeros(count, 5),))[:, 0, 0, 0] * 100
    return [divmod(round(place), restarts)[::-1] for place in found.tolist()]


def test_each_image_keeps_its_best_start(workshop, make_target, pictures, monkeypatch):
    attack = made(workshop, make_target(rotated), pictures, steps=1, restarts=3)
    objective = torch.tensor([[3.0, 1.0, 2.0, 9.0], [1.0, 2.0, 3.0, -9.0], [2.0, 3.0, 1.0, 0.0]])
    found = constructed(attack, monkeypatch, objective)
    assert found == [(1, 0), (0, 1), (2, 2), (1, 3)]


def test_a_start_that_diverged_is_not_kept(workshop, make_target, pictures, monkeypatch):
    attack = made(workshop, make_target(rotated), pictures, steps=1, restarts=2)
    found = constructed(attack, monkeypatch, torch.tensor([[float("nan"), 1.0], [5.0, 2.0]]))
    assert found == [(1, 0), (0, 1)]


def spied(attack):
    """Collects what each descent was given and returned."""
    calls, original = [], attack._descend

    def spy(shares, weights, restarts):
        found = original(shares, weights, restarts)
        calls.append((len(weights) * restarts, *found))
        return found

    attack._descend = spy
    return calls


def test_a_share_of_no_numbers_gives_a_grey_image(workshop, make_target, pictures):
    attack = made(workshop, make_target(rotated), pictures, steps=30, restarts=2)
    (share,) = rotated(pictures(2, seed=2).images())
    share[1] = float("nan")
    rebuilt = attack.reconstruct((share,))
    assert (rebuilt[1] == 0.5).all()
    assert rebuilt[0].std() > 0.01


def test_more_starts_reach_a_lower_objective_per_image(workshop, make_target, pictures):
    def bumpy(images):
        return (torch.sin(6 * rotated(images)[0]),)

    attack = made(workshop, make_target(bumpy), pictures, steps=20, restarts=3)
    calls = spied(attack)
    kept = attack.reconstruct(bumpy(pictures(4, seed=3).images()))
    ((_, images, run),) = calls
    for place, objective in enumerate(run.objective.view(4, 3)):
        assert objective.unique().numel() == 3
        assert torch.equal(kept[place], images[place, objective.argmin()])


def test_large_batches_descend_in_groups_with_the_same_result(
    workshop, make_target, pictures, monkeypatch
):
    attack = made(workshop, make_target(rotated), pictures, steps=30, restarts=2)
    shares = rotated(pictures(5, seed=2).images())
    calls = spied(attack)
    torch.manual_seed(0)
    whole = attack.reconstruct(shares)
    monkeypatch.setattr(budget, "VALUES", 5 * 3 * 16 * 16)
    torch.manual_seed(0)
    rebuilt = attack.reconstruct(shares)
    assert [size for size, _, _ in calls] == [10, 4, 4, 2]
    torch.testing.assert_close(rebuilt, whole, rtol=1e-4, atol=1e-5)


def test_memory_that_runs_out_changes_no_image(workshop, make_target, pictures):
    attack = made(workshop, make_target(rotated), pictures, steps=30, restarts=2)
    shares = rotated(pictures(5, seed=2).images())
    torch.manual_seed(0)
    whole = attack.reconstruct(shares)
    sizes, original = [], attack._target.client

    def scarce(images):
        sizes.append(len(images))
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(images)

    attack._target.client = scarce
    torch.manual_seed(0)
    rebuilt = attack.reconstruct(shares)
    assert sizes[0] == 10
    assert set(sizes[1:]) == {4, 2}
    torch.testing.assert_close(rebuilt, whole, rtol=1e-4, atol=1e-5)


def test_images_that_have_converged_leave_and_the_others_do_not_notice(
    workshop, make_target, pictures
):
    attack = made(
        workshop, make_target(rotated), pictures, steps=200, weights=(0.0,), tolerance=0.05
    )
    (hard,) = rotated(pictures(2, seed=2).images())
    # Out of reach of any image: the descent soon finds the nearest one, and stays there.
    easy = 10 * torch.randn(hard.shape, generator=torch.Generator().manual_seed(0))
    calls = spied(attack)
    torch.manual_seed(0)
    alone = attack.reconstruct((torch.cat([hard, hard]),))
    torch.manual_seed(0)
    mixed = attack.reconstruct((torch.cat([hard, easy]),))
    steps = [run.steps.tolist() for _, _, run in calls]
    assert steps[0][:2] == steps[1][:2]
    assert max(steps[1][2:]) < min(steps[1][:2])
    torch.testing.assert_close(mixed[:2], alone[:2], rtol=1e-4, atol=1e-5)


def test_the_course_of_the_chosen_weight_is_kept_and_falls(workshop, make_target, pictures):
    attack = made(workshop, make_target(rotated), pictures, weights=(0.01, 100.0))
    course = attack.facts()["course"]
    assert [step for step, _ in course] == list(range(0, 200, 10))
    values = [value for _, value in course]
    assert values[-1] < 0.05 * values[0]
    json.dumps(attack.facts(), allow_nan=False)


def test_half_precision_reaches_about_the_same_image(workshop, make_defense, pictures):
    defense = make_defense("none", "map")
    target = Target(defense, Adversary(Knowledge.WHITE_BOX, (0,)), "none")
    secret = pictures(4, seed=2).images()
    shares, errors = target.query(secret), {}
    for precision in ("fp32", "mixed", "bf16"):
        attack = made(workshop, target, pictures, precision=precision, weights=(1.0,), steps=60)
        torch.manual_seed(0)
        rebuilt = attack.reconstruct(shares)
        assert rebuilt.dtype == torch.float32
        errors[precision] = 10 * math.log10((rebuilt - secret).square().mean())
    assert errors["fp32"] < 10 * math.log10((secret - 0.5).square().mean()) - 3
    assert abs(errors["mixed"] - errors["fp32"]) < 0.5
    assert abs(errors["bf16"] - errors["fp32"]) < 1.0


@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 15, 22), (3, 1, 5)])
def test_coordinates_keep_the_deviation_and_favour_coarse_brightness(shape):
    torch.manual_seed(0)
    spectrum = Spectrum(shape, torch.device("cpu"))
    noise = torch.randn(2000, *shape)
    images = spectrum(noise)
    assert images.shape == noise.shape
    assert images.std().item() == pytest.approx(1, rel=0.05)
    grey = images.mean(1)
    assert grey.std() > 2 * (images[:, 0] - grey).std()
    if min(shape[1:]) > 4:
        flat = grey.flatten(1).mean(1).std()
        assert flat > 2 * grey.std() / math.sqrt(grey[0].numel())


def test_the_gradient_of_the_objective_is_that_of_the_distance(make_target, pictures):
    target = make_target(rotated)
    images = pictures(2, seed=4).images().double().requires_grad_()
    basis = torch.linalg.qr(rotation(3 * 16 * 16).double()).Q
    target.client = lambda x: (x.flatten(1) @ basis,)
    shares = (pictures(2, seed=5).images().double().flatten(1) @ basis,)
    # An orthogonal client: the misfit is the squared distance of the images, over twice tau^2.
    scale = 0.05 * shares[0].square().mean(1).sqrt()
    found = -target.log_likelihood(shares, target.client(images))
    difference = images - (shares[0] @ basis.T).view_as(images)
    torch.testing.assert_close(found, difference.square().flatten(1).sum(1) / (2 * scale**2))
    (gradient,) = torch.autograd.grad(found.sum(), images)
    torch.testing.assert_close(gradient, difference / scale.square().view(-1, 1, 1, 1))


def test_it_needs_the_weights_of_the_client(workshop, make_target, pictures):
    attack = made(workshop, make_target(rotated), pictures, steps=1)
    attack._target = make_target(rotated, Knowledge.BLACK_BOX)
    with pytest.raises(ThreatModelError):
        attack.reconstruct(rotated(pictures(2).images()))


def test_total_variation_on_a_small_case():
    flat = torch.full((1, 3, 4, 4), 0.3)
    step = flat.clone()
    step[..., 2:] += 0.6
    noisy = torch.stack([step[0], flat[0]])
    # One of three column differences is 0.6; rows are equal.
    torch.testing.assert_close(total_variation(noisy), torch.tensor([0.2, 0.0]))


# --- the choice of a weight -------------------------------------------------------------------


def choose(errors):
    """Runs the choice with an attack whose error under each weight is known."""
    images = torch.full((3, 3, 4, 4), 0.5)
    shares = (torch.arange(3.0).view(3, 1), torch.arange(3.0).view(3, 1, 1))

    def attack(received, weights):
        # Weight by weight, each with all images in order.
        assert received[0].flatten().tolist() == [0.0, 1.0, 2.0] * len(errors)
        assert received[1].shape[1:] == (1, 1)
        wanted = [w for w in errors for _ in range(3)]
        torch.testing.assert_close(weights, torch.tensor(wanted))
        off = torch.tensor([errors[w] for w in errors for _ in range(3)])
        return images.repeat(len(errors), 1, 1, 1) + off.view(-1, 1, 1, 1)

    return best_weight(images, shares, list(errors), attack)


def test_the_weight_with_the_least_error_is_chosen():
    facts = choose({0.1: 0.3, 1.0: -0.1, 10.0: 0.2})
    assert facts["weight"] == 1.0
    assert list(facts["validation_mse"]) == ["0.1", "1", "10"]
    assert facts["validation_mse"]["0.1"] == pytest.approx(0.09, rel=1e-4)


@pytest.mark.parametrize("limit", [1, 4, 7, 1000])
def test_candidates_are_tried_in_groups(monkeypatch, limit):
    monkeypatch.setattr(budget, "VALUES", limit * 3 * 4 * 4)
    images = torch.rand(3, 3, 4, 4)
    sizes = []

    def attack(shares, weights):
        sizes.append(len(weights))
        assert len(shares[0]) == len(weights)
        return shares[0] + (weights - 0.2).view(-1, 1, 1, 1)

    facts = best_weight(images, (images,), (0.1, 0.2, 0.4), attack)
    assert facts["weight"] == 0.2
    assert facts["validation_mse"]["0.4"] == pytest.approx(0.04, rel=1e-4)
    assert max(sizes) == min(limit, 9)
    assert sum(sizes) == 9


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_diverged_is_never_chosen(bad):
    facts = choose({0.1: bad, 1.0: 0.2, 10.0: 0.4})
    assert facts["weight"] == 1.0
    assert facts["validation_mse"]["0.1"] is None


def test_if_all_diverged_there_is_still_a_weight():
    assert choose({0.1: float("nan"), 1.0: float("nan")})["weight"] in (0.1, 1.0)


def test_the_weight_is_the_one_best_for_this_target(workshop, make_target, pictures):
    """Flat images from few values need the prior more than images from all values."""

    def few(images):
        return (F.avg_pool2d(images, 8).flatten(1),)

    chosen = {}
    for name, client in (("all", rotated), ("few", few)):
        target = make_target(client, identity=name)
        attack = made(workshop, target, pictures, steps=60, weights=(1e-4, 1.0))
        facts = attack.facts()
        errors = facts["validation_mse"]
        assert f"{facts['weight']:g}" == min(errors, key=errors.get)
        chosen[name] = facts["weight"]
    assert chosen["few"] == 1.0


def test_groups_that_end_at_different_steps_have_one_course():
    def still(found, moment):
        return 1 + 0 * found[0].flatten(1).sum(1)

    runs = [
        descend(
            [torch.ones(2, 3)], still, Schedule(400, 0.1, cooling=0.25, tolerance=tolerance), ""
        )
        for tolerance in (0.5, 0.0)
    ]
    assert runs[0].steps.max() < runs[1].steps.max() == 400
    assert runs[0].at == runs[1].at
    assert mean_course(runs, slice(0, 4)) == [[at, 1.0] for at in runs[0].at]
