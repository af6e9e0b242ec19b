"""Priors that were trained elsewhere: of pixels and of latents, fit and unfit."""

import json
import time

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mibench.attacks.diffusion.attack import Diffusion, unconditional
from mibench.attacks.diffusion.denoiser import Prior
from mibench.attacks.diffusion.export import write_prior, write_sheet
from mibench.attacks.diffusion.latent import LatentPrior
from mibench.attacks.diffusion.pretrained import OWN, PROMPT, SAW, load
from mibench.attacks.diffusion.prior import PriorParams, get_prior
from mibench.attacks.diffusion.sampler import SamplerParams
from mibench.errors import InvalidParamsError, MibenchError, UnavailableError

SHAPE = (3, 16, 16)


def save_pretrained(folder, *, nested=False, unet=None, **schedule):
    torch.manual_seed(0)
    values = {
        "sample_size": 16, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 8),
        "layers_per_block": 1, "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2, "norm_num_groups": 4,
    }  # fmt: skip
    net = diffusers.UNet2DModel(**values | (unet or {}))
    net.save_pretrained(folder / "unet" if nested else folder)
    scheduler = diffusers.DDPMScheduler(30, **schedule)
    scheduler.save_pretrained(folder / "scheduler" if nested else folder)
    return net.eval()


@pytest.mark.parametrize("nested", [True, False])
def test_a_pretrained_prior_is_loaded_from_a_folder(workshop, pictures, tmp_path, nested):
    unet = save_pretrained(tmp_path / "prior", nested=nested, beta_schedule="linear")
    params = PriorParams(pretrained=str(tmp_path / "prior"))
    prior, facts = get_prior(params, workshop, pictures(4), pictures(4))
    assert facts["source"] == str(tmp_path / "prior")
    assert facts["saw"].startswith("unknown")
    assert not any(weight.requires_grad for weight in prior.parameters())
    assert prior.timesteps == 30
    images, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 20])
    with torch.no_grad():
        torch.testing.assert_close(prior(images, t), unet(images, t).sample)
    schedule = diffusers.DDPMScheduler(30, beta_schedule="linear")
    torch.testing.assert_close(prior.signal.float(), schedule.alphas_cumprod)


