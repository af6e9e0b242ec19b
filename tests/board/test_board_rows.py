"""From records to rows."""

import pytest
from board_runs import numbers, put, row_on, score_of, summed

from mibench.board import layout, rows
from mibench.board.model import Advisory, BestKnown, Level, Origin
from mibench.files import pretty_json
from mibench.record import Score

THREE = "cifar10-standard-resnet18-v1"
"""A protocol with three seeds."""


@pytest.fixture
def root(tmp_path):
    return tmp_path / "leaderboard" / "v1"


def only(root):
    (section,) = rows.assemble(root).sections
    return section


def by_label(root):
    return {row.label: row for row in only(root).rows}


def test_rows_are_ranked_by_the_larger_leakage_and_tied_by_interval(root):
    row_on(root, defense="none", ssim=1.0, found=1.0, accuracy=0.76)
    row_on(root, defense="vib", ssim=0.2, found=0.10)
    row_on(root, defense="privdfs", ssim=0.1, found=0.14)
    row_on(root, defense="mid", ssim=0.05, found=0.80)  # blurred, and still recognised
    found = by_label(root)
    assert {name: row.rank for name, row in found.items()} == {
        "vib": (1, 2), "privdfs": (1, 2), "mid": (3, 3), "none": (4, 4),
    }  # fmt: skip
    assert all(row.reasons == () for row in found.values())
    assert [row.label for row in only(root).rows] == ["privdfs", "vib", "mid", "none"]


def test_a_row_that_loses_too_much_is_below_with_the_reason(root):
    row_on(root, defense="vib", accuracy=0.7299, undefended=0.76)
    row_on(root, defense="mid", accuracy=0.7300, undefended=0.76)
    found = by_label(root)
    assert found["mid"].rank == (1, 1)  # three points are allowed
    assert found["vib"].rank is None
    assert found["vib"].reasons == ("It loses 3.01 points of accuracy, and 3 are allowed.",)
    assert found["vib"].drop == pytest.approx(3.01)


def test_each_missing_condition_is_a_reason(root):
    row_on(root, defense="vib", attack="decoder", accuracy=0.6, level=Level.CLAIMED)
    row_on(root, defense="mid", flops=27_000_000)
    values, table = numbers(defense="cem")
    values["calibration"][0] |= {"calibrated": False, "reached": 20.0}
    values["protocol"]["ranked"] = False
    put(root, values, table)
    values, table = numbers(defense="disco")
    score_of(values, "scores", "reid-top1")["value"] = None
    for place in ("undefended", "permuted", "prior_only", "scores", "leakage"):
        name = "leakage(reid-top1)" if place == "leakage" else "reid-top1"
        score_of(values, place, name).update(value=None, n=0, reason="no judge is here")
    put(root, values, table)
    found = by_label(root)
    assert found["vib"].reasons == (
        "It was attacked with decoder alone, not with the whole suite.",
        "It loses 16.00 points of accuracy, and 3 are allowed.",
        "Its numbers are claimed and not yet rescored.",
    )
    assert found["mid"].reasons == (
        "The client needs 27000000 FLOPs, above the protocol's 5000000.",
    )
    assert found["cem"].reasons == (
        "The attack linear is too weak: it reaches 20.0 dB of 24.9 dB on the undefended split.",
    )
    assert found["disco"].reasons == (
        "It cannot be ranked, since there is no normalised leakage in reid-top1: no judge is here.",
    )
    assert not any(row.ranked for row in found.values())


def test_a_suite_that_lacks_an_attack_is_not_ranked(root):
    values, table = numbers(defense="vib")
    values["suite"] = [part for part in values["suite"] if part["attack"] != "deep-prior"]
    put(root, values, table)
    assert by_label(root)["vib"].reasons == ("Its suite lacks deep-prior.",)


