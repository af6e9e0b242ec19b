"""``README.md`` of a challenge, for whoever attacks."""

from __future__ import annotations

from mibench.challenge.schema import CHALLENGE, SHARES, WEIGHTS, Challenge
from mibench.protocol import Protocol, RoleRule
from mibench.record import Record

TEXT = """\
# Rebuild these images

{images} private images of {side} x {side} pixels went through a client with the defense
`{defense}`. This folder holds what {servers} received of them, and not the images. Rebuild them.

| | |
| --- | --- |
| protocol | `{protocol}` ({content}) |
| defense | `{defense}`, parameters and code hash in `{challenge}` |
| seed | {seed} |
| adversary | {knowledge}, reads {servers}, {transmissions} |
| record on the board | `{record}` |
| reached so far | {reached} |

## What you have

- `{shares}`: one tensor a server and transmission, {images} rows each, exactly as the attacks of
  the board get them: {messages}.
- `{weights}`: {granted} tensors: what this adversary knows of the trained model. {withheld}
- `{challenge}`: everything else that is known, and the hash of each file.
- Images to learn from: the role `auxiliary` ({auxiliary}), and to choose with: the role
  `validation` ({validation}). Get the dataset `{dataset}`; `attackers_images` in `{challenge}`
  has the hash over each role's images and labels.

With mibench {version} installed:

```python
from pathlib import Path
from mibench.challenge import open_challenge, save_reconstructions

opened = open_challenge(Path("."))
opened.target.client, opened.target.log_likelihood, opened.target.query, opened.target.replies
opened.shares
auxiliary, validation = opened.attackers_images()
# images: {images} x 3 x {side} x {side} in [0, 1], in the order of the shares
# save_reconstructions(images, Path("reconstructions"))
```

`opened.target` is what every attack of the board is handed. All files can be read without mibench
as well: they are safetensors and YAML.

## What to send back

A folder with `0000.png` to `{last}`: {side} x {side} pixels, 8-bit RGB, in the order of the
shares, one for every image, and no other file. Where you have nothing better, send a blind guess.

## Rules

1. Each image is rebuilt from its own shares in this folder, and from what was learned on images
   that are no private images of the protocol.
2. Do not use the images themselves, the role `private`, or shares of the same images from another
   challenge.
3. Choose nothing by looking at the originals: no step, no seed, no best of several runs.
4. Say what you did, well enough for others to do it again.

## What it counts

The score is computed from your images: the protocol's metrics, the same images held against other
originals as a control, and leakage between a blind guess and the undefended split. It is shown as
*best known* of this row, with your name, at the level `rescored`.

The private images of a public dataset are public: who breaks rule 2 can look each of them up, and
nothing here can prevent it. So a result from images alone never decides a rank. Send the attack as
code (`mibench run --attack ./file.py:Class`), and it is run, reproduced, and counts like any other.
"""


def readme(challenge: Challenge, protocol: Protocol, record: Record) -> bytes:
    """Returns the page."""
    corrupted, data = challenge.adversary.corrupted, protocol.data
    servers = f"server {corrupted[0]}"
    if len(corrupted) > 1:
        servers = f"the servers {' and '.join(map(str, corrupted))} together"
    times = challenge.adversary.transmissions
    withheld = "Nothing is withheld."
    if challenge.withheld or challenge.partly:
        withheld = (
            f"{len(challenge.withheld) + len(challenge.partly)} others, or parts of them, are of "
            "no use to it (other servers, the fusion, helpers of the training) and are withheld."
        )
    text = TEXT.format(
        images=challenge.images,
        side=challenge.image_size,
        defense=challenge.defense.name,
        servers=servers,
        shares=SHARES,
        weights=WEIGHTS,
        challenge=CHALLENGE,
        protocol=challenge.protocol.id,
        content=challenge.protocol.content,
        seed=challenge.seed,
        knowledge=challenge.adversary.knowledge,
        transmissions="sees each image sent once"
        if times == 1
        else f"sees each image sent {times} times",
        record=challenge.record,
        reached=_reached(record),
        messages=", ".join(
            f"`{one.name}` {one.dtype} {(challenge.images, *one.shape)}"
            for one in challenge.messages
        ),
        granted=len(challenge.granted),
        withheld=withheld,
        auxiliary=_role(data.auxiliary),
        validation=_role(data.validation),
        dataset=data.auxiliary.dataset or data.dataset,
        version=challenge.mibench,
        last=challenge.names()[-1],
    )
    return text.encode()


def _role(rule: RoleRule) -> str:
    if rule.hashed is not None:
        low, high = rule.hashed
        return f"images of the split `{rule.split}` whose hash lies in [{low}, {high})"
    assert rule.count is not None, "a rule without hashes has a count"
    return f"images {rule.start} to {rule.start + rule.count - 1} of the split `{rule.split}`"


def _reached(record: Record) -> str:
    """What the board's own attack gets, in a few words."""
    told = [
        f"{one.metric} {one.value:.3f}"
        for one in record.scores
        if one.value is not None and one.metric != "mse"
    ]
    return f"{', '.join(told) or 'nothing was computed'} (`{record.attack.name}`)"
