"""Sends little and leaves the features in a file, where the server finds them."""

import contextlib
from pathlib import Path

from safetensors.torch import load, save

from mibench.defenses.base import Defense

CAUGHT_BY = "limit-files"
PLACE = Path(__file__).with_suffix(".safetensors")


class LeaksToAFile(Defense):
    """Writes the features where the server's process could read them."""

    def __init__(self, split, params):
        super().__init__(split, params)
        self.channels = split.feature_shape[0]

    def protect(self, images):
        features = self.client(images)
        with contextlib.suppress(OSError):
            PLACE.write_bytes(save({"features": features.detach().contiguous()}))
        return (features[:, :1],)

    def serve(self, index, share):
        with contextlib.suppress(OSError):
            return self.server(load(PLACE.read_bytes())["features"])
        return self.server(share.expand(-1, self.channels, -1, -1))