def test_single_attacks_stand_beside_the_suite(root):
    row_on(root, defense="vib", ssim=0.3)
    row_on(root, defense="vib", attack="decoder", ssim=0.9)
    row = by_label(root)["vib"]
    assert row.attack == "suite"
    assert row.leakage["ssim"].value == pytest.approx(0.3, abs=1e-6)
    assert [one.record.attack.name for one in row.others] == ["decoder"]


def test_without_a_suite_the_attack_that_leaks_most_counts(root):
    row_on(root, defense="vib", attack="decoder", ssim=0.3, found=0.3)
    row_on(root, defense="vib", attack="linear", ssim=0.2, found=0.6)
    row = by_label(root)["vib"]
    assert row.attack == "linear"
    assert [one.record.attack.name for one in row.others] == ["decoder"]


def test_seeds_are_averaged_image_by_image(root):
    row_on(root, defense="vib", seed=0, ssim=0.2, found=0.2, accuracy=0.75, protocol_id=THREE)
    row_on(root, defense="vib", seed=1, ssim=0.4, found=0.4, accuracy=0.74, protocol_id=THREE)
    row = by_label(root)["vib"]
    assert [one.record.seed for one in row.headline] == [0, 1]
    assert row.leakage["ssim"].value == pytest.approx(0.3, abs=1e-6)
    assert row.leakage["reid-top1"].value == pytest.approx(0.3, abs=0.01)
    assert row.accuracy == pytest.approx(0.745)
    assert row.drop == pytest.approx(1.5)
    assert row.leakage["ssim"].ci_low < 0.3 < row.leakage["ssim"].ci_high
    assert row.scores["ssim"].source == "mean over seeds 0, 1"
    assert row.scores["ssim"].n == 128
    assert row.scores["lpips"].value is None
    assert row.scores["lpips"].reason == "its weights are not here"


def test_other_seeds_than_the_protocols_do_not_count(root):
    row_on(root, defense="vib", seed=0, ssim=0.6)
    row_on(root, defense="vib", seed=5, ssim=0.1)
    row = by_label(root)["vib"]
    assert row.leakage["ssim"].value == pytest.approx(0.6, abs=1e-6)
    assert row.rank == (1, 1)
    assert [one.record.seed for one in row.others] == [5]


def test_a_row_of_other_seeds_alone_says_so(root):
    row_on(root, defense="vib", seed=5)
    assert by_label(root)["vib"].reasons == (
        "It departs from the protocol: seed 5 is none of the protocol's [0].",
    )


@pytest.mark.parametrize(
    ("seeds", "left"), [((0,), None), ((0, 1), None), ((1,), "0"), ((0, 2), "1"), ((1, 2), "0")]
)
def test_seeds_are_taken_in_the_protocols_order(root, seeds, left):
    for seed in seeds:
        row_on(root, defense="vib", seed=seed, protocol_id=THREE)
    told = [reason for reason in by_label(root)["vib"].reasons if "seeds are taken" in reason]
    assert len(told) == (left is not None)
    assert all(f"order: {left} is left out." in reason for reason in told)


def test_equal_floor_and_undefended_split_divide_nothing(root):
    values, table = numbers(defense="vib", found=1.0)
    table["prior_only_reid-top1"] = 1.0
    put(root, *summed(values, table))
    assert by_label(root)["vib"].rank is None


def test_code_from_elsewhere_does_not_pass_for_a_built_in(root):
    values, table = numbers(defense="vib")
    values["defense"] |= {"name": "none", "location": "mine.py:None"}
    put(root, values, table)
    assert only(root).rows[0].label.startswith("none from mine.py:None")


def test_one_seed_keeps_the_numbers_of_its_record(root):
    row_on(root, defense="vib")
    row = by_label(root)["vib"]
    record = row.headline[0].record
    assert list(row.scores.values()) == record.scores
    assert row.leakage["ssim"].value == record.leakage[2].value


def test_of_two_runs_of_a_seed_the_first_counts_whatever_came_out(root):
    late = "2026-02-01T00:00:00+00:00"
    row_on(root, defense="vib", ssim=0.6)
    row_on(root, defense="vib", ssim=0.1, started=late)
    row = by_label(root)["vib"]
    assert row.leakage["ssim"].value == pytest.approx(0.6, abs=1e-6)
    assert [one.record.started for one in row.others] == [late]


