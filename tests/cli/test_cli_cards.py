"""Cards: each defense has one that holds, and measurements come from records alone."""

import shutil
from pathlib import Path

import pytest

from mibench.cards import MEASURED, collect, load_attack_card, load_card, main, measurement, page
from mibench.errors import InvalidParamsError
from mibench.evaluate import OVER_BUDGET
from mibench.params import build
from mibench.protocol import load_protocol, released
from mibench.registry import attacks, defenses

BASELINES = Path(__file__).parents[2] / "baselines"
CARDS = sorted(BASELINES.glob("*/card.yaml"))
ATTACK_CARDS = sorted(BASELINES.glob("attacks/*.yaml"))
every = pytest.mark.parametrize("path", CARDS, ids=lambda path: path.parent.name)


def test_every_built_in_defense_has_a_card():
    built_in = {entry.name for entry in defenses.entries() if entry.origin == "mibench"}
    assert {path.parent.name for path in CARDS} == built_in


@every
def test_a_card_names_its_defense_and_parameters_that_it_takes(path):
    card = load_card(path)
    assert card.name == path.parent.name
    params = defenses.load(card.name).Params
    assert {setting.protocol for setting in card.parameters} <= set(released())
    assert card.parameters
    for setting in card.parameters:
        build(params, setting.values, card.name)
    if card.strength:
        assert card.strength.parameter in params.model_fields
        for value in card.strength.values:
            build(params, {card.strength.parameter: value}, card.name)


@every
def test_the_listing_names_the_paper_of_the_card(path):
    card, facts = load_card(path), defenses.entry(path.parent.name).facts
    assert {"paper", "servers", "randomness"} <= facts.keys()
    if card.paper is None:
        assert facts["paper"] == "-"
    elif card.paper.arxiv:
        assert card.paper.arxiv in facts["paper"]


@every
def test_measurements_belong_to_the_released_protocols(path):
    for row in load_card(path).measured:
        assert load_protocol(row.protocol).content_id == row.content
        assert row.psnr.low <= row.psnr.value <= row.psnr.high


def test_the_page_is_what_the_cards_give():
    cards = [load_card(path) for path in CARDS]
    others = [load_attack_card(path) for path in ATTACK_CARDS]
    assert (BASELINES / "README.md").read_text(encoding="utf-8") == page(cards, others)


def test_every_built_in_attack_has_a_card():
    built_in = {entry.name for entry in attacks.entries() if entry.origin == "mibench"}
    assert {load_attack_card(path).name for path in ATTACK_CARDS} == built_in


@pytest.mark.parametrize("path", ATTACK_CARDS, ids=lambda path: path.stem)
def test_the_card_of_an_attack_says_what_its_code_says(path):
    card, method = load_attack_card(path), attacks.load(path.stem)
    assert card.name == path.stem
    assert card.knowledge is method.knowledge
    listed = attacks.entry(path.stem).facts.get("paper", "")
    if card.paper is not None:
        assert card.paper.authors in listed or str(card.paper.arxiv) in listed


@pytest.fixture
def folder(tmp_path):
    for path in CARDS:
        if path.parent.name in ("none", "privdfs"):
            shutil.copytree(path.parent, tmp_path / path.parent.name)
    return tmp_path


@pytest.fixture
def record(finished):
    return finished.record


def test_a_record_is_collected_once_and_the_rest_of_the_card_stays(folder, record):
    path = folder / "privdfs" / "card.yaml"
    text, before = path.read_text(encoding="utf-8"), load_card(path)
    for _ in range(2):
        assert collect(folder, [record]) == [path]
    after = load_card(path)
    assert path.read_text(encoding="utf-8").startswith(text[: text.index(MEASURED)])
    new = [row for row in after.measured if row.protocol == record.protocol.id]
    assert new == [measurement(record)]
    others = [row for row in after.measured if row.protocol != record.protocol.id]
    assert others == list(before.measured)


def test_a_measurement_is_what_the_record_says(record):
    row = measurement(record)
    score = {one.metric: one for one in record.scores}
    assert row.psnr.value == pytest.approx(score["psnr"].value, abs=1e-6)
    assert row.ssim.high == pytest.approx(score["ssim"].ci_high, abs=1e-6)
    assert row.client_flops == record.cost.client_flops
    assert row.params.items() <= record.defense.params.items()
    assert "losses" not in row.facts


def test_the_table_has_a_row_for_each_run(folder, record):
    collect(folder, [record])
    cards = [load_card(path) for path in sorted(folder.glob("*/card.yaml"))]
    text = page(cards)
    section = text[text.index(f"## {record.protocol.id}\n") :].partition("\n## ")[0]
    (line,) = (one for one in section.splitlines() if one.startswith("| `privdfs` "))
    assert f"{record.cost.client_flops / 1e6:.2f}" in line


