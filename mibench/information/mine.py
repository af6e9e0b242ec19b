"""A lower bound of the mutual information, learned by a network that tells pairs from strangers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mibench import seeding
from mibench.artifacts import Checkpoint
from mibench.defenses.base import Shares
from mibench.information.base import Amounts, Measure, Messages, Reading, View, nothing
from mibench.information.intervals import over_seeds
from mibench.information.quantised import Quantiser
from mibench.protocol import Recipe
from mibench.registry import measures
from mibench.training import Judging, Losses, Step, optimise, shuffled_batch

FEATURES = 128
"""Length of the two vectors whose product is the statistic."""
CHANNELS = 32
"""Of the maps inside the network."""
WIDTH = 64
"""Of its tokens; vectors have twice as many values."""
SIDE = 4
"""Maps are pooled to this side before the last layer."""
PLACES = 16
"""Tokens are pooled to so many."""
RATE = 0.05
"""Of the moving average that stands in the gradient's denominator."""
LEAST = {"auxiliary": 16, "validation": 8}
"""Fewest images; with fewer there is nothing to learn or too few strangers."""
SHARPNESS = tuple(step / 20 for step in range(21))
"""Factors of T among which the held-back images choose."""
HEAT = 10.0
"""Of T at the start."""
JUDGED = 5
"""Judgements in the course of a training."""
CHUNK = 256


@measures.register("mine", paper="Belghazi et al., ICML 2018, arXiv 1801.04062")
class Mine(Measure):
    """Donsker-Varadhan bound with an unbounded statistics network, on images it has not seen.

    I(x; z) >= E_p(x,z) T(x, z) - log E_p(x)p(z) exp T(x, z). T learns on auxiliary images by the
    gradient with a moving average,

        grad = E_p(x,z) grad T - E_p(x)p(z)[exp(T) grad T] / ema(E_p(x)p(z) exp T),

    whose bias falls with the average's rate. The value is the bound on validation images, its mean
    over several seeds of network and training, with Student's interval over the seeds. Auxiliary
    images that were held back choose the step of a training that is used, and a factor from 0 to 1
    of T: a T that is too sure of itself gives far too low a bound, and any multiple of it is a
    statistic as well.

    The shares are rounded to 8 bits, in the range of the auxiliary images: between an image and
    the unrounded message of a deterministic client the information is infinite. So the number is
    that of a client that sends bytes, at most 8 log 2 nats for each value.

    Ours: T(x, z) = t cos(a(x), b(z)), with a factor t that is learned and has no bound, and small
    convolutional networks pooled to 4 x 4 places, so T does not see all; a weaker T only lowers the
    bound. This form gives all n (n - 1) pairs of strangers of a batch for the price of n, where the
    paper takes one permutation. With a plain product instead of the cosine, single
    strangers of great length rule the second term, and seeds differ by several nats.

    How it fails. It is a lower bound: a low value can mean a weak network. It has a large variance,
    since the second term is ruled by the few strangers that look most like pairs. No estimate from
    N pairs of strangers can vouch for much more than log N nats (McAllester and Stratos, 2020):
    above that, the number says "at least about log N" and nothing else. Unlike InfoNCE it is not
    capped at log n, nor kept from being below 0 where the network has learned by heart.
    """

    unit = "nats"

    def measure(self, view: View, checkpoint: Checkpoint) -> Reading:
        """Trains once per seed, on the auxiliary images' shares."""
        for role, least in LEAST.items():
            count = len(getattr(view, role))
            if count < least:
                return nothing(f"needs {least} {role} images, and there are {count}")
        quantiser = Quantiser.of(view.auxiliary.shares)
        found = []
        for number in range(view.amounts.seeds):
            seed = seeding.derive(view.seed, "mine", number)
            part = checkpoint.part(str(number))
            critic = learn(view.auxiliary, quantiser, view.amounts, seed, part, view.device)
            found.append(donsker_varadhan(statistics(critic, view.validation, quantiser)))
        n = len(view.validation)
        trusted = math.log(n * (n - 1))
        estimate = over_seeds(found, n)
        source = f"shares in 8 bits, T learned on {len(view.auxiliary):,} auxiliary images"
        if estimate.value is not None and estimate.value > trusted:
            source += f"; {n * (n - 1):,} strangers cannot vouch for more than {trusted:.1f} nats"
        return Reading(
            estimate,
            source,
            {
                "per_seed": list(found),
                "log_strangers": trusted,
                "quantisation_step": list(quantiser.step),
                "steps": view.amounts.steps,
                "learned_on": len(view.auxiliary),
            },
        )


class Critic(nn.Module):
    """The statistics network T(x, z) = t cos(a(x), b(z)); t is learned and has no bound.

    Args:
        examples: sizes and scale of its inputs are taken from these.
    """

    log_mean: Tensor
    sharpness: Tensor

    def __init__(self, examples: Messages) -> None:
        super().__init__()
        self.image = Encoder(examples.images)
        self.shares = nn.ModuleList(Encoder(share) for share in examples.shares)
        self.heat = nn.Parameter(torch.tensor(math.log(HEAT)))
        # Of exp T over strangers; the start is that of T = 0.
        self.register_buffer("log_mean", torch.zeros(()))
        self.register_buffer("sharpness", torch.ones(()))

    def forward(self, images: Tensor, shares: Shares) -> Tensor:
        """Images (n, ...) and shares (m, ...) → T of each with each, (n, m)."""
        a = self.image(images)
        b = torch.stack([net(share) for net, share in zip(self.shares, shares, strict=True)]).sum(0)
        cosine: Tensor = nn.functional.normalize(a) @ nn.functional.normalize(b).T
        return self.sharpness * self.heat.exp() * cosine