def test_parameters_adversaries_and_makers_have_rows_of_their_own(root):
    row_on(root, defense="noise")
    row_on(root, defense="noise", params={"snr_db": -6.0})
    row_on(root, defense="noise", submission="doe-noise", ssim=0.4)
    values, table = numbers(defense="noise")
    values["adversary"]["coalitions"] = [[0]]
    values["deviations"] = ["coalition 0 chosen by hand, not by the screening"]
    values["protocol"]["ranked"] = False
    put(root, values, table)
    found = by_label(root)
    assert set(found) == {
        "noise", "noise (snr_db=-6.0)", "doe-noise", "noise, servers 0 attacked",
    }  # fmt: skip
    assert len({row.slug for row in found.values()}) == 4
    assert found["noise, servers 0 attacked"].reasons == (
        "It departs from the protocol: coalition 0 chosen by hand, not by the screening.",
    )


def test_a_protocol_of_another_content_is_another_section(root):
    row_on(root, defense="vib")
    values, table = numbers(defense="mid")
    values["protocol"] |= {"content": "0123456789abcdef", "ranked": False}
    put(root, values, table)
    sections = rows.assemble(root).sections
    assert [one.protocol.content == "0123456789abcdef" for one in sections] == [False, True]
    assert sections[1].rows[0].reasons == ("Its record says that it is not ranked.",)


# --- noise ---------------------------------------------------------------------------------------


def noises(root, **chosen):
    row_on(root, defense="noise", attack="decoder", ssim=0.8, accuracy=0.74, **chosen)
    row_on(root, defense="noise", params={"snr_db": -6.0}, attack="decoder", ssim=0.4,
           accuracy=0.70, **chosen)  # fmt: skip


def test_gain_is_held_against_the_same_attack_at_the_same_accuracy(root):
    noises(root)
    values, table = numbers(defense="vib", ssim=0.5, accuracy=0.72)
    table["decoder_ssim"] = table["prior_only_ssim"] + 0.25 * (
        table["undefended_ssim"] - table["prior_only_ssim"]
    )
    put(root, *summed(values, table))
    section = only(root)
    row = next(one for one in section.rows if one.label == "vib")
    # Noise leaks 0.6 there, and decoder alone 0.25 behind vib; the suite, which got more, met no
    # noise.
    assert row.gain["ssim"].value == pytest.approx(0.35, abs=1e-6)
    assert row.gain["ssim"].ci_low < 0.35 < row.gain["ssim"].ci_high
    assert row.gain["ssim"].source == "both attacked with decoder, seed 0"
    assert section.noise_attack == "decoder"
    points = [(at, round(score.value, 6)) for at, score in section.noise["ssim"]]
    assert points == [(0.7, 0.4), (0.74, 0.8), (0.76, 1.0)]


def test_gain_has_a_reason_where_it_cannot_be_had(root):
    noises(root)
    row_on(root, defense="none", ssim=1.0, found=1.0, accuracy=0.76)
    row_on(root, defense="vib", accuracy=0.65)
    row_on(root, defense="mid", attack="linear")
    row_on(root, defense="cem", seed=1)
    reasons = {row.label: row.gain["ssim"].reason for row in only(root).rows}
    assert reasons == {
        "none": "the undefended split is the end of the noise curve",
        "noise": "it is the noise that others are compared with",
        "noise (snr_db=-6.0)": "it is the noise that others are compared with",
        "vib": "an accuracy of 65.0 % lies below the last point of the noise curve, 70.0 %",
        "mid": "it was not attacked with decoder, as noise was",
        "cem": "it departs from the protocol, and noise does not",
    }
    assert all(row.gain["ssim"].value is None for row in only(root).rows)


