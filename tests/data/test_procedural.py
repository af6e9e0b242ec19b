import math

import pytest
import torch
from torch import Tensor

from mibench.data import procedural
from mibench.data.procedural import CLASS_NAMES, INDEX_LIMIT, SEED_LIMIT, SIZES, render

TRAIN, TEST = 3000, 1000


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    """Floats in [0, 1] and labels: the first TRAIN and the last TEST of one seed."""
    pixels, labels = render(torch.arange(TRAIN + TEST), seed=0)
    return pixels.float() / 255, labels


def as_set(pixels: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in pixels}


# The contract -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_shapes_and_types(size):
    pixels, labels = render(torch.arange(7), seed=1, size=size)
    assert pixels.shape == (7, 3, size, size)
    assert pixels.dtype == torch.uint8
    assert labels.shape == (7,)
    assert labels.dtype == torch.int64


def test_size_defaults_to_32():
    assert torch.equal(render(torch.arange(3), 0)[0], render(torch.arange(3), 0, 32)[0])


def test_no_indices_give_no_images():
    pixels, labels = render(torch.arange(0), seed=0, size=64)
    assert pixels.shape == (0, 3, 64, 64)
    assert labels.shape == (0,)


def test_class_names():
    assert len(CLASS_NAMES) == len(set(CLASS_NAMES)) == 10
    assert CLASS_NAMES[0] == "ellipse-stripes"
    assert CLASS_NAMES[9] == "ring-spots"


@pytest.mark.parametrize("size", [0, -32, 16, 33, 128, 32.0, True, "32", None])
def test_refuses_other_sizes(size):
    with pytest.raises(ValueError, match="size"):
        render(torch.arange(2), seed=0, size=size)


@pytest.mark.parametrize("seed", [-1, SEED_LIMIT, 1.0, True, None])
def test_refuses_other_seeds(seed):
    with pytest.raises(ValueError, match="seed"):
        render(torch.arange(2), seed=seed)


@pytest.mark.parametrize(
    "indices",
    [
        torch.tensor([0, -1]),
        torch.tensor([INDEX_LIMIT]),
        torch.tensor(3),
        torch.zeros(2, 2, dtype=torch.int64),
        torch.zeros(2, dtype=torch.int32),
        torch.zeros(2),
        torch.zeros(2, dtype=torch.int64, device="meta"),
    ],
    ids=["negative", "too large", "scalar", "matrix", "int32", "float", "not on the CPU"],
)
def test_refuses_other_indices(indices):
    with pytest.raises(ValueError, match="indices"):
        render(indices, seed=0)


def test_takes_the_last_index_and_seed():
    pixels, labels = render(torch.tensor([0, INDEX_LIMIT - 1]), seed=SEED_LIMIT - 1)
    assert not torch.equal(pixels[0], pixels[1])
    assert labels.min() >= 0
    assert labels.max() <= 9


# A pure function of seed, index and size ----------------------------------------------------------


def test_same_call_same_images_whatever_the_random_state():
    indices = torch.arange(50)
    torch.manual_seed(1)
    first = render(indices, seed=4)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = render(indices, seed=4)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_leaves_its_indices_alone():
    indices = torch.arange(20)
    render(indices, seed=0)
    assert torch.equal(indices, torch.arange(20))


@pytest.mark.parametrize("size", SIZES)
def test_an_image_does_not_depend_on_its_batch(size):
    indices = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:300]
    pixels, labels = render(indices, seed=2, size=size)  # more than one chunk
    for part in (slice(0, 1), slice(7, 10), slice(250, 263), slice(299, 300)):
        alone = render(indices[part], seed=2, size=size)
        assert torch.equal(alone[0], pixels[part])
        assert torch.equal(alone[1], labels[part])
    mirrored = render(indices.flip(0), seed=2, size=size)
    assert torch.equal(mirrored[0], pixels.flip(0))
    assert torch.equal(mirrored[1], labels.flip(0))


def test_repeated_indices_repeat_images():
    pixels, labels = render(torch.tensor([5, 9, 5]), seed=0)
    assert torch.equal(pixels[0], pixels[2])
    assert labels[0] == labels[2]


@pytest.mark.parametrize("size", SIZES)
def test_threads_do_not_matter(size):
    indices = torch.arange(70)
    expected, _ = render(indices, seed=0, size=size)
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(render(indices, seed=0, size=size)[0], expected)
    finally:
        torch.set_num_threads(1)


