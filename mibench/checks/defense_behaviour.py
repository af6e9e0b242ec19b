"""Checks that a defense behaves alike whenever it is used, and is as random as it says."""

from __future__ import annotations

import torch

from mibench import seeding
from mibench.checks.battery import Battery, Outcome, failed, passed, skipped, warned
from mibench.checks.defense_wiring import FEW, most_deviating
from mibench.checks.shares import named, unnamed
from mibench.checks.trial import DRAWS, LEARNING, Trial
from mibench.defenses.base import TOLERANCE, Shares

behaviour: Battery[Trial] = Battery()

STREAMS: tuple[tuple[str | int, ...], ...] = (
    ("transmission",),
    ("prepare",),
    ("shapes",),
    ("example",),
    ("utility",),
    ("examination",),
    ("decoder",),
    ("decoder validation",),
    ("linear queries",),
    ("gradient tuning",),
    ("diffusion tuning",),
    ("deep prior tuning",),
    ("prior",),
    ("global", 0),
    ("reconstruct", 0, 0),
)
"""Random streams that are active when the benchmark sends images, or an attack queries."""
ALIKE = (0.8, 1.25)
"""Ratio of two noise powers between which the law is the same."""
CALIBRATED = (0.67, 1.5)
"""Ratio of the noise that a law tells of to the noise that is sent, between which it is true."""
FOR_ONE = (0.5, 2.0)
"""The same ratio, for a single image."""
SOME_IMAGES = 0.25
"""Share of the images for which a law may be wrong by chance."""
MANY_VALUES = 64
"""Values of a message from which on a single image tells its law."""
CENTRED = 0.5
"""Share of the score that may be common to all transmissions; 1/R for a true law."""
WIDE = 0.1
"""Least fall of the log-likelihood under an error of `TOLERANCE`, over that of a plain message."""


def _alike(trial: Trial, sent: list[Shares]) -> tuple[bool, str]:
    """Whether transmissions of `some` follow the law of `Trial.draws`."""
    ratio = sum(map(trial.noise_ratio, sent)) / len(sent)
    return ALIKE[0] <= ratio <= ALIKE[1], f"squared distance from the mean {ratio:.2f} times as far"


@behaviour.check(
    "same-grad",
    tried="sent the same images with and without recording gradients",
    advice="do not ask whether gradients are recorded, or whether the input requires one",
)
def same_grad(trial: Trial) -> Outcome:
    """The same message under no_grad and for images that require a gradient."""
    stream = (trial.seed, "grad")
    plain, recorded = (trial.send(trial.some, *stream, grad=grad) for grad in (False, True))
    share = most_deviating(plain, recorded)
    words = f"{share:.1%} of the values differ"
    return failed(words) if share > FEW else passed(words)


@behaviour.check(
    "same-batch",
    tried="sent images in one batch, one by one, and in batches of 5",
    advice="compute every row from its own image; in evaluation mode use no statistics of a batch",
)
def same_batch(trial: Trial) -> Outcome:
    """The same message, or law of it, in batches of 1 and N."""
    images = trial.some
    whole = trial.predict(images)
    for size in (1, 5):
        parts = [trial.predict(part) for part in torch.split(images, size)]
        joined = tuple(torch.cat(shares) for shares in zip(*parts, strict=True))
        share = most_deviating(whole, joined)
        if share > FEW:
            return failed(f"in batches of {size}, {share:.1%} of the values of predict() differ")
        sent = _in_batches(trial, size)
        if not trial.random:
            share = most_deviating(trial.send(images), sent[0])
            if share > FEW:
                return failed(f"in batches of {size}, {share:.1%} of the values sent differ")
        else:
            same, words = _alike(trial, sent)
            if not same:
                return failed(f"in batches of {size} the noise has another law: {words}")
    return passed("the same in batches of 1, 5 and many")


def _in_batches(trial: Trial, size: int) -> list[Shares]:
    found = []
    for turn in range(4 if trial.random else 1):
        parts = [
            trial.send(part, trial.seed, "batches", size, turn, at)
            for at, part in enumerate(torch.split(trial.some, size))
        ]
        found.append(tuple(torch.cat(shares) for shares in zip(*parts, strict=True)))
    return found


@behaviour.check(
    "same-order",
    tried="sent the same images in another order",
    advice="compute every row from its own image, wherever it stands in the batch",
)
def same_order(trial: Trial) -> Outcome:
    """Rows follow their images."""
    images = trial.some
    order = torch.randperm(len(images), generator=seeding.generator(trial.seed, "order"))
    back = order.argsort()
    share = most_deviating(
        trial.predict(images), tuple(one[back] for one in trial.predict(images[order]))
    )
    if share <= FEW and not trial.random:
        moved = tuple(one[back] for one in trial.send(images[order]))
        share = most_deviating(trial.send(images), moved)
    if share > FEW:
        return failed(f"{share:.1%} of the values differ")
    if trial.random:
        sent = [
            tuple(one[back] for one in trial.send(images[order], trial.seed, "order", turn))
            for turn in range(4)
        ]
        same, words = _alike(trial, sent)
        if not same:
            return failed(f"in another order the noise has another law: {words}")
    return passed("rows follow their images")