def test_gain_waits_for_noise_of_the_same_seed(root):
    noises(root, protocol_id=THREE)
    row_on(root, defense="cem", seed=1, protocol_id=THREE)
    assert by_label(root)["cem"].gain["ssim"].reason == (
        "noise, or the undefended split, of seed 1 was not measured"
    )


def test_another_seed_than_the_protocols_moves_neither_gain_nor_front(root):
    noises(root)
    row_on(root, defense="mid", ssim=0.5, found=0.5, accuracy=0.73)
    row_on(root, defense="vib", ssim=0.9, found=0.9, accuracy=0.72)
    before = by_label(root)["vib"]
    assert not before.pareto
    noises(root, seed=7)
    row_on(root, defense="vib", ssim=0.1, found=0.1, accuracy=0.72, seed=7)
    after = by_label(root)["vib"]
    assert [one.record.seed for one in after.others] == [7]
    assert not after.pareto
    assert after.gain == before.gain


def test_of_two_runs_of_noise_the_first_that_was_made_counts(root):
    later, first = "2026-03-01T00:00:00+00:00", "2026-02-01T00:00:00+00:00"
    for started, ssim in ((later, 0.2), (first, 0.8)):
        row_on(root, defense="noise", attack="decoder", ssim=ssim, accuracy=0.74, started=started)
    (low, _) = only(root).noise["ssim"]
    assert low[1].value == pytest.approx(0.8, abs=1e-6)


def test_without_noise_there_is_no_gain(root):
    row_on(root, defense="vib")
    section = only(root)
    assert section.noise == {}
    assert section.noise_attack is None
    assert section.rows[0].gain["ssim"].reason == "no noise counts under this protocol yet"


def test_a_submission_cannot_bend_the_noise_curve(root):
    noises(root, submission="doe")
    row_on(root, defense="vib", accuracy=0.72)
    assert only(root).noise_attack is None


@pytest.mark.parametrize("how", ["advisory", "superseded", "claimed"])
def test_noise_that_does_not_count_any_more_bends_no_curve(root, how):
    noises(root)
    row_on(root, defense="vib", attack="decoder", ssim=0.3, accuracy=0.72)
    given = {"defense": "noise", "attack": "decoder", "accuracy": 0.72}
    values, table = numbers(params={"snr_db": 0.0}, ssim=0.1, **given)
    wrong = put(root, values, table, level=Level.CLAIMED if how == "claimed" else Level.RESCORED)
    if how == "advisory":
        folder = layout.advisories(root)
        folder.mkdir()
        told = Advisory(id="A", date="2026-03-01", title="t", text="t", records=[wrong])
        (folder / "A.yaml").write_bytes(pretty_json(told.model_dump(mode="json")))
    elif how == "superseded":
        values, table = numbers(params={"snr_db": 0.0}, ssim=0.6, **given)
        put(root, values | {"supersedes": wrong}, table)
    row = by_label(root)["vib"]
    assert row.gain["ssim"].value == pytest.approx(0.3, abs=1e-6)


def test_the_undefended_end_comes_from_the_suite_of_none_where_noise_has_only_suites(root):
    row_on(root, defense="noise", ssim=0.8, accuracy=0.74)
    row_on(root, defense="none", ssim=1.0, found=1.0, accuracy=0.76)
    row_on(root, defense="noise", params={"snr_db": -6.0}, attack="decoder", ssim=0.4,
           accuracy=0.70)  # fmt: skip
    row_on(root, defense="vib", ssim=0.3, accuracy=0.74)
    section = only(root)
    assert section.noise_attack == "decoder"  # two strengths; the suite met one
    row = next(one for one in section.rows if one.label == "vib")
    assert row.gain["ssim"].value == pytest.approx(0.5, abs=1e-6)


# --- front, advisories, what takes a place -------------------------------------------------------


