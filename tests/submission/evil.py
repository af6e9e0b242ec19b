"""Defenses that misbehave when they are built, each in its own way."""

HEAD = """
import ctypes, os, socket, time
from pathlib import Path
import torch
from mibench.defenses.base import Defense


class Evil(Defense):
    \"\"\"The undefended split, and something else.\"\"\"

    def protect(self, images):
        return (self.client(images),)

    def __init__(self, split, params):
        super().__init__(split, params)
        {body}
"""

HANGS = "time.sleep(600)"
SPINS = "[None for _ in iter(int, 1)]"
EATS = "self.held = torch.ones(2**31)"
GROWS = "self.held = [torch.ones(2**24) for _ in range(64)]"
WRITES = "Path({outside!r}).write_text('mine')"
HIDES = "[None for _ in [0] if not Evil.attempt(lambda: Path({outside!r}).write_text('mine'))]"
DELETES = "os.remove({outside!r})"
READS = "raise RuntimeError(Path({outside!r}).read_text())"
CONNECTS = "socket.create_connection(('127.0.0.1', {port}), 1)"
STARTS = "os.system('true')"
PRINTS = "print('x' * 2**22)"
FILLS = (
    "[Path(os.environ['HOME'], str(n)).write_bytes(bytes(2**20)) for n in range(32)]; "
    "time.sleep(60)"
)
UNNAMED = (
    "self.held = [Path(os.environ['HOME'], str(n)).open('wb') for n in range(32)]; "
    "[(os.remove(f.name), f.write(bytes(2**20)), f.flush()) for f in self.held]; time.sleep(60)"
)
"""Files without a name, which no walk through the folder finds."""
MODES = (
    "print('modes', [ctypes.CDLL(None).chmod({outside!r}.encode(), 0o777), "
    "ctypes.CDLL(None).utimes({outside!r}.encode(), None)])"
)
LINKS = "ctypes.CDLL(None).symlink({outside!r}.encode(), (os.environ['HOME'] + '/link').encode())"
"""Past Python's own events, as native code would."""
ENDS = "os._exit(0)"
SHOWS = "raise RuntimeError(str(sorted(os.environ)))"


def write(folder, body, **values):
    """Turns a new submission's defense into a bad one."""
    code = HEAD.replace("{body}", body.format(**values))
    label = (
        f'"""\n\n    name = "{folder.name}"\n\n    attempt = staticmethod(attempted)\n\n    def p'
    )
    helper = (
        "\n\ndef attempted(call):\n    try:\n        call()\n    except Exception:\n"
        "        return False\n    return True\n\n\nclass Evil"
    )
    code = code.replace('"""\n\n    def p', label).replace("\n\nclass Evil", helper)
    (folder / "defense.py").write_text(code.lstrip())
    path = folder / "submission.yaml"
    lines = path.read_text().splitlines()
    lines = ["component: defense.py:Evil" if one.startswith("component") else one for one in lines]
    path.write_text("\n".join(lines) + "\n")
