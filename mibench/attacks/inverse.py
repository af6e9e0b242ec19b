"""The decoder's network: shares of any layout → image."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mibench.defenses.base import Shares

LARGEST_SIZE = 64
"""Most positions a side on which the residual blocks work."""
LEAST_SIDE = 4
"""Maps and token grids with fewer positions a side are read as vectors: they hardly have places."""
ENLARGED = 2
"""Maps up to so many times coarser than the blocks are enlarged by repetition, not unfolded."""
VECTOR_SIDE = 8
"""Side of the map that a vector becomes."""


COARSEST = 16
"""Most positions a side of the coarse level, where every position attends to every other one."""
HEADS = 4
"""Heads of the attention."""


@dataclass(frozen=True)
class Size:
    """The size of everything but the entries, whatever the shares are.

    Attributes:
        width: channels of the residual blocks, and of what the entries hand on.
        blocks: residual blocks, and as many again behind the coarse level if there is one.
        coarse_width: channels of the coarse level; 0: there is none.
        coarse_blocks: residual blocks of the coarse level, each with a self-attention.
    """

    width: int
    blocks: int
    coarse_width: int = 0
    coarse_blocks: int = 0


SIZES = {"small": Size(64, 3), "large": Size(128, 3, coarse_width=256, coarse_blocks=3)}
"""0.23 M and 6.4 M parameters for images of 32 pixels; the entries come on top."""


class InverseNetwork(nn.Module):
    """Shares → image: an entry per share, residual blocks at a reduced size, pixel shuffle.

    The blocks work at half of the image's size, and at a quarter and so on where half is more than
    `LARGEST_SIZE`. An entry hands on ``width`` values per position, several times those of the
    pixels that the position stands for.

    Args:
        share_shapes: shape of each share without the batch axis: maps (C, h, w), tokens (N, D), or
            anything else, which is read as one vector.
        image_shape: (3, H, W).
        size: width and number of blocks, and the coarse level.
    """

    def __init__(
        self,
        share_shapes: list[tuple[int, ...]],
        image_shape: tuple[int, int, int],
        size: Size,
    ) -> None:
        super().__init__()
        channels, self.height, self.width = image_shape
        side, self.factor = max(self.height, self.width), 2
        # Powers of two: with them, patches of a vision transformer become whole positions.
        while math.ceil(side / self.factor) > LARGEST_SIZE:
            self.factor *= 2
        places = math.ceil(side / self.factor)
        self.entries = nn.ModuleList(entry(shape, size.width, places) for shape in share_shapes)
        self.blocks = nn.Sequential(*body(size, places))
        outputs = self.factor**2 * channels
        self.exit = nn.Conv2d(size.width, outputs, 3, padding=1, padding_mode="replicate")

    @torch.no_grad()
    def standardise(self, batches: Iterable[Shares]) -> None:
        """Sets mean and deviation of each input from batches of shares."""
        found: list[list[Moments]] = [[] for _ in self.entries]
        for shares in batches:
            for place, (reader, share) in enumerate(zip(self.entries, shares, strict=True)):
                assert isinstance(reader, ShareEntry)
                found[place].append(reader.moments(share))
        for reader, moments in zip(self.entries, found, strict=True):
            assert isinstance(reader, ShareEntry)
            reader.standardise(moments)

    def forward(self, shares: Shares) -> Tensor:
        """Returns images (B, 3, H, W) in [0, 1]."""
        entered = [reader(share) for reader, share in zip(self.entries, shares, strict=True)]
        features = self.blocks(torch.stack(entered).sum(0))
        images = F.pixel_shuffle(self.exit(features), self.factor).sigmoid()
        return images[..., : self.height, : self.width]


Moments = tuple[int, Tensor, Tensor]
"""Images, and mean and deviation of each channel (C,), float64 on the CPU."""


class ShareEntry(nn.Module, ABC):
    """Standardises one share channel by channel and brings it to (B, width, size, size).

    Args:
        channels: channels of the share; a vector has one per value.
        axes: further axes behind the channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, axes: int) -> None:
        super().__init__()
        shape = (channels, *(1,) * axes)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    def arrange(self, share: Tensor) -> Tensor:
        """Brings the channels to axis 1."""
        return share

    @abstractmethod
    def place(self, values: Tensor) -> Tensor:
        """Standardised values → (B, width, size, size)."""

    def moments(self, share: Tensor) -> Moments:
        """Returns what a batch of this share tells of its scale."""
        values = self.arrange(share)
        axes = [0, *range(2, values.ndim)]
        # A single value has no deviation of its own.
        std = values.std(axes, correction=int(len(share) > 1))
        return len(share), values.mean(axes).cpu().double(), std.cpu().double()

    def standardise(self, moments: list[Moments]) -> None:
        """Sets mean and deviation from all batches together."""
        total = sum(count for count, _, _ in moments)
        mean = torch.stack([count / total * mean for count, mean, _ in moments]).sum(0)
        parts = [count / total * (std**2 + (m - mean) ** 2) for count, m, std in moments]
        self.mean.copy_(mean.view_as(self.mean))
        # A dead channel must not be blown up; it carries nothing.
        std = torch.stack(parts).sum(0).sqrt().clamp_min(1e-4)
        self.std.copy_(std.view_as(self.std))

    def forward(self, share: Tensor) -> Tensor:
        """Returns features (B, width, size, size)."""
        return self.place((self.arrange(share) - self.mean) / self.std)