def test_variants_stand_in_a_table_of_their_own_from_weak_to_strong(folder, record):
    def met(attack, **params):
        run = record.defense.model_copy(update={"params": {**record.defense.params, **params}})
        attacker = record.attack.model_copy(update={"name": attack})
        return record.model_copy(update={"defense": run, "attack": attacker})

    random = {"leakage": 0.0, "masks": "random"}
    runs = [met("decoder", **random), met("decoder"), met("gradient")]
    runs += [met("decoder", leakage=9.0), met("gradient", leakage=9.0), met("decoder", leakage=0.1)]
    collect(folder, runs)
    text = page([load_card(path) for path in sorted(folder.glob("*/card.yaml"))])
    section = text[text.index(f"## {record.protocol.id}\n") :].partition("\n## ")[0]
    tables, _, variants = section.partition("### Strengths and variants")
    defaults = tables.partition("### Attacks")[0]
    assert defaults.count("| `privdfs`") == 1
    rows = [row for row in variants.splitlines() if "privdfs" in row]
    labels = [row.split(" | ")[0].removesuffix(" *") for row in rows]
    assert labels == [
        "| `privdfs` `leakage=0.1`",
        "| `privdfs` `leakage=0.3` (default)",
        "| `privdfs` `leakage=9.0`",
        "| `privdfs` `leakage=0.0`, `masks=random`",
    ]
    assert "`none`" not in variants


def test_attacks_stand_in_a_table_for_the_defenses_that_have_met_them_all(folder, record):
    def met(defense, attack, seconds):
        names = {"defense": defense, "attack": attack}
        parts = {k: getattr(record, k).model_copy(update={"name": v}) for k, v in names.items()}
        parts["defense"] = parts["defense"].model_copy(update={"params": {}})
        return record.model_copy(update={**parts, "seconds_per_image": seconds})

    attacks = ["decoder", "gradient", "gradient-warm", "suite", "linear"]
    runs = [met("privdfs", attack, 0.25) for attack in attacks]
    collect(folder, runs + [met("none", attack, 0.5) for attack in attacks[:-1]])
    shutil.copytree(BASELINES / "vib", folder / "vib")
    collect(folder, [met("vib", attack, 0.12345) for attack in attacks])
    text = page([load_card(path) for path in sorted(folder.glob("*/card.yaml"))])
    section = text[text.index(f"## {record.protocol.id}\n") :].partition("\n## ")[0]
    defaults, _, table = section.partition("### Attacks")
    rows = [row.strip("| ").split(" | ") for row in table.splitlines() if row.startswith("|")]
    assert rows[0] == ["attack", "`privdfs`", "`vib`", "seconds per image"]
    assert [row[0].strip("`") for row in rows[2:]] == [*attacks[:3], "linear", "suite"]
    assert {row[-1] for row in rows[2:]} == {"0.12 to 0.25"}
    assert "linear" not in defaults


def test_seeds_are_told_apart_in_both_tables(folder, record):
    strong = {**record.defense.params, "leakage": 9.0}
    varied = record.model_copy(
        update={"defense": record.defense.model_copy(update={"params": strong})}
    )
    attacker = record.attack.model_copy(update={"name": "decoder"})
    runs = [one.model_copy(update={"attack": attacker}) for one in (record, varied)]
    collect(folder, [run.model_copy(update={"seed": seed}) for run in runs for seed in (0, 3)])
    text = page([load_card(folder / "privdfs" / "card.yaml")])
    section = text[text.index(f"## {record.protocol.id}\n") :].partition("\n## ")[0]
    for table in section.split("### Strengths and variants"):
        labels = [row.split(" | ")[0] for row in table.splitlines() if "`privdfs`" in row]
        assert len(set(labels)) == len(labels)
        assert any("seed 3" in label for label in labels)


@pytest.mark.parametrize("words", ["no-such-run", "."])
def test_what_is_no_record_is_one_line(folder, words, capsys):
    assert main([str(folder / words)], folder) == 2
    assert "record" in capsys.readouterr().err


def test_an_unknown_key_is_named(folder):
    path = folder / "none" / "card.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("idea:", "ideas:"), encoding="utf-8")
    with pytest.raises(InvalidParamsError, match="ideas"):
        load_card(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"status": "error", "error": "out of luck"}, "its status is error"),
        ({"deviations": ["attack.steps set by hand"]}, "departs .* attack.steps set by hand"),
        ({"data": None}, "older version"),
    ],
)
def test_runs_that_prove_nothing_are_refused_and_change_nothing(folder, record, changes, words):
    before = (folder / "privdfs" / "card.yaml").read_bytes()
    with pytest.raises(InvalidParamsError, match=words):
        collect(folder, [record, record.model_copy(update=changes)])
    assert (folder / "privdfs" / "card.yaml").read_bytes() == before


def test_a_client_above_the_budget_is_collected_and_marked(folder, record):
    over = f"{OVER_BUDGET} 9 FLOPs, above the protocol's 5"
    protocol = record.protocol.model_copy(update={"ranked": False})
    collect(folder, [record.model_copy(update={"deviations": [over], "protocol": protocol})])
    text = page([load_card(folder / "privdfs" / "card.yaml")])
    assert "| `privdfs` * |" in text
