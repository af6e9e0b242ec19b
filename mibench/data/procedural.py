"""An image set made on demand from numbers: no download, no files, no state.

Every image shows one object on a textured scene. Its class is the silhouette of the object (five)
together with the pattern on its surface (two); colour, size, place, light and scene tell nothing
about it. The set stands in for photographs in smoke tests and examples. No published number
refers to it, and what is trained on it proves that code works, not that a defense does.

The file follows the making of an image from top to bottom: randomness, class, textures, colours,
scene, object, surface, light, occlusion, camera. Coordinates run over [-1, 1] from left to right
and from bottom to top, so a pixel is 2 / size wide; grey values run over [0, 1]. Numbers that
belong to an image have the shape (N, 1, 1, 1), its fields (N, 1, S, S), its colours (N, 3, 1, 1).
"""

import enum
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mibench import progress
from mibench.data.base import Dataset
from mibench.data.sets import ImageSet
from mibench.errors import DataError
from mibench.registry import datasets
from mibench.task import Classification

SILHOUETTES = ("ellipse", "bar", "triangle", "star", "ring")
SURFACES = ("stripes", "spots")
CLASS_NAMES = tuple(
    f"{shape}-{surface}" for shape, surface in itertools.product(SILHOUETTES, SURFACES)
)
SIZES = (32, 64)
INDEX_LIMIT = 2**32
SEED_LIMIT = 2**31

_CHUNK = 256
_EDGE_PX = 0.45  # softness of the edges of regions and occluders
_SHADOW_SOFTNESS = 0.06  # in coordinate units, so that both sizes show the same shadow
_REGION_CHANCES = (0.8, 0.5)
# Scales that give the five silhouettes like areas: size must not be a cue for the class.
_AREA_SCALES = (0.87, 0.88, 1.07, 0.91, 0.92)
_BLUR_TAPS = {32: (1, 2, 1), 64: (1, 4, 6, 4, 1)}
_SHOULDER, _TOE = 0.75, 0.12


# Randomness ---------------------------------------------------------------------------------------


class _Slots(enum.IntEnum):
    """First slot of each step; a step takes its slots in the order of its draws."""

    TEXTURES = 0
    SCENE = 64
    OBJECT = 128
    SURFACE = 192
    LIGHT = 256
    OCCLUSION = 320
    CAMERA = 384
    FIELDS = 1 << 16
    NOISE = 1 << 20


_SLOTS_PER_STEP = 64
_GOLDEN = 0x9E3779B9
_MIX_1 = 0x7FEB352D
_MIX_2 = 0x846CA68B


