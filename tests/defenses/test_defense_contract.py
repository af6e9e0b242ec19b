"""What every built-in defense must do, on maps and on tokens."""

import functools

import pytest
import torch
from small_splits import SPECS, VIT
from torch import nn

from mibench.artifacts import Checkpoint
from mibench.backbones.base import BackboneSpec
from mibench.defenses.base import Defense
from mibench.protocol import Recipe
from mibench.registry import defenses
from mibench.task import Attributes, Classification
from mibench.training import Step

VARIANTS = {
    "bottleneck": [
        {"of": "privdfs"},
        {"of": "noise"},
        {"of": "siftfunnel"},
        {"of": "shredder"},
        {"of": "privdfs", "params": {"masks": "information", "leakage": 0.0}},
    ],
    "deeper": [{"of": "noise"}],
    "disco": [{}, {"ratio": 0.8, "adversarial": 0.3}],
    "nopeek": [{}, {"dcor": "unbiased"}],
    "dropout": [{}, {"rate": 0.3, "training": "post_hoc"}],
    "noise": [
        {},
        {"law": "laplace"},
        {"training": "post_hoc"},
        {"place": "input"},
        {"clip": True},
    ],
    "privdfs": [
        {},
        {"masks": "random"},
        {"masks": "information", "leakage": 0.0},
        {"period": 1, "servers": 3, "density": 0.25},
        {"unit": "token"},
    ],
    "privdfs-at": [{}, {"unit": "token"}],
    # Enough slots that two keys hardly ever agree in all of them.
    "privdfs-kd": [
        {"servers": 2, "density": 0.25, "choices": 2},
        {"servers": 2, "density": 0.25, "choices": 2, "key": "known"},
    ],
    "shredder": [{}, {"draw": "fitted"}],
    "cem": [{}, {"strength": 0.0}],
    "vib": [{}, {"transmit": "mean", "channels": None}],
}
PLAIN = [("vib", "transmit", "mean"), ("privdfs-kd", "key", "known")]
"""Parameters that make a random defense deterministic."""
UNTOUCHED = {"random": {"logits"}, "information": {"logits"}}
"""Parameters that nothing is said to learn, by the policy of the masks."""
LARGER_PARAMS = {
    # Of so few channels, a sixteenth of all units is none for some servers.
    "privdfs-kd": {"servers": 2, "choices": 2},
}
TASK, ATTRIBUTES = Classification(tuple("abcde")), Attributes(tuple("abcde"))
BUILTIN = [entry.name for entry in defenses.entries() if entry.origin == "mibench"]
CASES = [
    pytest.param(name, params, id="-".join([name, *map(str, params.values())]))
    for name in BUILTIN
    for params in VARIANTS.get(name, [{}])
]
every = pytest.mark.parametrize(("name", "params"), CASES)


@pytest.fixture(scope="module", params=list(SPECS))
def make_defense(request, make_defense):
    return functools.partial(make_defense, features=request.param)


def randomised(name, params):
    if name == "bottleneck":
        return randomised(params["of"], {})
    plain = any(name == n and params.get(key) == value for n, key, value in PLAIN)
    return defenses.entry(name).facts["randomness"] != "none" and not plain


def trained_as_deployed(name, params):
    """Whether the term of the task is the plain loss of what is sent in use."""
    elsewhere = {"post_hoc", "known", "fitted"} & set(map(str, params.values()))
    return not elsewhere and name != "siftfunnel"


def untouched(params):
    masks = (params | params.get("params", {})).get("masks")
    return UNTOUCHED.get(masks, set())


def client_weights(defense):
    return [p for module in defense.client_modules() for p in module.parameters()]


def trained(make_defense, pictures, name, params, folder, steps=10, **changes):
    defense = make_defense(name, params)
    how = Recipe(
        **{"steps": steps, "batch": 16, "lr": 0.05, "crop": 2, "precision": "fp32"} | changes
    )
    facts = defense.fit(pictures(64), how, 0, Checkpoint(folder))
    return defense, facts


def step_at(index, total=100):
    return Step(index, total, torch.Generator().manual_seed(index))


def test_variants_name_built_ins_only():
    assert set(VARIANTS) <= set(BUILTIN)
    assert "none" in BUILTIN


@every
def test_what_is_sent_and_what_is_answered(make_defense, pictures, name, params):
    defense, images = make_defense(name, params).eval(), pictures(3).images()
    shares = defense.protect(images)
    assert isinstance(shares, tuple)
    assert len(shares) == defense.servers
    predicted = defense.predict(images)
    assert [len(s) for s in predicted] == [len(s) for s in shares]
    for share in shares:
        assert len(share) == 3
        assert share.isfinite().all()
    assert defense(images).shape == (3, 5)


