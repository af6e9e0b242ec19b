"""No attack sees a private image, and each uses all that its adversary may have."""

import gc
import types

import pytest
import torch
from small_splits import SPECS
from tiny_attacks import NAMES, assault_on, tiny_job, tiny_roles

from mibench.attacks.base import Attack
from mibench.data.sets import ImageSet
from mibench.defenses.base import Defense
from mibench.registry import attacks

GUARDED = ("raw", "images", "chunks", "hashes", "identity", "pixels", "labels", "_digests")
"""All that a set of images gives away of its content."""


class PoisonedError(BaseException):
    """Not caught by anything that handles errors on its way."""


class Gate:
    """Open while the users' own client reads their images."""

    is_open = False


class Poisoned(ImageSet):
    """Images of which nobody may read anything but their number and shape."""

    def __init__(self, pixels, labels, gate):
        super().__init__(pixels, labels)
        self.gate = gate

    def __len__(self):
        return len(object.__getattribute__(self, "labels"))

    def __getattribute__(self, name):
        gate = object.__getattribute__(self, "__dict__").get("gate")
        opened = gate is None or (gate.is_open and name not in ("labels", "hashes", "identity"))
        if name in GUARDED and not opened:
            raise PoisonedError(name)
        return object.__getattribute__(self, name)

    @property
    def image_shape(self):
        return tuple(object.__getattribute__(self, "pixels").shape[1:])

    def at(self, index):
        whole = (object.__getattribute__(self, name)[index] for name in ("pixels", "labels"))
        return Poisoned(*whole, self.gate)


@pytest.fixture
def private(pictures, monkeypatch):
    """Poisoned images that `Defense.transmit` alone can read."""
    plain, gate = pictures(6, seed=2), Gate()
    poisoned = Poisoned(plain.pixels, plain.labels, gate)
    transmit = Defense.transmit

    def opened(defense, images, batch, seed):
        gate.is_open = isinstance(images, Poisoned)
        try:
            return transmit(defense, images, batch, seed)
        finally:
            gate.is_open = False

    monkeypatch.setattr(Defense, "transmit", opened)
    return poisoned


def roles_with(pictures, private):
    # An attack has no business with the training images either.
    return tiny_roles(pictures(32), pictures(8, seed=1), private, train=private)


def reached(*roots):
    """All objects that references lead to from here, those through code and classes left out."""
    found, waiting = {}, list(roots)
    while waiting:
        one = waiting.pop()
        if id(one) in found or isinstance(one, type | types.ModuleType):
            continue
        found[id(one)] = one
        if isinstance(one, types.FunctionType):
            waiting += [one.__closure__, one.__defaults__, one.__kwdefaults__]
        else:
            waiting += gc.get_referents(one)
    return list(found.values())


def memory_of(objects):
    tensors = (one for one in objects if isinstance(one, torch.Tensor))
    return {one.untyped_storage().data_ptr() for one in tensors} - {0}


@pytest.mark.parametrize("name", NAMES)
def test_no_attack_touches_a_private_image_or_label(
    make_defense, pictures, private, tmp_path, name
):
    job, roles = tiny_job(name), roles_with(pictures, private)
    assault = assault_on(make_defense("noise", "map"), job, roles, tmp_path)
    rebuilt = assault.from_true_shares()
    assert rebuilt.shape == (6, 3, 16, 16)
    assert not torch.equal(rebuilt, assault.from_permuted_shares())
    assault.blind()
    # What the attack holds, its target included, leads to none of them.
    objects = reached(assault.attacker)
    assert not [one for one in objects if isinstance(one, Poisoned | Gate)]
    hidden = memory_of(vars(private)[name] for name in ("pixels", "labels"))
    assert len(hidden) == 2
    assert not memory_of(objects) & hidden


@pytest.mark.parametrize("what", GUARDED)
def test_the_poison_works(private, what):
    with pytest.raises(PoisonedError):
        getattr(private, what)
    with pytest.raises(PoisonedError):
        private.take(2).images()


def test_the_search_finds_what_an_attack_keeps(private):
    class Holder:
        """Keeps images in a closure."""

        def __init__(self, images):
            self.later = lambda: images.images()

    objects = reached(Holder(private))
    assert any(one is private for one in objects)
    assert memory_of([vars(private)["pixels"]]) <= memory_of(objects)