def test_default_dtype_does_not_matter():
    expected, _ = render(torch.arange(20), seed=0)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(render(torch.arange(20), seed=0)[0], expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_images_of_all_roles_and_seeds_are_distinct():
    count = 500
    pixels = [render(torch.arange(s, s + count), seed=0)[0] for s in (0, 10**6, 2 * 10**6)]
    pixels += [render(torch.arange(count), seed=seed)[0] for seed in (1, 2)]
    assert len(as_set(torch.cat(pixels))) == 5 * count


def test_both_sizes_show_the_same_scene():
    small, small_labels = render(torch.arange(200), seed=0, size=32)
    large, large_labels = render(torch.arange(200), seed=0, size=64)
    assert torch.equal(small_labels, large_labels)
    small, large = small.float() / 255, large.float() / 255
    error = (torch.nn.functional.avg_pool2d(large, 2) - small).square().mean((1, 2, 3))
    other = (torch.nn.functional.avg_pool2d(large, 2) - small.roll(1, 0)).square().mean((1, 2, 3))
    assert error.mean() < 0.3 * other.mean()


# Classes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 10**6, INDEX_LIMIT - 96])
def test_every_block_of_ten_holds_each_class_once(start):
    # From a multiple of ten on, as the blocks are.
    start -= start % 10
    _, labels = render(torch.arange(start, start + 90), seed=3)
    assert torch.equal(labels.view(9, 10).sort(1).values, torch.arange(10).expand(9, 10))


def test_order_of_classes_differs_between_blocks_and_seeds():
    indices = torch.arange(500)
    _, first = render(indices, seed=0)
    _, second = render(indices, seed=1)
    assert len(first[::10].unique()) == 10
    assert 0.02 < (first == second).float().mean() < 0.25


def test_the_class_touches_the_object_only():
    indices = torch.arange(64)
    variants = torch.stack(
        [
            procedural._render_chunk(indices, torch.full((64,), label), seed=0, size=32)
            for label in range(10)
        ]
    )
    same = (variants == variants[0]).all(0).all(1)  # (64, S, S)
    border = torch.ones(32, 32, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert same[:, border].float().mean() > 0.5  # large objects and shadows reach the border
    assert same[:, 12:20, 12:20].float().mean() < 0.1
    assert len(as_set(variants.flatten(0, 1))) == 640


def test_silhouettes_have_like_areas():
    count = 300
    keys = procedural._hash(torch.arange(count, dtype=torch.int32))
    grid, fields = procedural._grid(32), torch.zeros(4, count, 1, 1, 1)
    areas = []
    for silhouette in range(5):
        body = procedural._object(keys, torch.full((count,), silhouette), fields)
        u, v = body.coordinates(*body.offsets(grid))
        areas.append(body.mask(u, v, 2 / grid.px).mean().item())
    assert min(areas) > 0.29
    assert max(areas) < 0.37
    assert max(areas) / min(areas) < 1.2


# Randomness ---------------------------------------------------------------------------------------


def test_hash_is_one_to_one_and_even():
    words = procedural._hash(torch.arange(-(2**17), 2**17, dtype=torch.int32))
    assert len(words.unique()) == 2**18
    uniform = procedural._as_uniform(words)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.003)
    normal = procedural._as_normal(words)
    assert normal.mean().item() == pytest.approx(0, abs=0.01)
    assert normal.std().item() == pytest.approx(1, abs=0.01)


def test_slots_and_images_are_uncorrelated():
    words = procedural._words(procedural._hash(torch.arange(2000, dtype=torch.int32)), 0, 50)
    correlation = torch.corrcoef(procedural._as_uniform(words).T) - torch.eye(50)
    assert correlation.abs().max() < 5 / math.sqrt(2000)
    correlation = torch.corrcoef(procedural._as_uniform(words[:50])) - torch.eye(50)
    assert correlation.abs().max() < 5 / math.sqrt(50)


def test_textures_have_unit_variance_and_are_uncorrelated():
    keys = procedural._hash(torch.arange(400, dtype=torch.int32))
    fields = procedural._textures(keys, 32).flatten(1)
    assert torch.allclose(fields.std(1), torch.ones(4), atol=0.08)
    assert (torch.corrcoef(fields) - torch.eye(4)).abs().max() < 0.05


# Statistics: they are those of natural images of this size ----------------------------------------


def psnr(guess: Tensor, truth: Tensor) -> float:
    error = (guess - truth).square().mean((1, 2, 3))
    return (-10 * error.log10()).mean().item()


def test_floors(images):
    pixels, _ = images
    rest = pixels[TRAIN:]
    assert psnr(pixels[:TRAIN].mean(0), rest) == pytest.approx(12.66, abs=0.6)
    assert psnr(rest.mean((2, 3), keepdim=True), rest) == pytest.approx(14.37, abs=0.6)
    assert psnr(rest.roll(TEST // 2, 0), rest) == pytest.approx(9.68, abs=0.6)


def test_grey_levels(images):
    pixels, _ = images
    assert pixels.mean().item() == pytest.approx(0.461, abs=0.03)
    assert pixels.std().item() == pytest.approx(0.242, abs=0.03)
    assert ((pixels == 0) | (pixels == 1)).float().mean() < 0.015
    red, green, blue = (pixels[:, c].flatten() for c in range(3))
    assert torch.corrcoef(torch.stack([red, green]))[0, 1].item() == pytest.approx(0.90, abs=0.04)
    assert torch.corrcoef(torch.stack([red, blue]))[0, 1].item() == pytest.approx(0.77, abs=0.06)


def test_spectrum_falls_as_that_of_photographs(images):
    grey = images[0][TRAIN:].mean(1)
    window = torch.hann_window(32, periodic=False)
    grey = (grey - grey.mean((1, 2), keepdim=True)) * window * window[:, None]
    power = torch.fft.fft2(grey).abs().square().mean(0)
    frequency = torch.fft.fftfreq(32, 1 / 32)
    ring = (frequency.square() + frequency[:, None].square()).sqrt().round()
    log_power = torch.stack([power[ring == f].mean() for f in range(2, 16)]).log10()
    log_f = torch.arange(2, 16).log10()
    slope = torch.linalg.lstsq(torch.stack([log_f, torch.ones(14)], 1), log_power[:, None])
    assert slope.solution[0].item() == pytest.approx(-3.63, abs=0.3)


def test_differences_have_heavy_tails(images):
    step = images[0].diff(dim=3)
    kurtosis = (step**4).mean() / (step**2).mean() ** 2
    assert 5 < kurtosis < 12


# No trivial cue: what takes no shapes must not find the class -------------------------------------


def ridge_accuracy(features: Tensor, labels: Tensor) -> float:
    """Best of three penalties on the test images: an upper bound."""
    features = features.flatten(1)
    features = features - features[:TRAIN].mean(0)
    targets = torch.nn.functional.one_hot(labels[:TRAIN], 10).float() - 0.1
    gram = features[:TRAIN] @ features[:TRAIN].T
    across = features[TRAIN:] @ features[:TRAIN].T
    accuracies = []
    for penalty in (1e-3, 1e-2, 1e-1):
        damped = gram + penalty * gram.trace() / 100 * torch.eye(TRAIN)
        weights = torch.cholesky_solve(targets, torch.linalg.cholesky(damped))
        accuracies.append(((across @ weights).argmax(1) == labels[TRAIN:]).float().mean().item())
    return max(accuracies)


def colour_neighbour_accuracy(pixels: Tensor, labels: Tensor) -> float:
    """25 nearest neighbours on mean and deviation of the three colours."""
    colours = torch.cat([pixels.mean((2, 3)), pixels.std((2, 3))], 1)
    nearest = torch.cdist(colours[TRAIN:], colours[:TRAIN]).topk(25, largest=False).indices
    votes = torch.nn.functional.one_hot(labels[nearest], 10).sum(1)
    return (votes.argmax(1) == labels[TRAIN:]).float().mean().item()


def test_pixels_do_not_give_the_class_away(images):
    assert ridge_accuracy(*images) < 0.20


def test_spectrum_does_not_give_the_class_away(images):
    pixels, labels = images
    amplitude = torch.fft.rfft2(pixels.mean(1)).abs()
    assert ridge_accuracy((amplitude + 1e-3).log(), labels) < 0.32


def test_border_does_not_give_the_class_away(images):
    pixels, labels = images
    border = torch.ones(32, 32, dtype=torch.bool)
    border[4:-4, 4:-4] = False
    assert ridge_accuracy(pixels[:, :, border], labels) < 0.14


def test_colours_do_not_give_the_class_away(images):
    assert colour_neighbour_accuracy(*images) < 0.14


def test_the_probes_would_find_a_cue(images):
    # A tint and a faint brightness of one corner pixel stand for a leak.
    pixels, labels = images
    tinted = pixels.clone()
    tinted[:, 0] += 0.1 * labels[:, None, None]
    assert colour_neighbour_accuracy(tinted, labels) > 0.3
    marked = pixels[:, :, :8, :8].clone()
    marked[:, 0, 0, 0] += 0.3 * (labels == 4)
    assert ridge_accuracy(marked, labels) > 0.15
