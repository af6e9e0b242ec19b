"""The straight way through, end to end on a few small images."""

from dataclasses import replace

import pytest
import torch

from mibench import progress
from mibench.artifacts import ArtifactStore
from mibench.assault import chosen_adversary
from mibench.data.roles import load_roles
from mibench.deployment import fit
from mibench.errors import InvalidParamsError, PluginError, ThreatModelError
from mibench.evaluate import evaluate, open_record
from mibench.job import Job
from mibench.params import build
from mibench.protocol import Protocol
from mibench.record import read_record
from mibench.registry import attacks

pytestmark = pytest.mark.usefixtures("narrow_decoder")

DECODER = {"steps": 80, "batch": 16, "lr": 5e-3}


def protocol(**changes):
    values = {
        "id": "tiny-v1",
        "track": "test",
        "title": "as small as it gets",
        "data": {
            "dataset": "procedural",
            "image_size": 32,
            "train": {"split": "stream", "start": 0, "count": 64},
            "auxiliary": {"split": "stream", "start": 1000, "count": 128},
            "validation": {"split": "stream", "start": 2000, "count": 16},
            "private": {"split": "stream", "start": 3000, "count": 24},
            "attacked": 12,
        },
        "backbone": {
            "name": "small-resnet",
            "params": {"stem": 8, "width": 8},
            "split_point": "stem",
        },
        "recipe": {"steps": 5, "batch": 16, "precision": "fp32", "crop": 0},
        "attacks": {
            "decoder": DECODER,
            "gradient": {"steps": 4, "tuning_images": 2, "restarts": 1, "weights": [0.1, 1.0]},
        },
        "metrics": {"mse": 1, "psnr": 1},
        "batch": 8,
        "threads": 1,
    }
    return build(Protocol, values | changes, "tiny")


def job(defense="none", attack="decoder", defense_params=None, attack_params=None, **changes):
    seed = changes.pop("seed", 0)
    return Job(
        protocol(**changes), defense, attack, defense_params or {}, attack_params or {}, seed
    )


class Notebook:
    """Writes down what a display is asked to show."""

    def __init__(self):
        self.titles, self.notes = [], []

    def start(self, title, total):
        self.titles.append(title)
        return self

    def finish(self, task):
        pass

    def note(self, text):
        self.notes.append(text)

    def advance(self, steps=1, **figures):
        pass


