"""One server is declared, and the tuple holds a second share that no attack is given."""

from mibench.defenses.base import Defense

CAUGHT_BY = "wire-shares"


class ExtraShare(Defense):
    """Declares one server and sends two shares."""

    def protect(self, images):
        features = self.client(images)
        return features * 0.1, features

    def answer(self, shares):
        return self.server(shares[-1])
