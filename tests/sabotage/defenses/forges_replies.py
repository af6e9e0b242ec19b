"""Writes answers of its own on the connection, so that all later ones are taken for others."""

import json
import os
import stat
import struct

from mibench.defenses.base import Defense

CAUGHT_BY = "limit-reply"


class ForgesReplies(Defense):
    """The frame is a good one; only that nobody asked for it gives it away."""

    def protect(self, images):
        text = json.dumps({"ok": {}}).encode()
        for number in range(3, 64):
            try:
                if stat.S_ISSOCK(os.fstat(number).st_mode):
                    os.write(number, struct.pack(">IQ", len(text), 0) + text)
            except OSError:
                continue
        return (self.client(images),)