class Full(ArtifactStore):
    """A cache in which nothing may be missing."""

    def fetch(self, kind, spec, make):
        def never(_):
            raise AssertionError(f"{kind} is made again")

        return super().fetch(kind, spec, never)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One cache for the tests of this file, so that the reference is trained once."""
    return ArtifactStore(tmp_path_factory.mktemp("cache"))


def run(what, store):
    return evaluate(what, store, None, "cpu")


def plugin(folder, name, body, base="attack"):
    head = {
        "attack": "from mibench.attacks.base import Attack\nfrom mibench.threat import Knowledge\n",
        "defense": "from mibench.defenses.base import Defense\n",
    }[base]
    (folder / f"{name}.py").write_text(f"import torch\n{head}\n\n{body}")
    return f"./{name}.py"


# --- the reference ---------------------------------------------------------------------------


def test_the_undefended_split_leaks_exactly_all(shared, tmp_path):
    result = run(job(), shared)
    record = result.record
    assert record.status == "success"
    assert [score.metric for score in record.leakage] == ["leakage(mse)", "leakage(psnr)"]
    for score in record.leakage:
        assert (score.value, score.ci_low, score.ci_high) == (1.0, 1.0, 1.0), score.reason
    assert record.scores == record.undefended
    assert record.error is None
    assert record.protocol.content == protocol().content_id
    assert not record.protocol.ranked
    assert record.adversary.corrupted == [0]
    assert record.adversary.screening == {}
    assert record.seed == 0
    assert len(record.manifest) == 64
    assert record.cost.client_flops == record.cost.undefended_client_flops > 0
    assert record.cost.values_per_server == [8 * 16 * 16]
    assert record.cost.bytes_up == 4 * 8 * 16 * 16
    assert record.cost.image_values == 3 * 32 * 32
    (tmp_path / "record.json").write_bytes(record.to_json())
    assert read_record(tmp_path) == record


def test_images_and_per_image_values_carry_the_scores(shared):
    result = run(job(), shared)
    originals = result.originals.images()
    assert len(result.originals) == 12
    assert result.reconstructions.shape == originals.shape
    mse = (result.reconstructions - originals).square().flatten(1).mean(1)
    torch.testing.assert_close(result.per_image["mse"].float(), mse, rtol=1e-4, atol=1e-7)
    value = {score.metric: score.value for score in result.record.scores}
    assert value["mse"] == pytest.approx(mse.mean().item(), rel=1e-4)
    permuted = (result.controls["permuted"] - originals).square().mean().item()
    assert result.record.permuted[0].value == pytest.approx(permuted, rel=1e-4)
    # The attack on another image's shares rebuilds that other image.
    torch.testing.assert_close(
        result.controls["permuted"], result.reconstructions.roll(-1, 0), rtol=1e-3, atol=1e-4
    )
    floor = result.record.prior_only[0]
    assert floor.source == "mean-image"  # no constant has a smaller squared error
    guess = result.controls[floor.source]
    assert floor.value == pytest.approx((guess - originals).square().mean().item(), rel=1e-4)
    for columns in result.per_image.values():
        assert len(columns) == 12
    accuracy = {score.metric: score for score in result.record.utility}
    assert accuracy["accuracy"].n == 24
    assert accuracy["accuracy"].value == accuracy["undefended accuracy"].value


def test_another_run_in_the_cache_gives_the_same_and_trains_nothing(shared):
    what, notebook = job("noise", defense_params={"snr_db": 0.0}), Notebook()
    first = run(what, shared)
    with progress.shown_by(notebook):
        second = run(what, Full(shared.root))
    assert not [title for title in notebook.titles if "Training" in title]
    assert any("reused" in note for note in notebook.notes)
    assert torch.equal(first.reconstructions, second.reconstructions)
    for part in ("scores", "undefended", "prior_only", "permuted", "leakage", "utility"):
        assert getattr(first.record, part) == getattr(second.record, part), part
    for part in ("manifest", "defense_facts", "attack_facts"):
        assert getattr(first.record, part) == getattr(second.record, part), part
    # A latency is measured anew in every run.
    costs = [one.record.cost.model_copy(update={"latency_ratio": None}) for one in (first, second)]
    assert costs[0] == costs[1]
    for name, values in first.per_image.items():
        assert torch.equal(values, second.per_image[name]), name


def test_another_cache_gives_the_same_too(shared, tmp_path):
    first, second = run(job(), shared), run(job(), ArtifactStore(tmp_path / "other"))
    assert torch.equal(first.reconstructions, second.reconstructions)
    assert first.record.scores == second.record.scores
    assert first.record.utility == second.record.utility


def test_another_seed_trains_another_model(shared):
    zero, one = run(job(), shared), run(job(seed=1), shared)
    assert not torch.equal(zero.reconstructions, one.reconstructions)
    assert one.record.deviations == ["seed 1 is none of the protocol's [0]"]
    assert one.record.manifest == zero.record.manifest


def test_the_number_of_images_at_once_does_not_change_what_a_decoder_makes(tmp_path):
    found = [
        run(job(attack="decoder", batch=size), ArtifactStore(tmp_path / str(size))).reconstructions
        for size in (4, 12)
    ]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


# --- defenses --------------------------------------------------------------------------------


def test_strong_noise_leaks_less(shared):
    record = run(job("noise", defense_params={"snr_db": -20.0}), shared).record
    leakage = {score.metric: score.value for score in record.leakage}
    assert leakage["leakage(mse)"] < 0.5
    assert record.defense.params["snr_db"] == -20.0
    assert record.defense.params["law"] == "gaussian"


def test_the_worst_share_is_attacked(shared):
    params = {"servers": 3, "density": 0.1, "width": 4, "leakage": 0.0}
    record = run(job("privdfs", defense_params=params), shared).record
    screening = record.adversary.screening
    assert list(screening) == ["0", "1", "2"]
    assert record.adversary.corrupted == [int(min(screening, key=screening.get))]
    assert len(record.cost.values_per_server) == 3


def test_a_coalition_reads_as_many_servers_as_the_protocol_says(shared):
    params = {"servers": 3, "density": 0.1, "width": 4, "leakage": 0.0}
    two = {"knowledge": "white_box", "coalition": 2}
    record = run(job("privdfs", defense_params=params, adversary=two), shared).record
    screening = record.adversary.screening
    assert list(screening) == ["0+1", "0+2", "1+2"]
    assert "+".join(map(str, record.adversary.corrupted)) == min(screening, key=screening.get)


HALF = """
class Half(Defense):
    \"\"\"Sends every second channel.\"\"\"

    def protect(self, images):
        features = self.client(images).clone()
        features[:, ::2] = 0
        return (features,)