class MapEntry(ShareEntry):
    """Maps (C, h, w), see `Placement`."""

    def __init__(self, shape: tuple[int, ...], width: int, size: int) -> None:
        super().__init__(shape[0], axes=2)
        self.placement = Placement(shape[0], max(shape[1:]), width, size, enlarged=ENLARGED)

    def place(self, values: Tensor) -> Tensor:
        """(B, C, h, w) → (B, width, size, size)."""
        placed: Tensor = self.placement(values)
        return placed


class TokenEntry(ShareEntry):
    """Tokens (N, D): mixed onto a grid of g x g, where they are a map; see `Placement`.

    The mixing is learned. It starts as what fits most backbones: N = g^2 tokens are the grid in
    reading order, up to g more are class tokens in front of it, told to every place, and fewer are
    laid out along it.
    """

    def __init__(self, shape: tuple[int, ...], width: int, size: int) -> None:
        super().__init__(shape[1], axes=1)
        count, self.side = shape[0], grid_side(shape[0])
        places = self.side**2
        extra = max(0, count - places)
        mixing = torch.zeros(places, count)
        mixing[:, :extra] = 1 / self.side
        at = torch.arange(places)
        mixing[at, extra + at * (count - extra) // places] = 1
        self.mixing = nn.Parameter(mixing)
        self.placement = Placement(shape[1], self.side, width, size)

    def arrange(self, share: Tensor) -> Tensor:
        """(B, N, D) → (B, D, N)."""
        return share.transpose(1, 2)

    def place(self, values: Tensor) -> Tensor:
        """(B, D, N) → (B, width, size, size)."""
        grid = (values @ self.mixing.T).reshape(*values.shape[:2], self.side, self.side)
        placed: Tensor = self.placement(grid)
        return placed


class VectorEntry(ShareEntry):
    """Anything else: one linear layer to a map of 8 x 8, enlarged."""

    def __init__(self, shape: tuple[int, ...], width: int, size: int) -> None:
        values = math.prod(shape)
        super().__init__(values, axes=0)
        self.size = size
        self.layer = nn.Linear(values, width * VECTOR_SIDE**2)

    def arrange(self, share: Tensor) -> Tensor:
        """(B, ...) → (B, n)."""
        return share.flatten(1)

    def place(self, values: Tensor) -> Tensor:
        """(B, n) → (B, width, size, size)."""
        out = self.layer(values).unflatten(1, (-1, VECTOR_SIDE, VECTOR_SIDE))
        return F.interpolate(out, size=(self.size, self.size), mode="nearest")


class Placement(nn.Module):
    """Maps (B, C, h, h) → (B, width, size, size) by one convolution, without loss of place.

    A map with more positions a side than ``size`` is folded, never pooled: pooling would throw away
    what it leaks. Each position of a coarser one is unfolded into the positions that it covers,
    since it holds their content in its channels.

    Args:
        channels: C.
        side: h.
        width: channels behind it.
        size: positions a side behind it.
        enlarged: maps up to so many times coarser are enlarged by repetition instead.
    """

    def __init__(self, channels: int, side: int, width: int, size: int, enlarged: int = 1) -> None:
        super().__init__()
        self.size = size
        self.fold = max(1, math.ceil(side / size))
        coarser = math.ceil(size / math.ceil(side / self.fold))
        self.unfold = coarser if coarser > enlarged else 1
        inputs, outputs = channels * self.fold**2, width * self.unfold**2
        self.layer = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        """Returns (B, width, size, size)."""
        maps = F.pad(maps, (0, -maps.shape[3] % self.fold, 0, -maps.shape[2] % self.fold))
        out = F.pixel_shuffle(self.layer(F.pixel_unshuffle(maps, self.fold)), self.unfold)
        if out.shape[2] > self.size or out.shape[3] > self.size:
            return F.adaptive_avg_pool2d(out, self.size)
        return F.interpolate(out, size=(self.size, self.size), mode="nearest")


class ConvBlock(nn.Module):
    """Residual block without normalisation: x + conv(relu(conv(relu(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape."""
        out: Tensor = self.conv2(F.relu(self.conv1(F.relu(x))))
        return x + out


class CoarseLevel(nn.Module):
    """x + up(blocks(down(x))): residual blocks and self-attention at a fraction of the size.

    Squares of positions are folded into channels and unfolded behind the blocks; what is too fine
    for this level goes past it.

    Args:
        size: see `Size`.
        places: positions a side of x; halved until at most `COARSEST` are left, once at least.
    """

    def __init__(self, size: Size, places: int) -> None:
        super().__init__()
        self.fold = 2
        while math.ceil(places / self.fold) > COARSEST:
            self.fold *= 2
        folded = size.width * self.fold**2
        self.down = nn.Conv2d(folded, size.coarse_width, 1)
        self.blocks = nn.Sequential()
        for _ in range(size.coarse_blocks):
            self.blocks.append(ConvBlock(size.coarse_width)).append(Attention(size.coarse_width))
        self.up = nn.Conv2d(size.coarse_width, folded, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape (B, width, places, places)."""
        height, width = x.shape[2:]
        padded = F.pad(x, (0, -width % self.fold, 0, -height % self.fold))
        coarse = self.blocks(self.down(F.pixel_unshuffle(padded, self.fold)))
        return x + F.pixel_shuffle(self.up(coarse), self.fold)[..., :height, :width]


class Attention(nn.Module):
    """Self-attention of all positions: x + out(softmax(q k^T / sqrt(d)) v), x normalised before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        # Without biases: one of the keys would cancel in the softmax and never learn.
        self.qkv = nn.Conv2d(width, 3 * width, 1, bias=False)
        self.out = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape (B, width, h, w)."""
        heads = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3 * HEADS, -1)).transpose(2, 3)
        attended = F.scaled_dot_product_attention(*heads.chunk(3, dim=1))
        out: Tensor = self.out(attended.transpose(2, 3).reshape(x.shape))
        return x + out


def body(size: Size, places: int) -> list[nn.Module]:
    """Returns what lies between entries and exit, see `Size`.

    Args:
        size: widths and numbers of blocks.
        places: positions a side.
    """

    def fine() -> list[nn.Module]:
        return [ConvBlock(size.width) for _ in range(size.blocks)]

    if not size.coarse_blocks:
        return fine()
    return [*fine(), CoarseLevel(size, places), *fine()]


def entry(shape: tuple[int, ...], width: int, size: int) -> ShareEntry:
    """Returns the entry that fits a share of this shape, see `InverseNetwork`."""
    if len(shape) == 3 and shape[-1] >= LEAST_SIDE:
        return MapEntry(shape, width, size)
    if len(shape) == 2 and grid_side(shape[0]) >= LEAST_SIDE:
        return TokenEntry(shape, width, size)
    return VectorEntry(shape, width, size)


def grid_side(count: int) -> int:
    """Side of the square grid that ``count`` tokens are nearest to, at least 1."""
    return max(1, round(math.sqrt(count)))
