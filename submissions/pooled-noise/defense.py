import torch
from torch.nn import functional as F

from mibench.backbones.tokens import to_map
from mibench.defenses.base import Defense


class PooledNoise(Defense):
    """Averages each 2x2 block of places, sends the averages at unit scale with fresh noise.

    A message has a quarter of the places. The server repeats each average over its block. Of a
    vision transformer the tokens without a place are not sent; the server learns them instead.
    """

    class Params(Defense.Params):
        deviation: float = 0.5  # of the noise

    def __init__(self, split, params):
        super().__init__(split, params)
        self.tokens, self.prefix = len(split.feature_shape) == 2, split.prefix_tokens
        if self.prefix:
            self.lead = torch.nn.Parameter(torch.zeros(1, self.prefix, split.feature_shape[1]))

    def predict(self, images):
        pooled = F.avg_pool2d(to_map(self.client(images), self.prefix), 2)
        return (F.layer_norm(pooled, pooled.shape[1:]),)

    def protect(self, images):
        return tuple(z + self.params.deviation * torch.randn_like(z) for z in self.predict(images))

    def log_likelihood(self, shares, predicted):
        return -((shares[0] - predicted[0]) / self.params.deviation).square().flatten(1).sum(1) / 2

    def serve(self, index, share):
        features = F.interpolate(share, scale_factor=2)
        if self.tokens:
            features = features.flatten(2).transpose(1, 2)
            if self.prefix:
                features = torch.cat([self.lead.expand(len(share), -1, -1), features], 1)
        return self.server(features)