def _signed(word: int) -> int:
    """The int32 that has the bits of an unsigned 32-bit word."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _hash(words: Tensor) -> Tensor:
    """Mix int32 words in place, one to one on 32 bits, and return them."""
    # int32 has no logical shift: the mask drops the copies of the sign. The one scratch tensor
    # spares fresh pages for each of the temporaries, which is most of the time otherwise.
    scratch = torch.empty_like(words)
    for shift, factor in ((16, _MIX_1), (15, _MIX_2), (16, 1)):
        torch.bitwise_right_shift(words, shift, out=scratch)
        words.bitwise_xor_(scratch.bitwise_and_((1 << (32 - shift)) - 1))
        if factor != 1:
            words.mul_(_signed(factor))
    return words


def _stream_key(stream: int) -> Tensor:
    """Hash of a stream number: 2 * seed for the images, 2 * seed + 1 for the classes."""
    return _hash(torch.tensor([_signed(stream)], dtype=torch.int32))


def _words(keys: Tensor, first_slot: int, count: int) -> Tensor:
    """(N,) keys -> (N, count) random int32 words, one for each slot from the first on."""
    slots = torch.arange(first_slot, first_slot + count, dtype=torch.int32)
    slot_hashes = _hash(slots * _signed(_GOLDEN) + 1)
    return _hash(slot_hashes[None, :] ^ keys[:, None])


def _as_uniform(words: Tensor) -> Tensor:
    """Top 24 bits of each word as a float in [0, 1)."""
    return ((words >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def _as_normal(words: Tensor) -> Tensor:
    """Sum of the four bytes of each word, centred and scaled to unit deviation."""
    pairs = words >> 8
    pairs.bitwise_and_(0x00FF00FF)
    pairs.add_(words & 0x00FF00FF)  # two sums of two bytes side by side, no carry between them
    total = (pairs >> 16).add_(pairs).bitwise_and_(0xFFFF)
    return total.to(torch.float32).sub_(510.0).mul_(1 / 147.8)


class _Draws:
    """The draws of one step: each takes the next slot, whether or not its value is used."""

    def __init__(self, keys: Tensor, step: _Slots) -> None:
        words = _words(keys, step, _SLOTS_PER_STEP)
        self._columns: Iterator[Tensor] = iter(words.T.reshape(_SLOTS_PER_STEP, -1, 1, 1, 1))

    def uniform(self, low: float, high: float) -> Tensor:
        return _as_uniform(next(self._columns)) * (high - low) + low

    def normal(self, deviation: float) -> Tensor:
        return _as_normal(next(self._columns)) * deviation

    def chance(self, probability: float) -> Tensor:
        return _as_uniform(next(self._columns)) < probability

    def sign(self) -> Tensor:
        return self.chance(0.5).to(torch.float32) * 2 - 1

    def angle(self, turn: float = 2 * math.pi) -> Tensor:
        return self.uniform(0.0, turn)

    def colour(self, luminance: Tensor) -> Tensor:
        return _opponent_to_rgb(luminance, self.normal(0.09), self.normal(0.045))


# Class --------------------------------------------------------------------------------------------


def _labels(indices: Tensor, seed: int) -> Tensor:
    """(N,) labels: a rotation of 0..9 in every block of ten indices."""
    blocks = (indices // 10).to(torch.int32)
    turn = _hash(blocks ^ _stream_key(2 * seed + 1)).to(torch.int64) & 0xFFFFFFFF
    return (indices % 10 + turn) % 10


# Textures -----------------------------------------------------------------------------------------


def _textures(keys: Tensor, size: int) -> Tensor:
    """(4, N, 1, S, S) random fields of unit variance; each pair has a spectrum of its own."""
    canvas = size * 3 // 2  # larger than the image: a field must not wrap around
    frequency = torch.fft.fftfreq(canvas, 1 / canvas, dtype=torch.float32)
    fx, fy = frequency[None, :], frequency[:, None]
    power = fx**2 + fy**2
    power[0, 0] = math.inf  # no constant part
    log_f, cos_2, sin_2 = power.log() / 2, (fx**2 - fy**2) / power, 2 * fx * fy / power

    draw = _Draws(keys, _Slots.TEXTURES)
    amplitudes = []
    for _ in range(2):
        exponent, anisotropy = draw.uniform(0.8, 1.45), draw.uniform(0.0, 0.8)
        twice = 2 * draw.angle(math.pi)
        lobes = anisotropy * twice.cos() * cos_2 + anisotropy * twice.sin() * sin_2
        amplitude = (-exponent * log_f).exp_() * (1 + lobes)
        amplitudes.append(amplitude / (amplitude**2).sum((2, 3), keepdim=True).sqrt())
    spectrum = _as_normal(_words(keys, _Slots.FIELDS, 4 * canvas**2))
    spectrum = spectrum.view(-1, 2, canvas, canvas, 2).mul_(torch.cat(amplitudes, 1)[..., None])
    fields = torch.fft.ifft2(torch.view_as_complex(spectrum), norm="forward")
    cropped = torch.view_as_real(fields)[:, :, :size, :size]
    return cropped.permute(1, 4, 0, 2, 3).reshape(4, -1, 1, size, size)


# Colours ------------------------------------------------------------------------------------------


def _opponent_to_rgb(luminance: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Luminance and two opponent axes -> red, green, blue along dimension 1."""
    return torch.cat([luminance + a - b / 2, luminance + b, luminance - a - b / 2], dim=1)