"""


def test_a_defense_from_a_file_works(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = plugin(tmp_path, "halves", HALF, "defense")
    record = run(job(f"{where}:Half"), shared).record
    assert record.status == "success"
    assert record.defense.name == "half"
    assert record.undefended == run(job(), shared).record.scores
    assert record.scores != record.undefended


def test_a_defense_that_breaks_is_blamed_by_name(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    body = HALF.replace("return (features,)", "return 1 / 0")
    where = plugin(tmp_path, "broken", body, "defense")
    with pytest.raises(PluginError, match=r"Half.fit\(\) raised ZeroDivisionError") as caught:
        run(job(f"{where}:Half"), shared)
    assert "broken.py" in str(caught.value)


# --- attacks ---------------------------------------------------------------------------------

SPY = """
COLLECTED = []


class Spy(Attack):
    \"\"\"Keeps all it is handed.\"\"\"

    def prepare(self, target, auxiliary, validation):
        COLLECTED.append(("images", auxiliary))
        COLLECTED.append(("images", validation))
        COLLECTED.append(("object", target))
        COLLECTED.append(("object", self.workshop))

    def reconstruct(self, shares):
        COLLECTED.append(("shares", shares))
        return torch.full((len(shares[0]), *self.workshop.image_shape), 0.5)
"""


def tensors_in(value, depth=6, seen=None):
    """All tensors that attributes, containers and closures of an object lead to."""
    seen = set() if seen is None else seen
    if id(value) in seen or depth == 0:
        return []
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, list | tuple | set):
        inner = list(value)
    else:
        inner = list(getattr(value, "__dict__", {}).values())
    return [tensor for item in inner for tensor in tensors_in(item, depth - 1, seen)]


def test_no_attack_is_handed_a_private_image(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = plugin(tmp_path, "spy", SPY)
    what = job(attack=f"{where}:Spy")
    run(what, shared)
    cls = attacks.load(f"{where}:Spy")
    collected = cls.prepare.__globals__["COLLECTED"]

    roles = load_roles(what.protocol.data, None, shared.root)
    private = set(roles.private.hashes())
    handed = [value for kind, value in collected if kind == "images"]
    assert [len(images) for images in handed] == [128, 16]
    assert handed[0].hashes() == roles.auxiliary.hashes()
    for images in handed:
        assert not private & set(images.hashes())

    shares = [value for kind, value in collected if kind == "shares"]
    assert sum(len(share[0]) for share in shares) == 2 * 12  # true and permuted
    for (share,) in shares:
        assert share.shape[1:] == (8, 16, 16)

    truth = roles.private.raw().float().flatten(1)
    for _, value in [item for item in collected if item[0] == "object"]:
        for tensor in tensors_in(value):
            assert not {24, 12} & set(tensor.shape[:1])
            if tensor.numel() % truth.shape[1] == 0 and tensor.numel():
                rows = tensor.float().reshape(-1, truth.shape[1])
                for scale in (1, 255):
                    assert (torch.cdist(scale * rows, truth) > 1).all()


def attack_file(tmp_path, monkeypatch, line, extra=""):
    monkeypatch.chdir(tmp_path)
    body = f"""
class Mine(Attack):
    \"\"\"Does what the line says.\"\"\"
{extra}
    def reconstruct(self, shares):
        half = torch.full((len(shares[0]), *self.workshop.image_shape), 0.5)
        return {line}