class Encoder(nn.Module):
    """Maps (C, h, w), tokens (N, D) or vectors (D) → FEATURES values.

    Args:
        examples: (n, ...), whose mean and deviation, per channel, its inputs are standardised by.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, examples: Tensor) -> None:
        super().__init__()
        axes = {4: [0, 2, 3], 3: [0, 1]}.get(examples.ndim, [0])
        deviation, mean = torch.std_mean(examples, axes, correction=0, keepdim=True)
        self.register_buffer("mean", mean)
        # A channel that never changes says nothing.
        self.register_buffer("deviation", torch.where(deviation > 0, deviation, 1.0))
        inputs = examples.shape[1]
        if examples.ndim == 4:
            layers: list[nn.Module] = [
                nn.Conv2d(inputs, CHANNELS, 3, 2, 1),
                nn.GELU(),
                nn.Conv2d(CHANNELS, CHANNELS, 3, 2, 1),
                nn.GELU(),
                nn.AdaptiveAvgPool2d(SIDE),
                nn.Flatten(),
                nn.Linear(CHANNELS * SIDE * SIDE, FEATURES),
            ]
        elif examples.ndim == 3:
            layers = [
                nn.Linear(examples.shape[2], WIDTH),
                nn.GELU(),
                _Pooled(),
                nn.Flatten(),
                nn.Linear(WIDTH * PLACES, FEATURES),
            ]
        else:
            layers = [
                nn.Flatten(),
                nn.Linear(examples[0].numel(), 2 * WIDTH),
                nn.GELU(),
                nn.Linear(2 * WIDTH, 2 * WIDTH),
                nn.GELU(),
                nn.Linear(2 * WIDTH, FEATURES),
            ]
        self.network = nn.Sequential(*layers)

    def forward(self, values: Tensor) -> Tensor:
        """Returns (n, FEATURES)."""
        found: Tensor = self.network((values - self.mean) / self.deviation)
        return found


class _Pooled(nn.Module):
    """Tokens (B, N, D) → (B, PLACES, D), means of neighbours."""

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool1d(tokens.transpose(1, 2), PLACES).transpose(1, 2)


def learn(
    messages: Messages,
    quantiser: Quantiser,
    amounts: Amounts,
    seed: int,
    checkpoint: Checkpoint,
    device: torch.device,
) -> Critic:
    """Trains a statistics network; an eighth of the images chooses the step that is kept."""
    held = max(2, len(messages) // 8)
    order = torch.randperm(len(messages), generator=seeding.generator(seed, "held back"))
    judges, pupils = messages.at(order[:held]), order[held:]
    with seeding.stream(seed, "weights"):
        critic = Critic(messages).to(device)

    def losses(step: Step) -> Losses:
        at = pupils[shuffled_batch(len(pupils), amounts.batch, seed, step.index)]
        some = messages.at(at)
        shares = _on(device, quantiser.rounded(some.shares))
        return {"bound": surrogate(critic, critic(some.images.to(device), shares))}

    def error(judged: nn.Module) -> float:
        assert isinstance(judged, Critic)
        return -sharpest(statistics(judged, judges, quantiser))[0]

    recipe = Recipe(
        steps=amounts.steps,
        batch=amounts.batch,
        optimizer="adamw",
        lr=2e-3,
        weight_decay=1e-2,
        clip=1.0,
        precision="fp32",
    )
    optimise(
        critic,
        losses,
        recipe,
        seed=seed,
        checkpoint=checkpoint,
        title="Training the statistics network",
        judging=Judging(error, every=max(1, amounts.steps // JUDGED)),
    )
    critic.sharpness.fill_(sharpest(statistics(critic, judges, quantiser))[1])
    return critic


def surrogate(critic: Critic, table: Tensor) -> Tensor:
    """What is minimised in a step: its gradient is the negative of the one with moving average."""
    log_mean = _strangers(table)
    with torch.no_grad():
        kept, new = critic.log_mean + math.log1p(-RATE), log_mean + math.log(RATE)
        critic.log_mean.copy_(torch.logaddexp(kept, new))
    return (log_mean - critic.log_mean).exp() - table.diag().mean()


@torch.no_grad()
def statistics(critic: Critic, messages: Messages, quantiser: Quantiser) -> Tensor:
    """T of every image with every message, (n, n) in double precision on the CPU."""
    device = critic.log_mean.device
    rows = torch.split(torch.arange(len(messages)), CHUNK)
    shares = [quantiser.rounded(messages.at(at).shares) for at in rows]
    tables = [
        torch.cat([critic(messages.images[at].to(device), _on(device, some)) for some in shares], 1)
        for at in rows
    ]
    return torch.cat(tables).double().cpu()


def donsker_varadhan(table: Tensor) -> float:
    """The bound in nats: mean T of pairs, less the logarithm of the mean exp T of strangers.

    Args:
        table: T (n, n), pairs on the diagonal.
    """
    return float(table.diag().mean() - _strangers(table))


def sharpest(table: Tensor) -> tuple[float, float]:
    """The highest bound of a multiple of T, and the factor; at least 0, by the factor 0."""
    return max((donsker_varadhan(factor * table), factor) for factor in SHARPNESS)


def _strangers(table: Tensor) -> Tensor:
    """Logarithm of the mean of exp T off the diagonal."""
    n = len(table)
    same = torch.eye(n, dtype=torch.bool, device=table.device)
    return table.masked_fill(same, -torch.inf).flatten().logsumexp(0) - math.log(n * (n - 1))


def _on(device: torch.device, shares: Shares) -> Shares:
    return tuple(share.to(device) for share in shares)