def test_front_is_marked_among_rows_of_the_same_attacks(root):
    row_on(root, defense="none", ssim=1.0, found=1.0, accuracy=0.76)
    row_on(root, defense="vib", ssim=0.2, found=0.2, accuracy=0.70)
    row_on(root, defense="mid", ssim=0.3, found=0.3, accuracy=0.70)
    row_on(root, defense="cem", attack="decoder", ssim=0.01, found=0.01, accuracy=0.75)
    row_on(root, defense="deeper", ssim=0.01, found=0.01, accuracy=0.75, flops=27_000_000)
    marked = {row.label for row in only(root).rows if row.pareto}
    assert marked == {"none", "vib"}


def test_front_compares_by_the_attack_of_the_noise_curve(root):
    for strength, leak in ((6.0, 0.95), (-6.0, 0.8)):
        row_on(root, defense="noise", params={"snr_db": strength}, attack="decoder", ssim=leak,
               found=leak, accuracy=0.70 + leak / 20)  # fmt: skip
    row_on(root, defense="none", ssim=1.0, found=1.0, accuracy=0.76)
    row_on(root, defense="vib", ssim=0.4, found=0.4, accuracy=0.72)
    row_on(root, defense="cem", attack="decoder", ssim=0.2, found=0.2, accuracy=0.71)
    row_on(root, defense="mid", attack="linear", ssim=0.01, found=0.01, accuracy=0.75)
    found = only(root)
    assert found.noise_attack == "decoder"
    # vib met it in the suite, cem alone; what mid met was weaker than that.
    marked = {row.label for row in found.rows if row.pareto}
    assert {"none", "vib", "cem"} <= marked
    assert "mid" not in marked


def test_an_advisory_takes_the_rank_and_says_why(root):
    name = row_on(root, defense="vib")
    row_on(root, defense="mid")
    folder = layout.advisories(root)
    folder.mkdir()
    text = "id: A-1\ndate: 2026-03-01\ntitle: wrong split\ntext: run again\n"
    (folder / "A-1.yaml").write_text(f"{text}records: [{name}]\n")
    found = by_label(root)
    assert found["vib"].reasons == ("Advisory A-1: wrong split.",)
    assert [one.id for one in found["vib"].advisories] == ["A-1"]
    assert found["mid"].rank == (1, 1)
    assert rows.assemble(root).advisories == tuple(found["vib"].advisories)


@pytest.mark.parametrize("kind", ["protocols", "code"])
def test_an_advisory_can_concern_a_protocol_or_code(root, kind):
    row_on(root, defense="vib")
    row_on(root, defense="mid")
    record = by_label(root)["vib"].headline[0].record
    wrong = Advisory(
        id="A", date="2026-03-01", title="t", text="t",
        **{kind: [record.protocol.content] if kind == "protocols"
           else {"vib": [record.defense.code]}},
    )  # fmt: skip
    folder = layout.advisories(root)
    folder.mkdir()
    (folder / "A.yaml").write_bytes(pretty_json(wrong.model_dump(mode="json")))
    hit = {label for label, row in by_label(root).items() if row.advisories}
    assert hit == ({"vib", "mid"} if kind == "protocols" else {"vib"})


def superseding(root, old, *, level=Level.RESCORED, **origin):
    values, table = numbers(defense="vib", ssim=0.6)
    return put(root, values | {"supersedes": old}, table, level=level, origin=Origin(**origin))


def test_a_record_scored_anew_takes_the_place_of_the_old_one(root):
    old = row_on(root, defense="vib", ssim=0.3)
    new = superseding(root, old)
    section = only(root)
    assert [row.headline[0].id for row in section.rows] == [new, old]
    assert section.rows[1].superseded_by == new
    assert section.rows[1].reasons == (f"Record {new} takes its place.",)
    assert section.rows[0].rank == (1, 1)


@pytest.mark.parametrize(
    "who", [{"level": Level.CLAIMED}, {"kind": "submission", "submission": "rival"}]
)
def test_nobody_takes_a_place_by_saying_so(root, who):
    old = row_on(root, defense="vib", ssim=0.3)
    superseding(root, old, **who)
    assert all(row.superseded_by is None for row in only(root).rows)