def test_an_attack_that_steals_is_caught(make_defense, pictures, private, tmp_path, monkeypatch):
    def steal(self, shares):
        return private.images()[: len(shares[0])]

    monkeypatch.setattr(attacks.load("decoder"), "reconstruct", steal)
    assault = assault_on(
        make_defense("none", "map"), tiny_job("decoder"), roles_with(pictures, private), tmp_path
    )
    with pytest.raises(PoisonedError):
        assault.from_true_shares()


# --- all that the adversary may have ----------------------------------------------------------


@pytest.fixture(scope="module")
def privdfs(make_defense):
    params = {"servers": 3, "density": 0.25, "period": 1, "width": 8}
    return {name: make_defense("privdfs", name, params) for name in ("map", "class-token")}


def stage(pictures, folder, defense, adversary, attack="decoder", **changes):
    roles = tiny_roles(pictures(192), pictures(48, seed=1), pictures(16, seed=2))
    job = tiny_job(attack, adversary, **changes)
    return assault_on(defense, job, roles, folder), roles.private.images()


@pytest.mark.parametrize("features", ["map", "class-token"])
def test_coalitions_of_every_size_run_and_know_no_less_when_they_grow(
    privdfs, pictures, tmp_path, features
):
    defense, errors = privdfs[features], []
    for size in (1, 2, 3, 9):  # more than there are is all of them
        assault, originals = stage(
            pictures, tmp_path, defense, {"coalition": size}, steps=150, lr=5e-3, batch=16
        )
        together = min(size, 3)
        assert len(assault.shares) == len(assault.adversary.corrupted) == together
        assert len(assault.adversary.screening) == {1: 3, 2: 3, 3: 0}[together]
        errors.append((assault.from_true_shares() - originals).square().mean().item())
    assert errors[0] > errors[1] > errors[2] == errors[3]
    mean = pictures(192).images().mean(0)
    assert errors[2] < 0.8 * (mean - originals).square().mean()


@pytest.mark.parametrize("name", NAMES)
def test_every_attack_reads_all_servers_and_all_transmissions(privdfs, pictures, tmp_path, name):
    assault, _ = stage(
        pictures, tmp_path, privdfs["map"], {"coalition": 3, "transmissions": 2}, name
    )
    assert len(assault.shares) == 6
    rebuilt = assault.from_true_shares()
    for at in range(6):
        other = list(assault.shares)
        other[at] = other[at].flip(0) + 1
        torch.manual_seed(0)
        one = assault.attacker.reconstruct(assault.shares)
        torch.manual_seed(0)
        two = assault.attacker.reconstruct(tuple(other))
        assert (one - two).abs().max() > 1e-4, at
    assert rebuilt.isfinite().all()


@pytest.mark.parametrize("attack", ["decoder", "gradient"])
def test_a_known_key_leaks_no_less_than_a_secret_one(make_defense, pictures, tmp_path, attack):
    errors = {}
    for key in ("known", "secret"):
        params = {"servers": 2, "density": 0.25, "choices": 2, "period": 2, "key": key}
        defense = make_defense("privdfs-kd", "map", params)
        assault, originals = stage(pictures, tmp_path / key, defense, {}, attack)
        assert assault.from_true_shares().shape == originals.shape
        errors[key] = min(assault.adversary.screening.values())
    assert errors["known"] < errors["secret"]


@pytest.mark.parametrize("features", SPECS)
def test_repeated_transmissions_tell_more_in_proportion(make_defense, pictures, tmp_path, features):
    defense = make_defense("noise", features, {"snr_db": -6.0})
    gaps = {}
    for times in (1, 4, 16):
        assault, originals = stage(
            pictures, tmp_path, defense, {"transmissions": times}, "gradient"
        )
        target = assault.attacker._target
        truth, other = (target.client(one) for one in (originals, originals.roll(1, 0)))
        told = target.log_likelihood(assault.shares, truth)
        gaps[times] = (told - target.log_likelihood(assault.shares, other)).mean().item()
    assert gaps[1] > 0
    assert gaps[4] == pytest.approx(4 * gaps[1], rel=0.2)
    assert gaps[16] == pytest.approx(16 * gaps[1], rel=0.2)


def test_all_attacks_are_attacks():
    assert {"decoder", "gradient", "diffusion", "query-free"} <= set(NAMES)
    assert all(issubclass(attacks.load(name), Attack) for name in NAMES)