"""
    return f"{plugin(tmp_path, 'mine', body)}:Mine"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("half + 0.6", r"not in \[0, 1\]"),
        ("half - 0.6", r"not in \[0, 1\]"),
        ("half * float('nan')", r"not in \[0, 1\]"),
        ("half / 0", r"not in \[0, 1\]"),
        ("half[1:]", "shape"),
        ("half[:, :1]", "shape"),
        ("half.mean()", "shape"),
        ("1 / 0", "ZeroDivisionError"),
        ("None", "NoneType, not a tensor"),
        ("half.numpy()", "ndarray, not a tensor"),
    ],
)
def test_what_is_no_image_is_refused(shared, tmp_path, monkeypatch, line, words):
    where = attack_file(tmp_path, monkeypatch, line)
    with pytest.raises(PluginError, match=words) as caught:
        run(job(attack=where), shared)
    assert "\n" not in str(caught.value)


def test_an_attack_that_breaks_while_preparing_is_blamed(shared, tmp_path, monkeypatch):
    extra = "\n    def prepare(self, target, auxiliary, validation):\n        raise KeyError('x')\n"
    where = attack_file(tmp_path, monkeypatch, "half", extra)
    with pytest.raises(PluginError, match=r"Mine.prepare\(\) raised KeyError"):
        run(job(attack=where), shared)


def test_an_attack_may_return_bytes_of_another_kind(shared, tmp_path, monkeypatch):
    where = attack_file(tmp_path, monkeypatch, "half.double()")
    assert run(job(attack=where), shared).reconstructions.dtype == torch.float32


def test_an_attack_that_reaches_too_far_is_stopped(shared, tmp_path, monkeypatch):
    extra = "\n    def prepare(self, target, auxiliary, validation):\n        target.client(None)\n"
    where = attack_file(tmp_path, monkeypatch, "half", extra)
    with pytest.raises(ThreatModelError):
        run(job(attack=where, adversary={"knowledge": "black_box"}), shared)


def test_an_attack_that_needs_more_than_is_granted_is_refused_at_once():
    with pytest.raises(InvalidParamsError, match="needs white_box") as caught:
        open_record(job(attack="gradient", adversary={"knowledge": "black_box"}), "cpu")
    assert "tiny-v1" in str(caught.value)


def test_an_attack_that_learns_from_labels_is_refused_where_there_are_none():
    one = job(attack="query-free")
    data = one.protocol.data.model_dump(mode="json")
    for role in ("auxiliary", "validation"):
        data[role]["dataset"] = "cifar100"
    changes = {"data": data, "adversary": {"auxiliary": "other"}}
    with pytest.raises(InvalidParamsError, match="query-free learns from labels") as caught:
        open_record(replace(one, protocol=one.protocol.changed(changes)), "cpu")
    assert "auxiliary images of the protocol's own dataset" in str(caught.value)


# --- parameters ------------------------------------------------------------------------------


def test_the_users_parameters_lie_on_the_protocols():
    opened = open_record(job(attack_params={"steps": 3}), "cpu")
    assert opened.status == "started"
    assert opened.attack.params["steps"] == 3
    assert opened.attack.params["batch"] == DECODER["batch"]
    assert opened.deviations == ["attack.steps set by hand"]
    assert not opened.protocol.ranked
    nested = job(attack="diffusion", attack_params={"prior": {"steps": 3}},
                 attacks={"diffusion": {"prior": {"steps": 9, "batch": 7}}})  # fmt: skip
    assert nested.merged_attack_params() == {"prior": {"steps": 3, "batch": 7}}


def test_a_wrong_parameter_is_named_before_anything_runs():
    with pytest.raises(InvalidParamsError, match=r"attack decoder\.stepz"):
        open_record(job(attack_params={"stepz": 3}), "cpu")
    with pytest.raises(InvalidParamsError, match=r"defense noise\.snr_db"):
        open_record(job("noise", defense_params={"snr_db": "loud"}), "cpu")


def test_a_deployed_model_is_frozen_and_named_by_what_made_it(shared):
    roles = load_roles(protocol().data, None, shared.root)
    one = fit(job(), roles, shared, "cpu")
    assert not one.defense.training
    assert not any(p.requires_grad for p in one.defense.parameters())
    assert one.identity == fit(job(), roles, shared, "cpu").identity
    other = fit(job("noise", defense_params={"snr_db": 3.0}), roles, shared, "cpu")
    assert other.identity != one.identity


@pytest.mark.parametrize("attack", ["decoder", "gradient"])
def test_an_attack_leaves_the_model_as_it_is(shared, attack, monkeypatch):
    states = []

    def watched(*args):
        deployed = original(*args)
        before = {k: v.clone() for k, v in deployed.defense.state_dict().items()}
        states.append((deployed.defense, before))
        return deployed

    original = fit
    monkeypatch.setattr("mibench.evaluate.fit", watched)
    run(job(attack=attack, seed=2), shared)
    for defense, before in states:
        assert not defense.training
        for name, value in defense.state_dict().items():
            assert torch.equal(value, before[name]), name


POST_HOC = """
class PostHoc(Defense):
    \"\"\"Noise on a finished model: the parameter changes the messages and no weight.\"\"\"

    class Params(Defense.Params):
        \"\"\"Strength.\"\"\"

        sigma: float = 0.0

    def predict(self, images):
        return (self.client(images),)

    def protect(self, images):
        (clean,) = self.predict(images)
        if self.training:
            return (clean,)
        return (clean + self.params.sigma * torch.randn_like(clean),)

    def log_likelihood(self, shares, predicted):
        return -(shares[0] - predicted[0]).flatten(1).square().sum(1) / (2 * self.params.sigma**2)
