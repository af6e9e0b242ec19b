"""Vision transformers of timm: tiny, small, and one that a CPU can train."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mibench.backbones.base import Backbone, Normalise
from mibench.backbones.pretrained import network, normalisation
from mibench.backbones.transformer import token_branch
from mibench.errors import InvalidParamsError
from mibench.registry import backbones

SMALL_IMAGE = 64
"""Largest side in pixels at which about 8x8 tokens are meant; above it 14x14, as at 224 pixels."""
FEWEST = 4
"""Tokens a side below which no patch is chosen by itself."""


class Embed(nn.Module):
    """Patches to tokens, position embeddings added, the class token (if there is one) in front."""

    def __init__(self, normalise: Normalise, net: Any) -> None:
        super().__init__()
        self.normalise = normalise
        self.patches = net.patch_embed
        self.class_token = net.cls_token
        self.positions = net.pos_embed

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] → tokens (B, N, D)."""
        tokens: Tensor = self.patches(self.normalise(images))
        if self.class_token is not None:
            tokens = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], dim=1)
        placed: Tensor = tokens + self.positions
        return placed


class Pool(nn.Module):
    """The class token, or the mean of all tokens."""

    def __init__(self, pool: Literal["token", "avg"]) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) → (B, D)."""
        return tokens[:, 0] if self.pool == "token" else tokens.mean(1)


class VisionTransformer(Backbone):
    """A vision transformer of timm; its features are tokens (N, D)."""

    arch: ClassVar[str]

    class Params(Backbone.Params):
        """Size of a patch, and how tokens become one vector."""

        patch: int | None = Field(
            default=None,
            gt=0,
            description="side of a patch in pixels; null: about 8x8 tokens up to 64 pixels, 14x14 "
            "above (4 at 32 pixels, 8 at 64, 16 at 224)",
        )
        pool: Literal["token", "avg"] = Field(
            default="token", description="classify from a class token, or the mean without one"
        )

    params: Params

    @property
    def prefix_tokens(self) -> int:
        """1 with a class token."""
        return int(self.params.pool == "token")

    def stages(self) -> dict[str, nn.Module]:
        """Builds ``embed``, ``block1`` to the last block, and ``head`` from timm's model."""
        net = self.network(
            img_size=self.image_shape[-1],
            patch_size=self._patch(),
            global_pool=self.params.pool,
            class_token=self.params.pool == "token",
            # The norm stays before the pooling, where published weights have it.
            fc_norm=False,
        )
        blocks = {f"block{index}": block for index, block in enumerate(net.blocks, 1)}
        return {
            "embed": Embed(normalisation(self.arch), net),
            **blocks,
            "head": nn.Sequential(net.norm, Pool(self.params.pool), net.head),
        }

    def network(self, **options: Any) -> Any:
        """Builds timm's model of this member of the family."""
        return network(self.arch, self.classes, pretrained=False, **options)

    def branch(self, share_shape: tuple[int, ...], outputs: int, width: int) -> nn.Module:
        """Builds a small transformer; see `token_branch`."""
        return token_branch(share_shape, outputs, width)

    def _patch(self) -> int:
        size, patch = self.image_shape[-1], self.params.patch
        divisors = [one for one in range(1, size + 1) if size % one == 0]
        fitting = f"choose one of {', '.join(map(str, divisors))}"
        if patch is None:
            wanted = 8 if size <= SMALL_IMAGE else 14
            # Of two that are equally far, the one with fewer tokens is cheaper.
            patch = min(divisors, key=lambda one: (abs(size // one - wanted), -one))
            if size // patch < FEWEST:
                raise InvalidParamsError(
                    f"backbone {self.name}: no patch cuts images of {size} pixels into about "
                    f"{wanted}x{wanted} tokens; set 'patch' ({fitting}) or take another image size."
                )
        if size % patch:
            raise InvalidParamsError(
                f"backbone {self.name}.patch: given {patch}, which does not divide images of "
                f"{size} pixels; {fitting}."
            )
        return patch


class Published(VisionTransformer):
    """A vision transformer that has published weights."""

    class Params(VisionTransformer.Params):
        """Whose weights."""

        pretrained: bool = Field(
            default=False,
            description="ImageNet weights; patches and positions are resampled to the image size",
        )

    params: Params

    def network(self, **options: Any) -> Any:
        """Builds timm's model, with published weights if they are asked for."""
        adapt = None if self.prefix_tokens else without_class_token
        return network(
            self.arch, self.classes, pretrained=self.params.pretrained, adapt=adapt, **options
        )


def without_class_token(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leaves the class token and its position out of published weights."""
    kept = {name: weight for name, weight in weights.items() if name != "cls_token"}
    if "pos_embed" in kept:
        kept["pos_embed"] = kept["pos_embed"][:, 1:]
    return kept


@backbones.register("vit-tiny", paper="Dosovitskiy et al., arXiv 2010.11929; 2106.10270")
class ViTTiny(Published):
    """timm's ViT-Ti: width 192, 12 blocks, 3 heads.

    Split points: ``embed``, ``block1`` to ``block12``, each (N, 192) with N = (H / patch)^2 tokens
    and one more in front, the class token, unless ``pool`` is ``avg``.
    """

    arch = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


@backbones.register("vit-small", paper="Dosovitskiy et al., arXiv 2010.11929; 2106.10270")
class ViTSmall(Published):
    """timm's ViT-S: width 384, 12 blocks, 6 heads.

    Split points: ``embed``, ``block1`` to ``block12``, each (N, 384) with N = (H / patch)^2 tokens
    and one more in front, the class token, unless ``pool`` is ``avg``.
    """

    arch = "vit_small_patch16_224.augreg_in21k_ft_in1k"


@backbones.register("small-vit", paper="after Dosovitskiy et al., arXiv 2010.11929")
class SmallViT(VisionTransformer):
    """A vision transformer for protocols that two CPU cores can train.

    Split points: ``embed``, ``block1`` to ``block4`` (as many as ``depth``), each (N, width) with
    N = (H / patch)^2 tokens and one more in front, the class token, unless ``pool`` is ``avg``.
    """

    arch = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"

    class Params(VisionTransformer.Params):
        """Size of the network."""

        width: int = Field(default=128, gt=0, description="length of a token")
        depth: int = Field(default=4, gt=0, description="number of blocks")
        heads: int = Field(default=4, gt=0, description="attention heads; they divide the width")

        @model_validator(mode="after")
        def _divisible(self) -> SmallViT.Params:
            if self.width % self.heads:
                raise ValueError(f"{self.heads} heads do not divide the width {self.width}")
            return self

    params: Params

    def network(self, **options: Any) -> Any:
        """Builds timm's model in its own size."""
        own = self.params
        size = {"embed_dim": own.width, "depth": own.depth, "num_heads": own.heads}
        return super().network(**size, **options)
