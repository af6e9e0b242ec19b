"""A small board of forged entries for the tests of its pages, and readers of HTML."""

from dataclasses import replace
from html.parser import HTMLParser

from board_runs import row_on

from mibench.board.model import Advisory, Board, Gallery, Listed, Origin
from mibench.board.rows import assemble

ADVISORY = Advisory(id="2026-001", date="2026-01-03", title="Wrong bytes", text="Run it again.")


def small_board(folder):
    """Entries below ``folder`` and the board of them: some ranked, some not."""
    root = folder / "leaderboard" / "v1"
    row_on(root, defense="none", ssim=1.0, found=1.0, accuracy=0.76, scatter=0.0)
    row_on(root, params={"snr_db": 6.0}, ssim=0.9, found=0.9, accuracy=0.75)
    row_on(root, params={"snr_db": -6.0}, ssim=0.6, found=0.6, accuracy=0.65)
    row_on(root, defense="bottleneck", ssim=0.2, found=0.1, accuracy=0.755)
    row_on(root, defense="disco", ssim=0.5, found=0.4, accuracy=0.75, submission="given")
    row_on(root, defense="vib", ssim=0.1, found=0.1, accuracy=0.5, attack="decoder")
    return root, assemble(root)


def edited(board, at, *, entry=None, record=None, **changes):
    """The same board with changes in one row of the first section."""
    section = board.sections[0]
    row = section.rows[at]
    one = row.headline[0]
    headline = (
        Listed(
            one.record.model_copy(update=record or {}),
            one.entry.model_copy(update=entry or {}),
        ),
        *row.headline[1:],
    )
    row = replace(row, **({"headline": headline} | changes))
    rows = (*section.rows[:at], row, *section.rows[at + 1 :])
    return replace(board, sections=(replace(section, rows=rows), *board.sections[1:]))


def with_text(board, text):
    """The board with one text wherever somebody outside may write one."""
    origin = Origin.model_construct(  # no file gives such a name to a submission
        kind="submission", submission=text, title=text, authors=[text], paper=text, code=text,
        licence=text,
    )  # fmt: skip
    advisory = ADVISORY.model_copy(update={"title": text, "text": text, "date": text})
    row = board.sections[0].rows[-1]
    record = row.headline[0].record
    part = record.suite[0].model_copy(update={"attack": text}) if record.suite else None
    made = edited(
        board,
        len(board.sections[0].rows) - 1,
        entry={"origin": origin, "claims": {text: 1.0}, "gallery_reason": text},
        record={
            "deviations": [text],
            "defense": record.defense.model_copy(
                update={"name": text, "location": text, "params": {text: text}}
            ),
            "near_copies": {text: 1},
            "files": {text: text},
            "provenance": {"mibench": text, "packages": {text: text}},
            "suite": [part] if part else [],
            "scores": [one.model_copy(update={"reason": text}) for one in record.scores],
        },
        label=text,
        attack=text,
        reasons=(text,),
        advisories=(advisory,),
        superseded_by=text,
    )
    section = replace(made.sections[0], backbone=text, noise_attack=text)
    return Board(made.version, (section, *made.sections[1:]), (advisory,))


def with_gallery(board, at, images, columns=("original", "decoder", "permuted")):
    """The board with a gallery of one row."""
    gallery = Gallery(sha256="0" * 64, side=32, columns=list(columns), images=list(images))
    return edited(board, at, entry={"gallery": gallery, "gallery_reason": None})


class Page(HTMLParser):
    """What a browser makes of a page: tags with their attributes, and the text between."""

    VOID = frozenset(("meta", "link", "input", "br", "hr", "img"))

    def __init__(self, data):
        super().__init__()
        self.tags, self.texts, self.open, self.wrong = [], [], [], []
        self.feed(data.decode())
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        names = [name for name, _ in attrs]
        if len(names) != len(set(names)):
            self.wrong.append(f"{tag} has an attribute twice")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> closes nothing")

    def handle_data(self, data):
        self.texts.append(data)

    def handle_comment(self, data):
        self.wrong.append(f"a comment: {data}")

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)

    def attributes(self, name):
        return [attrs[name] for _, attrs in self.tags if name in attrs]

    @property
    def text(self):
        return "".join(self.texts)