@pytest.mark.parametrize(
    ("unet", "schedule", "said"),
    [
        ({}, {"prediction_type": "v_prediction"}, "predicts 'v_prediction'"),
        ({"sample_size": 32}, {}, "32x32 pixels, but those of the protocol have 16x16"),
        ({"in_channels": 1, "out_channels": 1}, {}, "1 channels, not 3"),
        ({"out_channels": 6}, {}, "not the noise alone"),
        ({"num_class_embeds": 10}, {}, "a class for each image"),
    ],
    ids=str,
)
def test_a_prior_that_does_not_fit_is_refused(tmp_path, unet, schedule, said):
    save_pretrained(tmp_path / "prior", unet=unet, **schedule)
    with pytest.raises(InvalidParamsError, match=r"attack\.prior\.pretrained") as caught:
        load(str(tmp_path / "prior"), SHAPE)
    assert said in str(caught.value)
    assert str(tmp_path / "prior") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_network_of_another_kind_is_refused(tmp_path):
    net = diffusers.VQModel(block_out_channels=(8,), norm_num_groups=4)
    net.save_pretrained(tmp_path)
    with pytest.raises(InvalidParamsError, match="is a VQModel"):
        load(str(tmp_path), SHAPE)


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("how", ["pickle", "torn", "missing", "stray"])
def test_weights_that_are_not_whole_are_refused(tmp_path, how):
    net, file = save_pretrained(tmp_path), tmp_path / WEIGHTS
    tensors = load_file(file)
    name = next(iter(tensors))
    if how == "pickle":
        file.unlink()
        torch.save(net.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    elif how == "torn":
        file.write_bytes(file.read_bytes()[:100])
    elif how == "missing":
        del tensors[name]
        save_file(tensors, file)
    else:
        save_file({**tensors, "stray": torch.ones(1)}, file)
    with pytest.raises(MibenchError) as caught:
        load(str(tmp_path), SHAPE)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    if how in ("missing", "stray"):
        assert (name if how == "missing" else "stray") in str(caught.value)


@pytest.mark.parametrize("name", ["nobody/no-such-prior", "./no-such-folder", "half"])
def test_a_pretrained_prior_that_is_missing_is_told_quickly(workshop, pictures, tmp_path, name):
    if name == "half":
        save_pretrained(tmp_path / "prior")
        (tmp_path / "prior" / "scheduler_config.json").unlink()
        name = str(tmp_path / "prior")
    began = time.monotonic()
    with pytest.raises(UnavailableError, match="pretrained") as caught:
        get_prior(PriorParams(pretrained=name), workshop, pictures(4), pictures(4))
    assert time.monotonic() - began < 10
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_known_prior_saw_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_pretrained(tmp_path / "google" / "ddpm-cifar10-32", unet={"sample_size": 32})
    _, facts = load("google/ddpm-cifar10-32", (3, 32, 32))
    assert facts["saw"] == SAW["google/ddpm-cifar10-32"]
    assert "CIFAR-10" in facts["saw"]


def test_the_identity_follows_the_weights(tmp_path, workshop, make_target, pictures):
    """A folder whose content changes must not meet what the cache keeps of the old one."""
    net = save_pretrained(tmp_path)
    found = []
    for _ in range(2):
        params = Diffusion.Params(
            start="noise", scales=(1.0,), prior=PriorParams(pretrained=str(tmp_path))
        )
        attack = Diffusion(params, workshop)
        attack.prepare(make_target(lambda images: (images,)), pictures(4), pictures(4))
        found.append(attack.spec())
        with torch.no_grad():
            net.conv_out.bias += 1
        net.save_pretrained(tmp_path)
    assert found[0] != found[1]
    assert {**found[0], "prior": None} == {**found[1], "prior": None}


# --- a trained prior as a folder ----------------------------------------------------------------


def test_a_trained_prior_is_written_so_that_it_loads_again(workshop, pictures, tmp_path):
    params = PriorParams(steps=3, batch=4, channels=(16, 16), timesteps=40, patch=2)
    prior, _ = get_prior(params, workshop, pictures(16), pictures(8, seed=1))
    write_prior(prior, {"saw": "sixteen pictures"}, tmp_path / "out")
    again, facts = load(str(tmp_path / "out"), SHAPE)
    assert facts["saw"] == "sixteen pictures"
    images, t = torch.randn(2, *SHAPE), torch.tensor([3, 20])
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(images, t), prior(images, t), rtol=0, atol=0)
    assert torch.equal(again.signal, prior.signal)
    with pytest.raises(InvalidParamsError, match="16x16 pixels"):
        load(str(tmp_path / "out"), (3, 32, 32))


@pytest.mark.parametrize("text", ["{", "[]"])
def test_notes_that_are_broken_are_told(tmp_path, text):
    save_pretrained(tmp_path)
    (tmp_path / OWN).write_text(text)
    with pytest.raises(UnavailableError, match=OWN):
        load(str(tmp_path), SHAPE)