@behaviour.check(
    "same-again",
    tried="sent the same images several times under the same random stream",
    advice="keep no count of calls and no earlier image; draw from PyTorch's global stream only",
)
def same_again(trial: Trial) -> Outcome:
    """The first call and later ones give the same, in a process that has sent nothing before."""
    fresh = trial.stand_in("fresh-client")
    stream = (trial.seed, "again")
    first = trial.send(trial.some, *stream, process=fresh)
    for call in range(2, 6):
        if call == 4:  # others in between
            trial.send(trial.many[-len(trial.some) :], *stream, process=fresh)
        share = most_deviating(first, trial.send(trial.some, *stream, process=fresh))
        if share > FEW:
            return failed(f"at call {call}, {share:.1%} of the values differ from the first call")
    return passed("five calls gave the same")


@behaviour.check(
    "same-process",
    tried="sent the same images in the process of the training and in another with its weights",
    advice="keep all that is learned in parameters and buffers, so that the state holds it",
)
def same_process(trial: Trial) -> Outcome:
    """The state dictionary carries the whole defense."""
    assert trial.trained
    stream = (trial.seed, "process")
    here = trial.send(trial.some, *stream, process=trial.trainer)
    share = most_deviating(here, trial.send(trial.some, *stream))
    words = f"{share:.1%} of the values differ"
    return failed(words) if share > FEW else passed(words)


@behaviour.check(
    "seed-blind",
    tried=f"sent images under {2 * len(STREAMS)} random streams of the benchmark and its attacks",
    advice="never look at seeds; draw from the global stream and nothing else",
)
def seed_blind(trial: Trial) -> Outcome:
    """The same message, or law of it, whatever stream is active."""
    streams = [(seed, *names) for seed in (0, 1) for names in STREAMS]
    plain = trial.send(trial.some, trial.seed, "blind")
    before = trial.predict(trial.some, trial.seed, "blind")
    sent = []
    for stream in streams:
        share = most_deviating(before, trial.predict(trial.some, *stream))
        sent.append(trial.send(trial.some, *stream))
        where = f"under the stream {stream[1]!r} of seed {stream[0]}"
        if share > FEW:
            return failed(f"{where} {share:.1%} of the values of predict() differ")
        if not trial.random:
            share = most_deviating(plain, sent[-1])
            if share > FEW:
                return failed(f"{where} {share:.1%} of the values differ")
        elif not 0.5 < trial.noise_ratio(sent[-1]) < 2:
            return failed(f"{where} the noise has another law: {_alike(trial, sent[-1:])[1]}")
    if trial.random:
        same, words = _alike(trial, sent)
        if not same:
            return failed(f"the noise has another law: {words}")
    return passed("the same under all of them")


@behaviour.check(
    "random-declared",
    tried="sent the same images several times, and one image twice in a batch",
    advice="draw fresh noise for every message, or do not declare it",
)
def random_declared(trial: Trial) -> Outcome:
    """Declared randomness is there, fresh for each message and each image."""
    declared = trial.declared not in (None, "none", "as the other")
    if not trial.random:
        if not declared:
            return skipped("none is declared, and there is none")
        words = f"it declares {trial.declared!r}, and every transmission is the same"
        return warned(words) if trial.params else failed(words)
    twins = trial.some[:1].expand(16, -1, -1, -1).contiguous()
    sent = trial.send(twins, trial.seed, "twins")
    if all(bool((one == one[:1]).all()) for one in sent):
        return failed("one image twice in a batch has the same noise")
    return passed("fresh noise for each message")


@behaviour.check(
    "random-undeclared",
    tried="sent the same images several times",
    advice="override predict() and log_likelihood() with the law of what is sent",
)
def random_undeclared(trial: Trial) -> Outcome:
    """Randomness without a law, or in spite of a declaration that there is none."""
    if not trial.random:
        return passed("every transmission is the same")
    if not (trial.facts["own_predict"] and trial.facts["own_law"]):
        return failed("messages are random, and no law is given")
    if trial.declared == "none":
        return failed("messages are random, and the registration declares 'none'")
    return passed("messages are random, and a law is given")


