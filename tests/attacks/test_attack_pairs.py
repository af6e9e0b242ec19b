"""Every attack against every defense, on maps and on tokens; and what repetition gives away."""

import pytest
import torch
from small_splits import SPECS
from torch.nn import functional as F

from mibench.artifacts import ArtifactStore
from mibench.attacks.base import Workshop
from mibench.attacks.ridge import ridge_error
from mibench.registry import attacks, defenses
from mibench.threat import Adversary, Knowledge, Target

pytestmark = pytest.mark.usefixtures("narrow_decoder")

BUILTIN = {
    which: [entry.name for entry in registry.entries() if entry.origin == "mibench"]
    for which, registry in (("defense", defenses), ("attack", attacks))
}
QUICK_DECODER = {"steps": 40, "batch": 16, "lr": 5e-3}
QUICK = {
    "decoder": QUICK_DECODER,
    "gradient": {"steps": 40, "restarts": 2, "tuning_images": 2, "weights": (0.1, 10.0)},
    "diffusion": {
        "tuning_images": 3,
        "scales": (0.1, 10.0),
        "sampler": {"steps": 10, "strength": 0.3, "inner": 5},
        "prior": {"steps": 20, "batch": 8, "channels": (16, 16), "timesteps": 40},
        "decoder": QUICK_DECODER,
    },
}
QUICK["diffusion-mean"] = QUICK["diffusion"]
QUICK["gradient-warm"] = {
    "steps": 20,
    "tuning_images": 2,
    "weights": (0.1, 10.0),
    "decoder": QUICK_DECODER,
}
QUICK["deep-prior"] = {"steps": 10, "tuning_images": 2, "weights": (1.0,), "width": 8, "scales": 2}
QUICK["query-free"] = {"steps": 40, "batch": 16, "decoder": QUICK_DECODER}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """One for all: attacks on the same defense share their decoder, and all share the prior."""
    store = ArtifactStore(tmp_path_factory.mktemp("cache"))
    return Workshop((3, 16, 16), 0, torch.device("cpu"), store, 1)


def prepared(workshop, target, name, pictures):
    assert name in QUICK or name == "linear", "the defaults are for real images"
    method = attacks.load(name)
    attack = method(method.Params(**QUICK.get(name, {})), workshop)
    attack.prepare(target, pictures(64), pictures(8, seed=1))
    return attack


@pytest.mark.parametrize(
    ("features", "transmissions"), [*((features, 1) for features in SPECS), ("map", 2)]
)
@pytest.mark.parametrize("name", BUILTIN["attack"])
@pytest.mark.parametrize("defended", BUILTIN["defense"])
def test_every_attack_meets_every_defense(
    workshop, make_defense, pictures, defended, name, features, transmissions
):
    defense = make_defense(defended, features)
    servers = tuple(range(min(2, defense.servers)))
    adversary = Adversary(Knowledge.WHITE_BOX, servers, transmissions)
    target = Target(defense, adversary, f"{defended} on {features}")
    attack = prepared(workshop, target, name, pictures)
    secret = pictures(6, seed=2)
    shares = adversary.observes(lambda turn: defense.transmit(secret, 6, turn))
    assert len(shares) == len(servers) * transmissions
    torch.manual_seed(0)
    rebuilt = attack.reconstruct(shares)
    assert rebuilt.shape == (6, 3, 16, 16)
    assert rebuilt.isfinite().all()
    assert rebuilt.min() >= 0
    assert rebuilt.max() <= 1
    # It looks at the shares: those of other images give other images.
    torch.manual_seed(0)
    other = attack.reconstruct(tuple(share.roll(1, 0) for share in shares))
    assert (rebuilt - other).abs().flatten(1).max(1).values.min() > 1e-3


@pytest.fixture(scope="module")
def noisy_views(make_defense, pictures):
    """Shares of one set under strong noise, as seen in one and in four transmissions."""

    def make(features, transmissions):
        defense = make_defense("noise", features, {"snr_db": -6.0})
        adversary = Adversary(Knowledge.WHITE_BOX, (0,), transmissions)
        return Target(
            defense, adversary, f"noisy {features}"
        ), lambda images, seed: adversary.observes(
            lambda turn: defense.transmit(images, 256, 10 * seed + turn)
        )

    return make


@pytest.mark.parametrize("features", SPECS)
def test_repeated_transmissions_leak_more_to_the_ridge(noisy_views, pictures, features):
    learn, judge, errors = pictures(600), pictures(100, seed=1), {}
    for count in (1, 4):
        _, send = noisy_views(features, count)
        errors[count] = ridge_error(
            send(learn, 1), learn.images(), send(judge, 2), judge.images(), 0
        )
    assert errors[4] < 0.85 * errors[1]


@pytest.mark.parametrize("features", SPECS)
def test_repeated_transmissions_leak_more_to_the_decoder(workshop, noisy_views, pictures, features):
    secret, errors = pictures(64, seed=2), {}
    for count in (1, 4):
        target, send = noisy_views(features, count)
        attack = prepared(workshop, target, "decoder", pictures)
        errors[count] = F.mse_loss(attack.reconstruct(send(secret, 3)), secret.images()).item()
    assert errors[4] < errors[1]


@pytest.mark.parametrize("features", SPECS)
@torch.no_grad()
def test_logarithms_of_independent_transmissions_add_up(noisy_views, pictures, features):
    secret, guess = pictures(5, seed=2), pictures(5, seed=3).images()
    target, send = noisy_views(features, 4)
    single, _ = noisy_views(features, 1)
    shares, predicted = send(secret, 1), target.client(guess)
    assert len(shares) == len(predicted) == 4
    assert not torch.equal(shares[0], shares[1])
    terms = [single.log_likelihood((share,), single.client(guess)) for share in shares]
    torch.testing.assert_close(target.log_likelihood(shares, predicted), sum(terms))