def _blend(under: Tensor, over: Tensor, mask: Tensor) -> Tensor:
    """Lay one over the other where the mask is 1."""
    return under + mask * (over - under)


# Scene --------------------------------------------------------------------------------------------


class _Grid(NamedTuple):
    """Pixel centres, (1, 1, 1, S) and (1, 1, S, 1), and the width of a pixel."""

    x: Tensor
    y: Tensor
    px: float


def _grid(size: int) -> _Grid:
    """Coordinates of an image of this size."""
    centres = (torch.arange(size, dtype=torch.float32) + 0.5) * (2 / size) - 1
    return _Grid(centres.view(1, 1, 1, -1), -centres.view(1, 1, -1, 1), 2 / size)


def _turn(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates along a direction and across it."""
    cos, sin = angle.cos(), angle.sin()
    return x * cos + y * sin, y * cos - x * sin


def _pattern(spots: Tensor, u: Tensor, v: Tensor, draw: _Draws, frequency: Tensor) -> Tensor:
    """Stripes across u, or spots on a square lattice, of the same strength."""
    sharpness, phase_u, phase_v = draw.uniform(1.0, 2.5), draw.angle(), draw.angle()
    wave_v = math.sqrt(2) * (frequency * v + phase_v).cos_()
    wave = (frequency * u + phase_u).cos_() * torch.where(spots, wave_v, 1.0)
    return (sharpness * wave).tanh_()


def _scene(keys: Tensor, grid: _Grid, fields: Tensor) -> tuple[Tensor, Tensor]:
    """Scene (N, 3, S, S) and the luminance of its base colour."""
    f0, f1, f2, f3 = fields
    draw = _Draws(keys, _Slots.SCENE)
    luminance = draw.uniform(0.11, 0.85)
    colour, contrast = draw.colour(luminance), draw.uniform(0.03, 0.16)
    for chance in _REGION_CHANCES:
        along, across = _turn(grid.x, grid.y, draw.angle())
        edge = along - draw.uniform(-0.9, 0.9) - draw.normal(0.25) * across**2
        edge = edge + draw.uniform(0.03, 0.15) * f1
        mask = draw.chance(chance) * (edge / (_EDGE_PX * grid.px)).sigmoid_()
        colour = _blend(colour, draw.colour(draw.uniform(0.1, 0.85)), mask)
        contrast = _blend(contrast, draw.uniform(0.03, 0.16), mask)

    # Its kind is independent of the class: the presence of stripes anywhere must not give it away.
    u, v = _turn(grid.x, grid.y, draw.angle())
    amplitude = draw.chance(0.5) * draw.uniform(0.02, 0.09)
    pattern = _pattern(draw.chance(0.5), u, v, draw, draw.uniform(5.0, 16.0))
    chroma = draw.uniform(0.0, 0.05)
    texture = contrast * f0 + amplitude * pattern
    return colour + _opponent_to_rgb(texture, chroma * f2, chroma * f3), luminance


# Object -------------------------------------------------------------------------------------------


class _Object(NamedTuple):
    """Where and how the object lies; the lengths but for the centre are relative to its scale."""

    silhouette: Tensor  # (N,) index into SILHOUETTES
    scale: Tensor
    centre_x: Tensor
    centre_y: Tensor
    rotation: Tensor
    log_aspect: Tensor
    shear: Tensor
    wobble_u: Tensor  # (N, 1, S, S)
    wobble_v: Tensor

    def offsets(self, grid: _Grid) -> tuple[Tensor, Tensor]:
        """Coordinates from its centre, as the image lies."""
        return grid.x - self.centre_x, grid.y - self.centre_y

    def coordinates(self, dx: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates from its centre, with the pose undone and its scale as the unit."""
        along, across = _turn(dx, dy, self.rotation)
        stretch = (self.log_aspect / 2).exp()
        return (along - self.shear * across) / (self.scale * stretch), across * stretch / self.scale

    def mask(self, u: Tensor, v: Tensor, steepness: float) -> Tensor:
        """1 inside the silhouette, 0 outside; steepness of the edge per coordinate unit."""
        rho = torch.tensor(_AREA_SCALES, dtype=torch.float32)[self.silhouette].view(-1, 1, 1, 1)
        distance = _distance(self.silhouette, u / rho + self.wobble_u, v / rho + self.wobble_v)
        return (-distance * (steepness * self.scale * rho)).sigmoid_()


def _distance(silhouette: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """(N, 1, S, S) distance from the edge of each image's silhouette, negative inside."""
    r = (u**2 + v**2).sqrt_().clamp_(min=1e-6)
    c = v / r  # cosine of the angle from the upright; five arms by its Chebyshev polynomial
    cos_5 = c * (16 * c**4 - 20 * c**2 + 5)
    slope = math.sqrt(0.75) * u.abs() + 0.5 * v
    distances = (
        r - 1,
        torch.maximum(u.abs() - 1.35, v.abs() - 0.55),
        1.35 * torch.maximum(slope, -v) - 0.85,
        r - (0.95 + 0.38 * cos_5),
        (r - 0.78).abs() - 0.30,
    )
    return torch.stack(distances)[silhouette, torch.arange(len(silhouette))]


def _object(keys: Tensor, silhouette: Tensor, fields: Tensor) -> _Object:
    """The object's place and pose."""
    draw = _Draws(keys, _Slots.OBJECT)
    scale = draw.uniform(0.6, 0.9)
    centre_x, centre_y = draw.uniform(-0.28, 0.28), draw.uniform(-0.28, 0.28)
    rotation, log_aspect = draw.uniform(-0.5, 0.5), draw.uniform(-0.2, 0.2)
    shear, wobble = draw.uniform(-0.15, 0.15), draw.uniform(0.0, 0.035) / scale
    wobble_u, wobble_v = wobble * fields[2], wobble * fields[3]
    return _Object(
        silhouette, scale, centre_x, centre_y, rotation, log_aspect, shear, wobble_u, wobble_v
    )


# Surface ------------------------------------------------------------------------------------------


def _surface(
    keys: Tensor, spots: Tensor, scene_luminance: Tensor, body: _Object, grid: _Grid, fields: Tensor
) -> Tensor:
    """(N, 3, S, S) colour, pattern and grain of the object."""
    draw = _Draws(keys, _Slots.SURFACE)
    step = draw.uniform(0.2, 0.5) * draw.sign()
    outside = (scene_luminance + step < 0.1) | (scene_luminance + step > 0.88)
    luminance = scene_luminance + torch.where(outside, -step, step)
    colour = draw.colour(luminance.clamp(0.1, 0.88))

    u, v = _turn(*body.coordinates(*body.offsets(grid)), draw.angle(math.pi))
    warp = draw.uniform(0.0, 0.05)
    frequency = draw.uniform(5.5, 9.0) * 0.66 / body.scale
    amplitude, tilt = draw.uniform(0.10, 0.24) * draw.sign(), draw.normal(0.35)
    tilts = torch.cat([1 + tilt, torch.ones_like(tilt), 1 - tilt], dim=1)
    pattern = _pattern(spots, u + warp * fields[2], v + warp * fields[3], draw, frequency)
    return colour + amplitude * tilts * pattern + draw.uniform(0.02, 0.06) * fields[1]


# Light --------------------------------------------------------------------------------------------


def _light(keys: Tensor, scene: Tensor, surface: Tensor, body: _Object, grid: _Grid) -> Tensor:
    """(N, 3, S, S) shaded object on the scene, which its shadow darkens."""
    draw = _Draws(keys, _Slots.LIGHT)
    direction = draw.angle()
    dx, dy = body.offsets(grid)
    u, v = body.coordinates(dx, dy)
    along, _ = _turn(dx, dy, direction)
    shading = 1 + draw.uniform(0.0, 0.35) * along / body.scale
    shading = shading - draw.uniform(0.0, 0.18) * (u**2 + v**2)

    strength = draw.chance(0.6) * draw.uniform(0.0, 0.45)
    reach = draw.uniform(0.05, 0.22)
    shadow_u, shadow_v = body.coordinates(
        dx + reach * direction.cos(), dy + reach * direction.sin()
    )
    shadow = strength * body.mask(shadow_u, shadow_v, 1 / _SHADOW_SOFTNESS)
    return _blend(scene * (1 - shadow), surface * shading, body.mask(u, v, 2 / grid.px))


# Occlusion ----------------------------------------------------------------------------------------


def _occlude(keys: Tensor, image: Tensor, body: _Object, grid: _Grid, fields: Tensor) -> Tensor:
    """(N, 3, S, S) image with, at times, a half plane or a bar in front."""
    draw = _Draws(keys, _Slots.OCCLUSION)
    along, _ = _turn(*body.offsets(grid), draw.angle())
    present, is_bar = draw.chance(0.3), draw.chance(0.5)
    depth = along - draw.uniform(0.65, 1.0) * body.scale
    far_edge = torch.where(is_bar, draw.uniform(0.08, 0.16), math.inf) - depth
    mask = (torch.minimum(depth, far_edge) / (_EDGE_PX * grid.px)).sigmoid_()
    colour = draw.colour(draw.uniform(0.1, 0.85)) + draw.uniform(0.03, 0.16) * fields[2]
    return _blend(image, colour, present * mask)


# Camera -------------------------------------------------------------------------------------------


def _tone(image: Tensor) -> Tensor:
    """Bend bright and dark values softly into [0, 1], so that hardly any is cut off."""
    headroom = 1 - _SHOULDER
    bright = _SHOULDER + headroom * ((image - _SHOULDER) / headroom).tanh_()
    dark = _TOE * ((image - _TOE) / _TOE).clamp_(max=0.0).exp_()
    return torch.where(image > _SHOULDER, bright, torch.where(image < _TOE, dark, image))


def _blur(image: Tensor) -> Tensor:
    """Binomial blur along both axes, with the border repeated."""
    size = image.shape[-1]
    taps = _BLUR_TAPS[size]
    reach = len(taps) // 2
    for dim in (2, 3):
        positions = torch.arange(-reach, size + reach).clamp_(0, size - 1)
        padded = image.index_select(dim, positions)
        shifted = (tap * padded.narrow(dim, k, size) for k, tap in enumerate(taps))
        image = sum(shifted, torch.zeros_like(image)) / sum(taps)
    return image


def _camera(keys: Tensor, image: Tensor, grid: _Grid) -> Tensor:
    """(N, 3, S, S) uint8 photograph: exposure, white balance, tone curve, blur, noise."""
    draw = _Draws(keys, _Slots.CAMERA)
    along, _ = _turn(grid.x, grid.y, draw.angle())
    gradient = 1 + draw.uniform(0.0, 0.4) * along
    exposure = draw.normal(0.13)
    balance = torch.cat([draw.normal(0.05), draw.normal(0.02), draw.normal(0.06)], dim=1)
    image = _tone(image * gradient * (exposure + balance).exp())
    image = _blend(image, _blur(image), draw.chance(0.4) * draw.uniform(0.0, 1.0))
    noise = _as_normal(_words(keys, _Slots.NOISE, image[0].numel())).view_as(image)
    image = image + noise * draw.uniform(0.003, 0.025) * (image + 0.5)
    return (image.clamp_(0.0, 1.0) * 255).round_().to(torch.uint8)


# Everything ---------------------------------------------------------------------------------------


def _render_chunk(indices: Tensor, labels: Tensor, seed: int, size: int) -> Tensor:
    """(N, 3, S, S) uint8 images."""
    keys = _hash(indices.to(torch.int32) ^ _stream_key(2 * seed))
    silhouette, spots = labels // len(SURFACES), (labels % len(SURFACES) == 1).view(-1, 1, 1, 1)
    grid = _grid(size)
    fields = _textures(keys, size)
    scene, luminance = _scene(keys, grid, fields)
    body = _object(keys, silhouette, fields)
    surface = _surface(keys, spots, luminance, body, grid, fields)
    image = _light(keys, scene, surface, body, grid)
    image = _occlude(keys, image, body, grid, fields)
    return _camera(keys, image, grid)


def render(indices: Tensor, seed: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Make the images that have these numbers.

    An image depends on its index, the seed and the size only: not on its batch, on the number of
    threads or on a random state. No two indices of a seed share their random numbers, so disjoint
    ranges of indices are disjoint sets of images. Each block of ten indices from a multiple of ten
    on holds every class once. The same index and seed show the same class and scene at both sizes,
    with other texture and noise. On another machine a value may differ by one grey level where
    its mathematical library rounds differently; labels never do.

    Args:
        indices: int64 of shape (N,) on the CPU, each in [0, 2**32); may be empty, unordered or
            repeated.
        seed: Names the set, in [0, 2**31).
        size: Height and width S in pixels, 32 or 64.

    Returns:
        The images, uint8 of shape (N, 3, S, S) in RGB order with grey levels 0..255, and their
        labels, int64 of shape (N,), places in `CLASS_NAMES`.

    Raises:
        ValueError: An argument is not of the type, shape or range above.
    """
    if type(size) is not int or size not in SIZES:
        raise ValueError(f"size must be one of {SIZES}, got {size!r}")
    if type(seed) is not int or not 0 <= seed < SEED_LIMIT:
        raise ValueError(f"seed must be an integer in [0, {SEED_LIMIT}), got {seed!r}")
    if indices.dtype != torch.int64 or indices.dim() != 1 or indices.device.type != "cpu":
        raise ValueError(
            "indices must be an int64 vector on the CPU, "
            f"got {indices.dtype} of shape {tuple(indices.shape)} on {indices.device}"
        )
    outside = indices[(indices < 0) | (indices >= INDEX_LIMIT)]
    if len(outside):
        raise ValueError(f"indices must lie in [0, {INDEX_LIMIT}), got {int(outside[0])}")
    labels = _labels(indices, seed)
    images = torch.empty((len(indices), 3, size, size), dtype=torch.uint8)
    for start in range(0, len(indices), _CHUNK):
        part = slice(start, start + _CHUNK)
        images[part] = _render_chunk(indices[part], labels[part], seed, size)
    return images, labels


# The dataset --------------------------------------------------------------------------------------


@datasets.register("procedural", paper="-")
class Procedural(Dataset):
    """Embedded set of objects on textured scenes: ten classes, no download, never ranked.

    It has one split, ``stream``; image i of it is `render` of index i.
    """

    task = Classification(CLASS_NAMES)
    shown = True

    def size(self, split: str) -> int:
        """Returns the number of indices; see `Dataset.size`."""
        self._check(split)
        return INDEX_LIMIT

    def load(self, split: str, start: int, count: int) -> ImageSet:
        """Renders images ``start`` to ``start + count``; see `Dataset.load`."""
        self._check(split)
        chunks = []
        with progress.task("Rendering procedural images", total=count) as task:
            for index in torch.split(torch.arange(start, start + count), _CHUNK):
                chunks.append(render(index, seed=0, size=self.image_size))
                task.advance(len(index))
        pixels, labels = zip(*chunks, strict=True)
        return ImageSet(torch.cat(pixels), torch.cat(labels))

    def _check(self, split: str) -> None:
        if split != "stream" or self.image_size not in SIZES:
            raise DataError(
                f"the procedural set has one split, 'stream', of {SIZES[0]} or {SIZES[1]} pixels; "
                f"the protocol asks for {split!r} of {self.image_size}."
            )