@every
def test_randomness_is_as_declared(make_defense, pictures, name, params):
    defense, images = make_defense(name, params).eval(), pictures(3).images()
    for one, other in zip(defense.protect(images), defense.protect(images), strict=True):
        same = [torch.equal(a, b) for a, b in zip(one, other, strict=True)]
        assert not any(same) if randomised(name, params) else all(same)
    for one, other in zip(defense.predict(images), defense.predict(images), strict=True):
        assert torch.equal(one, other)
    if not randomised(name, params) and type(defense).log_likelihood is Defense.log_likelihood:
        pairs = zip(defense.predict(images), defense.protect(images), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@every
def test_noise_differs_from_image_to_image(make_defense, pictures, name, params):
    if not randomised(name, params):
        pytest.skip("sends no noise")
    defense, images = make_defense(name, params).eval(), pictures(1).images()
    twins = images.expand(2, -1, -1, -1)
    for share in defense.protect(twins):
        assert not torch.equal(share[0], share[1])


@every
def test_a_reply_depends_on_its_own_share_only(make_defense, pictures, name, params):
    defense = make_defense(name, params).eval()
    mine = defense.protect(pictures(2, seed=1).images())
    replies = [defense.serve(k, share) for k, share in enumerate(mine)]
    for kept in range(defense.servers):
        # A server that peeked at the client's last message would now see another one.
        others = defense.protect(pictures(2, seed=2).images())
        mixed = [mine[k] if k == kept else share for k, share in enumerate(others)]
        answers = [defense.serve(k, share) for k, share in enumerate(mixed)]
        for k in range(defense.servers):
            assert torch.equal(answers[k], replies[k]) is (k == kept)


@every
def test_images_of_a_batch_do_not_mix(make_defense, pictures, name, params):
    defense, images = make_defense(name, params).eval(), pictures(4).images()
    together = defense.predict(images)
    alone = [defense.predict(image[None]) for image in images]
    for k, share in enumerate(together):
        joined = torch.cat([part[k] for part in alone])
        torch.testing.assert_close(share, joined, rtol=1e-4, atol=1e-5)
    for k, share in enumerate(defense.protect(images)):
        single = torch.cat([defense.serve(k, one[None]) for one in share])
        torch.testing.assert_close(defense.serve(k, share), single, rtol=1e-4, atol=1e-5)


@every
def test_shares_depend_on_the_image(make_defense, pictures, name, params):
    defense = make_defense(name, params).eval()
    for share in defense.predict(pictures(2).images()):
        assert not torch.allclose(share[0], share[1], atol=1e-3)


@every
def test_forward_is_the_only_path(make_defense, pictures, name, params):
    defense, images = make_defense(name, params).eval(), pictures(3).images()
    torch.manual_seed(7)
    shares = defense.protect(images)
    replies = tuple(defense.serve(k, share) for k, share in enumerate(shares))
    torch.manual_seed(7)
    assert torch.equal(defense(images), defense.fuse(replies))


@every
def test_the_message_is_likeliest_where_it_is_predicted(make_defense, pictures, name, params):
    defense = make_defense(name, params).eval()
    images, others = pictures(3).images(), pictures(3, seed=1).images()
    sent = defense.protect(images)
    top = defense.log_likelihood(sent, defense.predict(images))
    assert top.shape == (3,)
    assert (top > defense.log_likelihood(sent, defense.predict(others))).all()


@every
def test_the_likelihood_has_a_gradient_in_the_pixels(make_defense, pictures, name, params):
    defense = make_defense(name, params).eval()
    shares = defense.protect(pictures(2, seed=1).images())
    images = pictures(2, seed=2).images().requires_grad_()
    value = defense.log_likelihood(shares, defense.predict(images))
    (gradient,) = torch.autograd.grad(value[0], images)
    assert gradient[0].abs().sum() > 0
    assert gradient[1].abs().sum() == 0


@every
def test_everything_that_learns_moves(make_defense, pictures, name, params, tmp_path):
    before = {k: v.detach().clone() for k, v in make_defense(name, params).named_parameters()}
    # Without weight decay, so that only a gradient can move a weight.
    defense, facts = trained(make_defense, pictures, name, params, tmp_path, weight_decay=0.0)
    after = dict(defense.named_parameters())
    assert after.keys() == before.keys()
    still = {k.rpartition("other.")[2] for k, v in after.items() if torch.equal(v, before[k])}
    assert still == untouched(params)
    assert not defense.training
    assert facts["steps"] == 10


@every
@pytest.mark.parametrize("index", [0, 99])
def test_every_term_of_the_loss_reaches_the_client(make_defense, pictures, name, params, index):
    defense, batch = make_defense(name, params), pictures(8)
    terms = defense.loss(batch.images(), batch.labels, step_at(index))
    assert terms
    weights = client_weights(defense)
    for term, value in terms.items():
        assert value.ndim == 0
        gradients = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
        gradients = [g for g in gradients if g is not None]
        assert all(g.isfinite().all() for g in gradients), term
        assert sum(g.abs().sum() for g in gradients) > 0, term


@every
@pytest.mark.parametrize("index", [0, 99])
def test_what_is_trained_is_what_is_deployed(make_defense, pictures, name, params, index):
    if not trained_as_deployed(name, params):
        pytest.skip("is trained with another loss or law on purpose")
    defense, batch = make_defense(name, params), pictures(8)
    images = batch.images()
    torch.manual_seed(3)
    task = defense.loss(images, batch.labels, step_at(index))["task"]
    torch.manual_seed(3)
    expected = nn.functional.cross_entropy(defense(images), batch.labels)
    torch.testing.assert_close(task, expected, rtol=1e-4, atol=1e-5)


@every
def test_weights_carry_the_whole_defense(make_defense, pictures, name, params, tmp_path):
    defense, _ = trained(make_defense, pictures, name, params, tmp_path, steps=6)
    copy = make_defense(name, params, seed=9).eval()
    images = pictures(4, seed=5).images()
    assert not torch.equal(copy.predict(images)[0], defense.predict(images)[0])
    copy.load_state_dict(defense.state_dict())
    # Channels-last against contiguous weights may differ in the last bits.
    for one, other in zip(defense.predict(images), copy.predict(images), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    sent = defense.protect(images)
    torch.testing.assert_close(copy.answer(sent), defense.answer(sent), rtol=1e-4, atol=1e-5)


@every
def test_a_defense_from_the_cache_sends_the_same_bits(
    make_defense, pictures, name, params, tmp_path
):
    defense, _ = trained(make_defense, pictures, name, params, tmp_path, steps=3)
    copy = make_defense(name, params, seed=9).eval()
    copy.load_state_dict(defense.state_dict())
    images = pictures(4, seed=5)
    fresh, reused = (d.transmit(images, batch=4, seed=2) for d in (defense, copy))
    for one, other in zip(fresh, reused, strict=True):
        assert torch.equal(one, other)


@every
def test_sending_a_set_is_sending_its_images_and_changes_nothing(
    make_defense, pictures, name, params
):
    defense, images = make_defense(name, params).eval(), pictures(5)
    before = {k: v.clone() for k, v in defense.state_dict().items()}
    state = torch.get_rng_state()
    sent = defense.transmit(images, batch=2, seed=3)
    again = defense.transmit(images, batch=2, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(sent) == defense.servers
    for k, share in enumerate(sent):
        assert torch.equal(share, again[k])
        assert not share.requires_grad
        assert share.shape == defense.protect(images.images())[k].shape
        if not randomised(name, params):
            expected = defense.protect(images.images())[k]
            torch.testing.assert_close(share, expected, rtol=1e-4, atol=1e-5)
    if randomised(name, params):
        other = defense.transmit(images, batch=2, seed=4)
        assert not torch.equal(other[0], sent[0])
    for key, value in defense.state_dict().items():
        assert torch.equal(value, before[key]), key


@every
def test_what_is_sent_depends_on_the_listed_client_modules_alone(
    make_defense, pictures, name, params
):
    defense = make_defense(name, params)
    own = {id(p) for p in defense.parameters()}
    listed = {id(p) for p in client_weights(defense)}
    assert listed
    assert listed <= own
    # What is sent depends on no weight that the client does not hold.
    with_grad = defense.train().protect(pictures(4).images())
    total = sum(share.square().sum() for share in with_grad)
    gradients = torch.autograd.grad(total, list(defense.parameters()), allow_unused=True)
    used = {id(p) for p, g in zip(defense.parameters(), gradients, strict=True) if g is not None}
    assert used <= listed


@every
def test_attributes_are_a_task_too(make_defense, pictures, name, params):
    defense = make_defense(name, params, task=ATTRIBUTES)
    images = pictures(8).images()
    labels = torch.arange(40).view(8, 5).remainder(2).to(torch.uint8)
    terms = defense.loss(images, labels, step_at(0))
    assert all(value.isfinite() for value in terms.values())
    if trained_as_deployed(name, params):
        torch.manual_seed(3)
        task = defense.loss(images, labels, step_at(0))["task"]
        torch.manual_seed(3)
        expected = nn.functional.binary_cross_entropy_with_logits(defense(images), labels.float())
        torch.testing.assert_close(task, expected, rtol=1e-4, atol=1e-5)


LARGER = {
    "map": BackboneSpec("small-resnet", {"stem": 4, "width": 4}, "stem"),
    "class-token": BackboneSpec("small-vit", {**VIT, "patch": 16}, "block1"),
}


@pytest.mark.parametrize("name", BUILTIN)
@pytest.mark.parametrize("features", list(LARGER))
@pytest.mark.parametrize("size", [64, 224])
def test_larger_images_are_no_different(name, features, size):
    split = LARGER[features].build((3, size, size), TASK, 0)
    method = defenses.load(name)
    defense = method(split, method.Params(**LARGER_PARAMS.get(name, {})))
    terms = defense.loss(torch.rand(3, 3, size, size), torch.tensor([0, 1, 2]), step_at(0))
    assert all(value.isfinite() for value in terms.values())
    assert defense.eval()(torch.rand(2, 3, size, size)).shape == (2, 5)