def test_a_sheet_shows_every_image_in_order(tmp_path):
    from PIL import Image

    images = torch.arange(6).div(10).view(6, 1, 1, 1).expand(6, 3, 32, 32)
    write_sheet(images, 3, tmp_path / "sheet.png")
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (3 * 68 + 4, 2 * 68 + 4)
    middles = [sheet.getpixel((36 + 68 * (at % 3), 36 + 68 * (at // 3)))[0] for at in range(6)]
    assert middles == [0, 26, 51, 76, 102, 128]
    assert sheet.getpixel((1, 1)) == (255, 255, 255)


# --- latent diffusion ----------------------------------------------------------------------------


def save_latent(folder, *, prompt=(1, 7, 8), schedule=None, channels=4, unet=None):
    """A Stable Diffusion of a few thousand weights: 32 pixels, latents of 4 x 16 x 16."""
    torch.manual_seed(0)
    values = {
        "sample_size": 16, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 8),
        "layers_per_block": 1, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 8,
        "attention_head_dim": 4, "norm_num_groups": 4,
    }  # fmt: skip
    net = diffusers.UNet2DConditionModel(**values | (unet or {}))
    net.save_pretrained(folder / "unet")
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=channels, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    vae.save_pretrained(folder / "vae")
    named = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    diffusers.PNDMScheduler(50, **named | (schedule or {})).save_pretrained(folder / "scheduler")
    if prompt is not None:
        save_file({"embedding": torch.randn(prompt)}, folder / PROMPT)
    return net.eval(), vae.eval()


def test_a_latent_prior_is_its_networks(tmp_path):
    net, vae = save_latent(tmp_path)
    prior, facts = load(str(tmp_path), (3, 32, 32))
    assert isinstance(prior, LatentPrior)
    assert facts["source"] == str(tmp_path)
    prompt = load_file(tmp_path / PROMPT)["embedding"]
    states, t = torch.randn(2, 4, 16, 16), torch.tensor([3, 20])
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = net(states, t, encoder_hidden_states=prompt.expand(2, -1, -1)).sample
        torch.testing.assert_close(prior(states, t), expected)
        mode = vae.encode(2 * images - 1).latent_dist.mean * vae.config.scaling_factor
        torch.testing.assert_close(prior.encode(images), mode)
        decoded = vae.decode(states / vae.config.scaling_factor).sample
        torch.testing.assert_close(prior.decode(states), decoded)
    assert torch.equal(prior.confine(100 * states), 100 * states)
    reference = diffusers.DDIMScheduler(
        50, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    torch.testing.assert_close(prior.signal, reference.alphas_cumprod)


@pytest.mark.parametrize("side", [16, 48])
def test_images_of_another_size_are_resized_for_the_vae(tmp_path, side):
    save_latent(tmp_path)
    prior, _ = load(str(tmp_path), (3, side, side))
    states = prior.encode(torch.rand(2, 3, side, side))
    assert states.shape == (2, 4, 16, 16)
    states = states.detach().requires_grad_()
    images = prior.decode(states)
    assert images.shape == (2, 3, side, side)
    (gradient,) = torch.autograd.grad(images[0].sum(), states)
    assert gradient[0].abs().min() > 0
    assert (gradient[1] == 0).all()
    assert prior.working_shape((3, side, side)) == (4, 3, 32, 32)


@pytest.mark.parametrize(
    "values",
    [
        {"preset": "drag", "sampler": {"steps": 3, "recurrence": 2, "tv": 0.0}},
        {"preset": "drag++", "sampler": {"steps": 6, "recurrence": 2, "tv": 0.0}},
        {"preset": "dps", "sampler": {"steps": 3}, "scales": (0.3,)},
        {"preset": "red-diff", "sampler": {"steps": 3}, "scales": (0.25, 25.0)},
        {"sampler": {"steps": 10, "inner": 2}, "scales": (1.0,)},
    ],
    ids=str,
)
def test_the_whole_attack_runs_in_latent_space(workshop, make_target, pictures, tmp_path, values):
    save_latent(tmp_path)
    params = Diffusion.Params(
        **values,
        tuning_images=2,
        prior=PriorParams(pretrained=str(tmp_path)),
        decoder={"steps": 3, "batch": 4},
    )
    attack = Diffusion(params, workshop)

    def client(images):
        assert images.shape[1:] == SHAPE
        return (nn.functional.avg_pool2d(images, 4),)

    attack.prepare(make_target(client), pictures(16), pictures(4, seed=1))
    shares = client(pictures(2, seed=2).images())
    found = []
    for received in (shares, shares, tuple(1 - share for share in shares)):
        torch.manual_seed(0)
        found.append(attack.reconstruct(received))
    assert torch.equal(found[0], found[1])
    assert found[0].shape == (2, *SHAPE)
    assert found[0].isfinite().all()
    assert not torch.equal(found[0], found[2])  # the shares guide
    assert attack.blind(3).shape == (3, *SHAPE)


def test_guidance_through_the_vae_lessens_the_residual(workshop, make_target, pictures, tmp_path):
    save_latent(tmp_path)

    def client(images):
        return (nn.functional.avg_pool2d(images, 8),)

    params = Diffusion.Params(
        start="noise", sampler=SamplerParams(steps=5, inner=20), scales=(0.01,),
        prior=PriorParams(pretrained=str(tmp_path)),
    )  # fmt: skip
    attack = Diffusion(params, workshop)
    attack.prepare(make_target(client), pictures(4), pictures(4))
    (share,) = client(attack.blind(3))  # of images that the networks can make
    torch.manual_seed(7)
    rebuilt, free = attack.reconstruct((share,)), attack.blind(3)
    errors = [(client(one)[0] - share).square().sum() for one in (rebuilt, free)]
    assert errors[0] < 0.3 * errors[1]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"prompt": (1, 7, 6)}, "its empty prompt has 6"),
        ({"prompt": (2, 7, 8)}, "no tensor 'embedding'"),
        ({"schedule": {"prediction_type": "v_prediction"}}, "predicts 'v_prediction'"),
        ({"channels": 2}, "its VAE has 2"),
        ({"unet": {"in_channels": 9}}, "denoises 9 channels to 4"),
    ],
    ids=str,
)
def test_a_latent_prior_that_does_not_fit_is_refused(tmp_path, wrong, said):
    save_latent(tmp_path, **wrong)
    with pytest.raises(InvalidParamsError, match=r"attack\.prior\.pretrained") as caught:
        load(str(tmp_path), SHAPE)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["unet", "vae", "scheduler"])
