"""Linear inversion: the cheapest attack, a ridge regression from shares to pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mibench import progress, seeding
from mibench.artifacts import Checkpoint
from mibench.attacks.base import Attack, Workshop
from mibench.attacks.budget import images_at_once
from mibench.attacks.ridge import Equations, Reader, Solution, shrink
from mibench.data.sets import ImageSet
from mibench.defenses.base import Shares
from mibench.files import Json
from mibench.registry import attacks
from mibench.threat import Knowledge, Target, mean_transmission

SIDE = 64
"""Larger images are rebuilt at this size and enlarged."""
HELD = 2**27
"""Values of shares and images that the attack holds at once."""
READ = 2**31
"""Values of shares that the attack reads of the auxiliary images, and of the validation images."""
JUDGES = 1024
"""Validation images, at most."""


@attacks.register("linear", knowledge="black_box")
class Linear(Attack):
    """min_{W,b} sum_i |W s(z_i) + b - x_i|^2 + a |W|^2: ridge regression, in closed form.

    The cheap floor that every attack must beat. The sum goes over the first auxiliary images;
    s standardises each value of the shares and projects messages of more than `ridge.MAX_INPUTS`
    values at random to that length; a is chosen on validation images, from a grid relative to the
    mean variance of the inputs. Repeated transmissions are averaged, which is all that a linear
    reader can use. Answers are clipped to [0, 1].

    Time and memory are bounded for large images: those with more than `SIDE` pixels a side are
    averaged down to it, predicted there and enlarged bilinearly, shares are held `HELD` values at
    a time, and of long messages fewer images are read, see `READ`.
    """

    knowledge = Knowledge.BLACK_BOX

    class Params(Attack.Params):
        """Number of images and grid of the penalty."""

        images: int = Field(default=8192, gt=0, description="auxiliary images, at most")
        penalties: tuple[Annotated[float, Field(gt=0)], ...] = Field(
            default=(1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0), min_length=1, description="grid of a"
        )

    params: Params

    def __init__(self, params: Params, workshop: Workshop) -> None:
        super().__init__(params, workshop)
        self._servers = 1
        self._reader: Reader | None = None
        self._solution: Solution | None = None
        self._facts: dict[str, Json] = {}

    def prepare(self, target: Target, auxiliary: ImageSet, validation: ImageSet) -> None:
        """Solves for every penalty and keeps the best, or takes the solution from the cache."""
        shop, self._servers = self.workshop, len(target.adversary.corrupted)
        draws = seeding.derive(shop.seed, "linear")

        def make(_: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Json]]:
            with seeding.stream(shop.seed, "linear queries"):
                return self._solve(target, auxiliary, validation, draws)

        spec = self.spec_of(target, auxiliary, validation)
        kept = shop.keep("linear", spec, make)
        found = {name: tensor.to(shop.device) for name, tensor in kept.tensors.items()}
        self._reader = Reader(found.pop("mean"), found.pop("std"), draws)
        self._solution = Solution(**found)
        self._facts = kept.facts
        if not self._facts["learned"]:
            progress.note(
                "attack linear: on validation images the shares tell a linear reader no more than "
                "the mean auxiliary image does (too few auxiliary images, or shares that are "
                "constant or not linear in the pixels)"
            )

    @torch.no_grad()
    def reconstruct(self, shares: Shares) -> Tensor:
        """One multiplication per image."""
        assert self._reader is not None, "prepare() comes first"
        read = mean_transmission(shares, self._servers)
        size = max(1, HELD // _length(read))
        parts = [
            self._images(self._reader(tuple(share[start : start + size] for share in read)))
            for start in range(0, len(read[0]), size)
        ]
        return torch.cat(parts)

    def facts(self) -> dict[str, Json]:
        """Penalty, validation error, and that of each penalty at the size of the regression."""
        return self._facts

    @torch.no_grad()
    def _solve(
        self, target: Target, auxiliary: ImageSet, validation: ImageSet, draws: int
    ) -> tuple[dict[str, Tensor], dict[str, Json]]:
        shop = self.workshop
        one = target.query(auxiliary.take(1).images().to(shop.device))
        example = mean_transmission(one, self._servers)
        affordable = max(1, READ // _length(example))
        learn = auxiliary.take(min(self.params.images, affordable))
        judge = validation.take(min(JUDGES, affordable))
        reader = Reader.of((shares for shares, _ in self._sent(target, learn)), draws)
        equations = Equations()
        with progress.task("Solving linear", total=len(learn) + len(judge)) as task:
            for shares, images in self._sent(target, learn):
                equations.add(reader(shares), shrink(images, SIDE).flatten(1))
                task.advance(len(images))
            inputs, outputs = [], []
            for shares, images in self._sent(target, judge):
                inputs.append(reader(shares))
                outputs.append(shrink(images, SIDE).flatten(1))
                task.advance(len(images))
        seen, wanted = torch.cat(inputs), torch.cat(outputs)
        errors = {a: equations.solve(a).error(seen, wanted) for a in self.params.penalties}
        best = min(errors, key=errors.__getitem__)
        self._solution = equations.solve(best)
        blind = (self._solution.offset - wanted).square().mean().item()
        few, total = images_at_once(shop.image_shape), 0.0
        for images, rows in zip(judge.chunks(few), torch.split(seen, few), strict=True):
            missed = self._images(rows) - images.to(shop.device)
            total += missed.square().flatten(1).mean(1).sum().item()
        facts: dict[str, Json] = {
            "penalty": best,
            "validation_mse": total / len(judge),
            "validation_errors": {f"{a:g}": error for a, error in errors.items()},
            "mean_image_error": blind,
            "learned": errors[best] < blind,
            "images": len(learn),
        }
        return {"mean": reader.mean, "std": reader.std, **self._solution._asdict()}, facts

    def _sent(self, target: Target, images: ImageSet) -> Iterator[tuple[Shares, Tensor]]:
        """Yields shares with their images: queried in small parts, handed out in large ones.

        A projection is drawn anew for every part, hence large ones.
        """
        few = images_at_once(self.workshop.image_shape)
        waiting: list[tuple[Shares, Tensor]] = []
        for some in images.chunks(few):
            there = some.to(self.workshop.device)
            sent = mean_transmission(target.query(there), self._servers)
            waiting.append((sent, there))
            values = there.numel() + sum(share.numel() for share in sent)
            if values * (len(waiting) + 1) > HELD:
                yield _joined(waiting)
                waiting = []
        if waiting:
            yield _joined(waiting)

    def _images(self, inputs: Tensor) -> Tensor:
        """Inputs of the regression (B, n) → images (B, 3, H, W)."""
        assert self._solution is not None
        channels, height, width = self.workshop.image_shape
        small = self._solution(inputs).view(-1, channels, min(height, SIDE), min(width, SIDE))
        if small.shape[2:] == (height, width):
            return small
        return F.interpolate(small, size=(height, width), mode="bilinear")


def _length(shares: Shares) -> int:
    """Values that are sent for one image."""
    return sum(share[0].numel() for share in shares)


def _joined(parts: Sequence[tuple[Shares, Tensor]]) -> tuple[Shares, Tensor]:
    shares = (torch.cat(same) for same in zip(*(shares for shares, _ in parts), strict=True))
    return tuple(shares), torch.cat([images for _, images in parts])