"""


def test_what_was_rebuilt_from_one_message_is_not_served_for_another(tmp_path, monkeypatch):
    # The weights are the same, so they alone must not name what is learned against them.
    monkeypatch.chdir(tmp_path)
    name = plugin(tmp_path, "post_hoc", POST_HOC, base="defense") + ":PostHoc"
    store = ArtifactStore(tmp_path / "cache")
    quiet, loud = (run(job(name, defense_params={"sigma": sigma}), store) for sigma in (1e-3, 1e3))
    assert not torch.equal(quiet.reconstructions, loud.reconstructions)
    psnr = [result.record.scores[1].value for result in (quiet, loud)]
    assert psnr[0] > psnr[1] + 1
    # Nor is the undefended reference touched by it.
    assert quiet.record.undefended == loud.record.undefended


def test_images_other_than_the_protocols_are_named(shared):
    meant = protocol().data.model_dump(mode="json")
    meant["private"]["identity"] = "0" * 16
    record = run(job(data=meant), shared).record
    assert record.deviations == ["the images of the role 'private' are not those of the protocol"]
    meant["private"]["identity"] = record.data.identities["private"]
    assert run(job(data=meant), shared).record.deviations == []


def test_a_record_says_alone_what_its_protocol_fixes(shared):
    record = run(job(), shared).record
    assert record.protocol.values == protocol().recorded()
    assert record.protocol.values["backbone"]["split_point"] == "stem"


TWO = """
class Two(Defense):
    \"\"\"One server gets the coarse image as it is, the other all of it under noise.\"\"\"

    servers = 2

    def __init__(self, split, params):
        super().__init__(split, params)
        self.scale = torch.nn.Parameter(torch.zeros(10))

    def predict(self, images):
        coarse = torch.nn.functional.avg_pool2d(images, 16)
        return coarse.flatten(1), images[:, :, ::2, ::2].flatten(1)

    def protect(self, images):
        clean, fine = self.predict(images)
        return clean, fine + 1.5 * torch.randn_like(fine)

    def serve(self, index, share):
        return self.scale.expand(len(share), 10)
"""


def test_screening_hears_every_transmission(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = plugin(tmp_path, "two", TWO, base="defense") + ":Two"
    store, chosen = ArtifactStore(tmp_path / "cache"), []
    for times in (1, 256):
        what = job(name, adversary={"coalition": 1, "transmissions": times})
        roles = load_roles(what.protocol.data, None, store.root)
        adversary, _ = chosen_adversary(what, fit(what, roles, store, "cpu"), roles, store, "cpu")
        chosen.append(adversary.corrupted)
    assert chosen == [(0,), (1,)]