def test_a_latent_prior_without_a_part_is_told(tmp_path, part):
    import shutil

    save_latent(tmp_path)
    shutil.rmtree(tmp_path / part)
    with pytest.raises(UnavailableError) as caught:
        load(str(tmp_path), SHAPE)
    assert str(tmp_path) in str(caught.value)


def test_without_prompt_and_transformers_it_is_told_what_to_do(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    save_latent(tmp_path, prompt=None)
    with pytest.raises(UnavailableError, match="pip install transformers") as caught:
        load(str(tmp_path), SHAPE)
    assert PROMPT in str(caught.value)


def test_the_empty_prompt_comes_from_the_text_encoder(tmp_path):
    transformers = pytest.importorskip("transformers")
    save_latent(tmp_path, prompt=None)
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": 7, "tokenizer_class": "CLIPTokenizer"})
    )
    config = transformers.CLIPTextConfig(
        vocab_size=3, hidden_size=8, intermediate_size=8, num_hidden_layers=1, eos_token_id=1,
        num_attention_heads=2, max_position_embeddings=7, projection_dim=8, bos_token_id=0,
    )  # fmt: skip
    encoder = transformers.CLIPTextModel(config).eval()
    encoder.save_pretrained(tmp_path / "text_encoder")
    prior, _ = load(str(tmp_path), SHAPE)
    with torch.no_grad():
        expected = encoder(torch.tensor([[0, 1, 1, 1, 1, 1, 1]])).last_hidden_state
    torch.testing.assert_close(prior.prompt, expected)


def test_unconditional_samples_are_drawn_in_groups(tmp_path, workshop, monkeypatch):
    from mibench.attacks import budget

    save_latent(tmp_path)
    prior, _ = load(str(tmp_path), SHAPE)
    sizes = []
    prior.register_forward_pre_hook(lambda net, args: sizes.append(len(args[0])))
    monkeypatch.setattr(budget, "VALUES", 2 * 4 * 3 * 32 * 32)
    images = unconditional(prior, workshop, SamplerParams(steps=2, recurrence=3), 3)
    assert images.shape == (3, *SHAPE)
    assert sizes == [2, 2, 1, 1]
    assert isinstance(prior, Prior)