@behaviour.check(
    "law",
    tried="compared log_likelihood() with transmissions: its centre, its width, the true image",
    advice="give the law of what protect() sends, with predict() as its parameters",
)
def law(trial: Trial) -> Outcome:
    """The declared law is the true one.

    For any law with density p, E[(s - m) . grad log p(s)] = -d with d values and any m that does
    not depend on s, and E[grad log p(s)] = 0. A law that is k times too wide gives -d / k^2. Where
    the law is one of few possible messages, with a tolerance, both are 0; then the tolerance must
    be one.
    """
    images, count = trial.some, len(trial.some)
    scores = []
    for turn in range(DRAWS):
        shares = tuple(one[turn] for one in trial.draws)
        value, gradients = _likelihood(trial, images, shares)
        scores.append(gradients)
    _, others = _likelihood(trial, images.roll(1, 0), shares)
    strange = trial.client.ask(
        "defense.likelihood", {"images": images.roll(1, 0), **named(shares)}
    )[1]["value"]
    share = float((value > strange).double().mean())
    if share < 0.9:
        return failed(
            f"only for {share:.0%} of the messages the true image is likelier than others"
        )
    assert others
    widths = torch.zeros(count, dtype=torch.float64)
    centre = total = 0.0
    for k, draws in enumerate(trial.draws):
        score = torch.stack([one[k] for one in scores]).double()
        # The mean of the other draws: the centre must not depend on the draw.
        apart = (draws - draws.mean(0)).double() * DRAWS / (DRAWS - 1)
        widths -= (apart * score).flatten(2).sum((0, 2)) / DRAWS
        centre += float(score.mean(0).square().sum())
        total += float(score.square().sum()) / DRAWS
    values = sum(one[0, 0].numel() for one in trial.draws)
    found = float(widths.mean()) / values
    fall = _fall(trial, images, shares, value)
    words = (
        f"its width is {found:.2f} of a true law's, an error of {TOLERANCE:.0%} costs {fall:.2f} "
        "of what it costs for a plain message"
    )
    if trial.random and found > CALIBRATED[1]:
        return failed(f"the law is too narrow for what is sent: {words}")
    if not trial.random or found < CALIBRATED[0]:
        if fall < WIDE:
            return failed(f"the law is too wide for what is sent: {words}")
    elif centre > CENTRED * total:
        return failed(f"the law has another centre than what is sent: {words}")
    else:
        each = widths / values
        wrong = float(((each < FOR_ONE[0]) | (each > FOR_ONE[1])).double().mean())
        if wrong > SOME_IMAGES and values >= MANY_VALUES:
            return failed(f"the law is right on average and wrong for {wrong:.0%} of the images")
    return passed(words)


def _likelihood(
    trial: Trial, images: torch.Tensor, shares: Shares
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    _, found = trial.client.ask("defense.likelihood", {"images": images, **named(shares)})
    count = len(shares)
    if "share.0.grad" not in found:
        return found["value"], [torch.zeros_like(one) for one in shares]
    return found["value"], [found[f"share.{k}.grad"] for k in range(count)]


def _fall(trial: Trial, images: torch.Tensor, shares: Shares, value: torch.Tensor) -> float:
    """How the log-likelihood falls where values that arrived are off by `TOLERANCE` of their RMS.

    In units of half the number of such values, which is the fall for a deterministic message.
    """
    noisy, arrived = [], torch.zeros(len(images))
    for k, share in enumerate(shares):
        there = share != 0
        power = share.flatten(1).square().sum(1) / there.flatten(1).sum(1).clamp_min(1)
        scale = TOLERANCE * power.sqrt().view(-1, *(1,) * (share.ndim - 1))
        draws = torch.randn(share.shape, generator=seeding.generator(trial.seed, "off", k))
        noisy.append(share + there * scale * draws)
        arrived += there.flatten(1).sum(1)
    off, _ = _likelihood(trial, images, tuple(noisy))
    return float(((value - off) / (arrived / 2).clamp_min(1)).mean())


@behaviour.check(
    "noise-ratio",
    tried="made the client's weights 8 and 64 times as large and measured signal over noise",
    advice="normalise or bound what the noise is added to, or let the loss pay for its size",
)
def noise_ratio(trial: Trial) -> Outcome:
    """A client cannot escape its noise by growing its features."""
    if not trial.random:
        return skipped("nothing random is sent")
    process = trial.start("scaled-client")
    steps = max(4, 2 * len(trial.facts["phases"]))
    recipe = {**trial.recipe, "steps": steps, "lr": 1e-8}
    power, terms = {}, {}
    for factor in (1, 8, 64):
        told, found = process.ask(
            "defense.scaled",
            {name: one[:64] for name, one in trial.train.items()},
            seconds=LEARNING,
            factor=factor,
            recipe=recipe,
            draws=6,
            seed=trial.seed,
        )
        power[factor] = _signal_to_noise(unnamed(found))
        terms[factor] = sum(v for name, v in told["terms"].items() if name != "task")
    grown = power[64] / max(power[8], 1e-12)
    words = ", ".join(f"{value:.3g} at {factor}x" for factor, value in power.items())
    words = f"signal over noise (power): {words}"
    if grown > 16:
        # With the square of the features, as noise of a fixed size has it.
        if terms[64] > 2 * abs(terms[8]) + 1e-6:
            return passed(f"{words}; a loss term pays for it ({terms[8]:.3g}, {terms[64]:.3g})")
        return failed(f"the noise shrinks as features grow, and no loss term pays for it: {words}")
    return passed(words)


def _signal_to_noise(draws: Shares) -> float:
    signal = noise = 0.0
    for one in draws:
        flat = one.double().flatten(2)  # (R, B, values)
        within = flat.var(0).mean()
        noise += float(within)
        signal += float(flat.mean(0).var(0).mean() - within / len(flat))
    return max(signal, 0.0) / max(noise, 1e-12)
