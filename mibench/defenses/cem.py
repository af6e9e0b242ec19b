"""CEM: conditional entropy maximisation by clusters that shrink towards the noise floor."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mibench.backbones.base import Split
from mibench.data.sets import ImageSet
from mibench.defenses.base import Defense, Facts, Shares
from mibench.defenses.parts.layers import pointwise
from mibench.registry import defenses
from mibench.task import Classification
from mibench.training import Losses, Step

OFFSET = 0.01
"""g: added to a variance before its logarithm."""
TAU = 0.125
"""Share of the noise's variance below which a cluster is small enough."""
PULL, MOST = 10.0, 0.99
"""How much of a cluster's variance is that of the batch."""
IMAGES = 4096
"""Training images that are clustered, at most."""
VALUES = 2**25
"""Values of messages that are held while they are clustered, at most."""
LEAST = 8
"""Images that there must be for each further cluster of a class."""
ITERATIONS = 50


@defenses.register(
    "cem", servers="1", randomness="fresh per message", paper="Xia et al., CVPR 2025, 2503.00383"
)
class CEM(Defense):
    """Noise on a narrow message, and clusters of each class that shrink until it covers them.

    An attack's mean squared error per pixel is at least exp(2 H(x|z) / d) / (2 pi e). For a mixture
    of Gaussians plus noise, H(x|z) grows as the variance within its components falls, so

        z = c + sigma e,  c = sigmoid(B f(x)) in (0, 1),  e ~ N(0, I)
        L = CE + lambda L_C,
        L_C = mean_y sum_j w_yj relu(log(v_yj + g) - log(tau sigma^2 + g)),

    with g = 0.01, tau = 0.125. w_yj is the share of class y in its cluster j; v_yj is the mean
    squared distance of the clean messages c of cluster j to its centroid, averaged over their
    values, so that it compares with the variance sigma^2 of one value. It is a mixture a v_batch +
    (1 - a) v_stored with a = min(0.99, 10 n_batch / n_stored), where n counts images of the
    cluster: of this batch, or of when the clusters were found. Only v_batch has a gradient.

    Centroids are found by k-means++ in each class, from clean messages of training images. The
    published code does so each epoch and on all of them; here it is every ``refresh`` steps, on up
    to 4,096 images or 2^25 values. A class gets a further cluster for every 8 images. Where the
    images do not suffice for all classes, each refresh draws classes at random, and L_C is the mean
    over these. A task of attributes has no classes: all images are one, which is ours.

    The published code adds the gradient of L_C to the client with a weight that grows as the
    learning rate falls, about 0.2 to 16. Here lambda is constant and L_C a term of the loss like
    any other; at 1 it is of the order of the task's loss. L_C acts after a share ``warmup`` of the
    training, in the code from the second epoch. B is a linear layer at each place of a map or token
    (vision transformers are not in the paper); a further one widens z in front of the server.
    """

    class Params(Defense.Params):
        """Noise, width of the message, clusters and weight of the term."""

        sigma: float = Field(default=0.1, gt=0, le=10, description="deviation of the noise")
        channels: int = Field(default=8, ge=1, description="channels that are sent")
        strength: float = Field(default=1.0, ge=0, le=1000, description="lambda, weight of L_C")
        clusters: int = Field(default=5, ge=1, le=64, description="clusters of a class, at most")
        refresh: int = Field(default=200, ge=1, description="steps between two clusterings")
        warmup: float = Field(
            default=0.1, ge=0, lt=1, description="share of the training before L_C acts"
        )

    params: Params
    centroids: Tensor  # (S, K, values), S classes of K clusters
    variances: Tensor  # (S, K)
    counts: Tensor  # (S, K) images in each cluster; 0 where there is none
    slots: Tensor  # place of each class among the S, -1 where it is not among them

    def __init__(self, split: Split, params: Params) -> None:
        super().__init__(split, params)
        shape = split.feature_shape
        maps = len(shape) == 3
        sent = (params.channels, *shape[1:]) if maps else (shape[0], params.channels)
        self.bottleneck = nn.Sequential(pointwise(shape, params.channels), nn.Sigmoid())
        self.widen = pointwise(sent, shape[0] if maps else shape[1])
        values, each = math.prod(sent), params.clusters
        classes = split.classes if isinstance(split.task, Classification) else 1
        self.room = max(2, min(IMAGES, VALUES // values))
        clustered = min(classes, max(1, self.room // (each * LEAST)))
        self.register_buffer("centroids", torch.zeros(clustered, each, values))
        self.register_buffer("variances", torch.zeros(clustered, each))
        self.register_buffer("counts", torch.zeros(clustered, each))
        self.register_buffer("slots", torch.full((classes,), -1))

    def predict(self, images: Tensor) -> Shares:
        """Returns the clean message, in (0, 1)."""
        return (self.bottleneck(self.client(images)),)

    def protect(self, images: Tensor) -> Shares:
        """Returns the message with fresh noise."""
        return (self._noisy(*self.predict(images)),)

    def log_likelihood(self, shares: Shares, predicted: Shares) -> Tensor:
        """-|z - c|^2 / 2 sigma^2."""
        residual = shares[0] - predicted[0]
        return -residual.flatten(1).square().sum(1) / (2 * self.params.sigma**2)

    def serve(self, index: int, share: Tensor) -> Tensor:  # noqa: ARG002
        """The server, behind a layer that widens the message."""
        reply: Tensor = self.server(self.widen(share))
        return reply

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> Losses:  # noqa: ARG002
        """The task's loss on what is sent, and lambda L_C once there are clusters."""
        (clean,) = self.predict(images)
        terms = {"task": self.task.loss(self.answer((self._noisy(clean),)), labels)}
        if self.clustered:
            terms["conditional"] = self.params.strength * self.conditional(clean, labels)
        return terms

    def observe(self, train: ImageSet, step: Step) -> None:
        """Finds the clusters anew, every ``refresh`` steps."""
        if not self.params.strength or step.progress < self.params.warmup:
            return
        if step.index % self.params.refresh == 0 or not self.clustered:
            self._cluster(train, step.generator)

    def finish(self, train: ImageSet) -> None:
        """Finds the clusters of the final weights, for `examine`."""
        # Global draws come from the stream of this stage.
        self._cluster(train, torch.default_generator)

    @property
    def clustered(self) -> bool:
        """Says whether there are clusters."""
        return bool(self.counts.any())

    def conditional(self, clean: Tensor, labels: Tensor) -> Tensor:
        """L_C of a batch: scalar, 0 where no cluster's variance exceeds tau sigma^2.

        Args:
            clean: clean messages (B, ...).
            labels: of the task.
        """
        with torch.autocast(clean.device.type, enabled=False):
            slot = self.slots[_classes(labels)]
            known = slot >= 0
            messages, slot = clean.float().flatten(1)[known], slot[known]
            with torch.no_grad():
                apart = (messages[:, None] - self.centroids[slot]).square().mean(2)
                nearest = apart.masked_fill(self.counts[slot] == 0, torch.inf).argmin(1)
            cluster = slot * self.params.clusters + nearest
            distance = (messages - self.centroids.flatten(0, 1)[cluster]).square().mean(1)
            member = F.one_hot(cluster, self.counts.numel()).to(distance)
            seen = member.sum(0)
            now = (distance @ member) / seen.clamp_min(1)
            mixed = (PULL * seen / self.counts.flatten().clamp_min(1)).clamp_max(MOST)
            variance = mixed * now + (1 - mixed) * self.variances.flatten()
            excess = self._margin(variance).relu().view_as(self.counts)
            images = self.counts.sum(1)
            each = (self.counts * excess).sum(1) / images.clamp_min(1)
            return each[images > 0].mean()

    @torch.no_grad()
    def examine(self, images: ImageSet) -> Facts:
        """How far clusters are above the noise floor, and what one message can tell at most.

        Each clean message counts to the nearest centroid c_j, whatever its class. The margin is
        sum_j w_j (log(v_j + g) - log(tau sigma^2 + g)), and the bound

            I(x; z) <= sum_j w_j (-log w_j + 1/2 sum_i log(1 + E_j (c - c_j)_i^2 / sigma^2)),

        which holds for any partition, up to the error of estimating from these images.
        """
        if not self.clustered:
            return {}
        centroids = self.centroids[self.counts > 0]
        count = torch.zeros(len(centroids), device=centroids.device)
        squares = torch.zeros_like(centroids)
        for some in images.chunks():
            messages = self.predict(some.to(centroids.device))[0].flatten(1)
            nearest = _distances(messages, centroids).argmin(1)
            member = F.one_hot(nearest, len(centroids)).float()
            count += member.sum(0)
            squares += member.T @ (messages - centroids[nearest]).square()
        used = count > 0
        weights, moments = count[used] / count.sum(), squares[used] / count[used, None]
        gain = (moments / self.params.sigma**2).log1p().sum(1) / 2
        nats = (weights * (gain - weights.log())).sum().item()
        margin = (weights * self._margin(moments.mean(1))).sum().item()
        return {
            "clusters": int(used.sum()),
            "log_variance_margin": margin,
            "information_nats": nats,
            "information_bits": nats / math.log(2),
        }

    def client_modules(self) -> Iterable[nn.Module]:
        """Stem and bottleneck."""
        return [self.client, self.bottleneck]

    def _noisy(self, clean: Tensor) -> Tensor:
        return clean + self.params.sigma * torch.randn(clean.shape, device=clean.device)

    def _margin(self, variance: Tensor) -> Tensor:
        return (variance + OFFSET).log() - math.log(TAU * self.params.sigma**2 + OFFSET)

    @torch.no_grad()
    def _cluster(self, train: ImageSet, generator: torch.Generator) -> None:
        """Centroids, variances and sizes of the clusters of as many classes as there is room for.

        The images are the first ones of each class, the same every time.
        """
        labels, places = _classes(train.labels), len(self.counts)
        chosen = torch.randperm(len(self.slots), generator=generator)[:places].sort().values
        training = self.training
        self.eval()
        self.slots.fill_(-1)
        self.counts.zero_()
        for place, label in enumerate(chosen.tolist()):
            rows = (labels == label).nonzero().flatten()[: self.room // places]
            if len(rows) < 2:
                continue  # one image has no variance
            self.slots[label] = place
            self._cluster_class(place, self._clean(train.at(rows)), generator)
        self.train(training)

    def _cluster_class(self, place: int, messages: Tensor, generator: torch.Generator) -> None:
        each = max(1, min(self.params.clusters, len(messages) // LEAST))
        centroids = kmeans(messages, each, generator)
        nearest = _distances(messages, centroids).argmin(1)
        distance = (messages - centroids[nearest]).square().mean(1)
        member = F.one_hot(nearest, each).float()
        self.centroids[place, :each] = centroids
        self.counts[place, :each] = member.sum(0)
        self.variances[place, :each] = (distance @ member) / member.sum(0).clamp_min(1)

    def _clean(self, images: ImageSet) -> Tensor:
        """Clean messages (N, values) in full precision, on the model's device."""
        device = self.centroids.device
        with torch.autocast(device.type, enabled=False):
            sent = [self.predict(some.to(device))[0].flatten(1) for some in images.chunks()]
        return torch.cat(sent)


def kmeans(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Centroids (count, d) of points (N, d): k-means++ (Arthur and Vassilvitskii, 2007) and Lloyd.

    Args:
        points: float32, at least one.
        count: at most N; a cluster that lost all its points keeps its centroid.
        generator: CPU generator of the starting points.
    """
    with torch.autocast(points.device.type, enabled=False):
        first = int(torch.randint(len(points), (1,), generator=generator))
        centroids = points[first : first + 1]
        while len(centroids) < count:
            far = _distances(points, centroids).min(1).values.square().cpu()
            # Points that are all alike leave nothing to choose by.
            further = int(torch.multinomial(far.clamp_min(1e-12), 1, generator=generator))
            centroids = torch.cat([centroids, points[further : further + 1]])
        nearest = torch.full((len(points),), -1, device=points.device)
        for _ in range(ITERATIONS):
            before, nearest = nearest, _distances(points, centroids).argmin(1)
            if torch.equal(before, nearest):
                break
            member = F.one_hot(nearest, count).to(points)
            size = member.sum(0)[:, None]
            centroids = torch.where(size > 0, member.T @ points / size.clamp_min(1), centroids)
    return centroids


def _classes(labels: Tensor) -> Tensor:
    """The labels (B,) of a classification; of attributes (B, A), one class for all."""
    return labels if labels.ndim == 1 else labels.new_zeros(len(labels), dtype=torch.int64)


def _distances(points: Tensor, centroids: Tensor) -> Tensor:
    """Euclidean distances (N, count), from differences: exact for points that nearly agree."""
    return torch.cdist(points, centroids, compute_mode="donot_use_mm_for_euclid_dist")