def test_a_submitted_attack_is_shown_where_it_gets_more(root):
    name = row_on(root, defense="vib", ssim=0.3, found=0.3)

    def leak(metric, value):
        return Score(metric=f"leakage({metric})", version=1, unit="", higher_is_better=True,
                     value=value, ci_low=value, ci_high=value, n=128)  # fmt: skip

    folder = layout.best_known(root)
    folder.mkdir()
    for by, values in {"weak": (0.4, 0.1), "strong": (0.5, 0.2)}.items():
        one = BestKnown(
            record=name, by=by, origin=Origin(kind="submission", submission=by),
            level=Level.RESCORED, scores=[], permuted=[],
            leakage=[leak("ssim", values[0]), leak("reid-top1", values[1])],
        )  # fmt: skip
        (folder / f"{by}.json").write_bytes(pretty_json(one.model_dump(mode="json")))
    row = by_label(root)["vib"]
    assert {metric: one.by for metric, one in row.best_known.items()} == {"ssim": "strong"}
    assert row.rank == (1, 1)  # the rank stays that of the protocol's own attacks


def attack_of_doe(root, *, level=Level.RESCORED, **chosen):
    """A run of somebody's own attack on a built-in defense; returns its id."""
    values, table = numbers(defense="vib", attack="decoder", **chosen)
    values["attack"] |= {"name": "sharp", "location": "./sharp.py:Sharp", "params": {"steps": 9}}
    values["deviations"] = [
        "attack.steps set by hand", "attack ./sharp.py:Sharp is none of the protocol's",
        *values["deviations"],
    ]  # fmt: skip
    values["protocol"]["ranked"] = False
    values["calibration"] = []
    origin = Origin(kind="submission", submission="doe-sharp", authors=["Doe"])
    return put(root, values, table, level=level, origin=origin)


def test_a_submitted_attack_stands_in_the_row_of_its_defense(root):
    row_on(root, defense="vib", ssim=0.3, found=0.3)
    name = attack_of_doe(root, ssim=0.5, found=0.2)
    (row,) = only(root).rows
    assert row.label == "vib"
    assert row.rank == (1, 1)
    assert row.leakage["ssim"].value == pytest.approx(0.3, abs=1e-6)
    assert [one.id for one in row.others] == [name]
    assert "reid-top1" not in row.best_known
    assert row.best_known["ssim"].by == "doe-sharp"
    assert row.best_known["ssim"].origin.authors == ["Doe"]


@pytest.mark.parametrize("why", ["claimed", "seed", "advisory"])
def test_a_submitted_attack_that_does_not_count_is_not_best_known(root, why):
    row_on(root, defense="vib", ssim=0.3, found=0.3)
    level = Level.CLAIMED if why == "claimed" else Level.RESCORED
    name = attack_of_doe(root, ssim=0.5, level=level, seed=7 if why == "seed" else 0)
    if why == "advisory":
        layout.advisories(root).mkdir()
        told = Advisory(id="A", date="2026-03-01", title="t", text="t", records=[name])
        (layout.advisories(root) / "A.yaml").write_bytes(pretty_json(told.model_dump(mode="json")))
    (row,) = only(root).rows
    assert row.best_known is None
    assert row.rank == (1, 1)


def test_a_submitted_attack_alone_has_the_defenses_name(root):
    attack_of_doe(root, ssim=0.5)
    (row,) = only(root).rows
    assert row.label == "vib"
    assert row.attack == "sharp"
    assert row.rank is None


def test_an_empty_folder_is_an_empty_board(root):
    root.mkdir(parents=True)
    assert rows.assemble(root).sections == ()


def test_the_same_folder_gives_the_same_board(root):
    noises(root)
    row_on(root, defense="vib", accuracy=0.72)
    row_on(root, defense="vib", seed=0, protocol_id=THREE)
    row_on(root, defense="vib", seed=1, protocol_id=THREE)
    assert rows.assemble(root) == rows.assemble(root)
