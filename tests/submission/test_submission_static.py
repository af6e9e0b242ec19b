"""Level 0: everything that is wrong with a folder, with file and line, all at once."""

import io
import json
import pickle
import tarfile
import zipfile

import pytest
import torch
from safetensors.torch import save
from typer.testing import CliRunner

from mibench.cli import app
from mibench.registry import metrics
from mibench.submission import static
from mibench.submission.new import create
from mibench.submission.schema import LICENCES, RANGES
from mibench.submission.static import problems


@pytest.fixture
def folder(tmp_path):
    """A submission with which nothing is wrong."""
    return create("channel-noise", tmp_path, "defense", "Channel noise", "Ada L.")


def told(folder):
    """All problems as (name of the file, line, text)."""
    return [(one.file.rpartition("/")[2], one.line, one.text) for one in problems(folder)]


def line_of(folder, beginning, name="submission.yaml"):
    lines = (folder / name).read_text().splitlines()
    return next(n for n, line in enumerate(lines, 1) if line.startswith(beginning))


def described(folder):
    return (folder / "submission.yaml").read_text().splitlines()


def change(folder, *pairs, name="submission.yaml"):
    path = folder / name
    text = path.read_text()
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


def only(folder):
    """The one problem."""
    (found,) = told(folder)
    return found


@pytest.mark.parametrize("kind", ["defense", "attack"])
@pytest.mark.parametrize("name", ["channel-noise", "my-2nd", "m7-wonders-x2"])
def test_a_new_folder_with_title_and_author_is_whole(tmp_path, kind, name):
    made = create(name, tmp_path, kind, "A title: with 'marks' & \"more\"", "Zoë O'Neil")
    assert problems(made) == []
    assert static.load(made).authors == ["Zoë O'Neil"]
    assert len((made / f"{kind}.py").read_text().splitlines()) < 20


def test_a_new_folder_has_two_marks_to_fill_in(tmp_path):
    made = create("channel-noise", tmp_path)
    found = told(made)
    assert [one[:2] for one in found] == [("submission.yaml", 5), ("submission.yaml", 6)]
    assert all("FILL IN" in text for _, _, text in found)


def test_all_problems_are_told_at_once(folder):
    change(
        folder,
        ("licence: Apache-2.0", "# licence"),
        ("[0]", "zero"),
        ("[cifar10-lite-v1]", "[cifar10-lite-v2]"),
        ("randomness: fresh", "randomness: some"),
        ("title: ", "titel: "),
    )
    (folder / "notes.docx").write_bytes(b"x")
    (folder / "defense.py").write_text("class ChannelNoise(\n")
    found = told(folder)
    assert len(found) == len(set(found)) == 8
    assert ("defense.py", 1, "is not Python: '(' was never closed") in found
    for beginning, words in (
        ("titel", "unknown field titel"),
        ("titel", "did you mean 'title'"),
        ("seeds", "expected a list"),
        ("protocols", "unknown protocol 'cifar10-lite-v2'; did you mean 'cifar10-lite-v1'"),
        ("randomness", "expected one of 'none', 'fresh'"),
    ):
        line = line_of(folder, beginning)
        assert any(one[1] == line and words in one[2] for one in found), words
    assert any("licence is missing" in text for _, _, text in found)
    assert any("title is missing" in text for _, _, text in found)


COMPONENT = "component: defense.py:ChannelNoise"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("name: channel-noise", "name: noise", "built-in defense"),
        ("name: channel-noise", "name: Channel_Noise", "is no name"),
        ("name: channel-noise", "name: other", "the folder is called 'channel-noise'"),
        ("authors: [", "authors: [7, ", "expected a string"),
        ("authors: [", "authors: ['<b>me</b>', ", "no HTML here"),
        ("authors: [", 'authors: ["a\\x1b[31mb", ', "control character U+001B"),
        ("authors: [", 'authors: ["a\\u202eb", ', "control character U+202E"),
        ("licence: Apache-2.0 ", "licence: Apache ", "is none of the SPDX identifiers"),
        ("licence: Apache-2.0 ", "licence: ", "expected a string"),
        ("# paper: arXiv:2501.00824 ", "paper: my own paper ", "is none of arXiv:"),
        ("# code: https://", "code: http://", "is no https address"),
        ("kind: defense", "kind: model", "expected one of 'defense', 'attack'"),
        ("format_version: 1", "format_version: 2", "format_version"),
        (COMPONENT, "component: ../other/defense.py:Noise", "nothing outside it is read"),
        (COMPONENT, "component: /etc/defense.py:Noise", "nothing outside it is read"),
        (COMPONENT, "component: other.py:Noise", "there is no such file"),
        (COMPONENT, "component: defense.py:Noise", "which defense.py does not have"),
        (COMPONENT, "component: nois", "did you mean 'noise'"),
        (COMPONENT, "component: noise", "is there already"),
        ("seeds: [0]", "seeds: [0, 0]", "is there twice"),
        ("seeds: [0]", "seeds: [-1]", ">= 0"),
        ("training_data: [train]", "training_data: [auxiliary]", "belongs to the other side"),
        ("training_data: [train]", "training_data: [the web]", "is none of train, auxiliary"),
        ("training_data: [train]", "training_data: [none, train]", "stands alone"),
        ("# supersedes: an", "supersedes: an", "no submission 'an-earlier-submission'"),
        ("params: {} ", "targets: [noise] ", "a defense has no targets"),
        ("randomness: fresh ", "seeds: [1] ", "is there twice, see line 14"),
        ("params: {} ", "params: &a {b: 1}\nclaims: *a #", "aliases"),
        ("params: {} ", "params: !!python/object/apply:os.system [x] #", "the tag"),
    ],
)  # fmt: skip
def test_each_field_is_named_with_its_line(folder, old, new, words):
    change(folder, (old, new))
    last = new.split("\n")[-1].split(":")[0]
    line = max(n for n, one in enumerate(described(folder), 1) if one.startswith(last))
    found = told(folder)
    assert any(
        name == "submission.yaml" and at == line and words in text for name, at, text in found
    ), found


def test_claims_have_known_ranges(folder):
    claims = (
        "claims:\n  cifar10-lite-v1: {accuracy: 70, ssim: 0.4}\n  cifar100-lite-v1:\n"
        "    accuracy: 0.5\n    acuracy: 0.5\n"
    )
    change(folder, ("# supersedes: an-earlier-submission", claims))
    first = line_of(folder, "claims")
    found = told(folder)
    assert [one[1] for one in found] == [first + 1, first + 2, first + 4]
    assert "accuracy = 70, outside 0 to 1; a share, not per cent: 0.7?" in found[0][2]
    assert "none of the submission's protocols" in found[1][2]
    assert "did you mean 'accuracy'" in found[2][2]


def test_ranges_are_those_of_the_metrics():
    for name, (low, high) in RANGES.items():
        if name != "accuracy":
            bounds = metrics.load(name).bounds
            assert low == bounds[0]
            assert high == min(bounds[1], 2.0 if name == "lpips" else bounds[1])


def test_yaml_that_is_none_says_the_line(folder):
    change(folder, ("kind: defense", "kind: [defense"))
    name, line, text = only(folder)
    assert (name, line) == ("submission.yaml", line_of(folder, "title"))
    assert "not valid YAML" in text


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words\n"])
def test_a_file_without_fields(folder, text):
    (folder / "submission.yaml").write_text(text)
    assert "holds no fields" in only(folder)[2]


def test_a_missing_description(folder):
    (folder / "submission.yaml").unlink()
    assert only(folder)[::2] == (
        "submission.yaml",
        "is missing; `mibench submission new NAME` writes one",
    )


def archive(kind):
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("a", "b")
    elif kind == "torch":
        torch.save({"a": torch.zeros(2)}, buffer)
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz" if kind == "gz" else "w") as file:
            file.addfile(tarfile.TarInfo("a"))
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["weights.safetensors", "notes.md", "LICENSE", "x.pkl"])
@pytest.mark.parametrize(
    ("data", "what"),
    [
        *((pickle.dumps({"a": [1, 2]}, protocol), "a pickle") for protocol in range(6)),
        (archive("zip"), "a zip archive"),
        (archive("torch"), "a zip archive"),
        (archive("gz"), "a gzip archive"),
        (archive("tar"), "a tar archive"),
        (b"\x7fELF\x02\x01", "a program"),
    ],
    # Bytes with the time in them are no name for a test: processes would collect different ones.
    ids=[
        *(f"pickle {protocol}" for protocol in range(6)),
        "zip",
        "torch",
        "gzip",
        "tar",
        "program",
    ],
)
def test_pickles_and_archives_are_known_by_content(folder, name, data, what):
    (folder / name).write_bytes(data)
    found = only(folder)
    assert found[0] == name
    assert found[2].startswith(f"is {what}")


def test_links_hidden_files_folders_and_endings(folder, tmp_path):
    (tmp_path / "secret").write_text("x")
    (folder / "notes.md").symlink_to(tmp_path / "secret")
    (folder / ".hidden").write_text("x")
    (folder / "data").mkdir()
    (folder / "model.pt").write_text("x")
    (folder / "other.yaml").write_text("a: 1")
    (folder / "helper.py").write_text("x = 1\n")
    (folder / "odd name.md").write_text("x")
    found = {name: text for name, _, text in told(folder)}
    assert len(found) == 7
    assert "is a link to" in found["notes.md"]
    assert "is hidden" in found[".hidden"]
    assert "is a folder" in found["data"]
    assert "ending '.pt'" in found["model.pt"]
    assert "the only such file" in found["other.yaml"]
    assert "a method is one file" in found["helper.py"]
    assert "other characters" in found["odd name.md"]


def test_what_tools_leave_behind_is_no_problem(folder):
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "defense.pyc").write_bytes(b"\x00")
    assert told(folder) == []


def test_sizes(folder, monkeypatch):
    monkeypatch.setattr(static, "MAX_TEXT", 4000)
    monkeypatch.setattr(static, "MAX_FOLDER", 5000)
    monkeypatch.setattr(static, "MAX_FILES", 4)
    (folder / "long.md").write_text("word " * 1000)
    found = {(name, text) for name, _, text in told(folder)}
    assert ("long.md", "has 5,000 bytes, above the limit of 4,000 for such a file") in found
    assert sum("holds" in text for _, text in found) == 2


def test_the_code_is_parsed_and_not_run(folder, tmp_path):
    proof = tmp_path / "ran"
    code = f"import torch, pathlib\npathlib.Path({str(proof)!r}).touch()\n"
    change(folder, ("import torch\n", code), name="defense.py")
    assert told(folder) == []
    assert not proof.exists()


def test_code_that_loads_pickles(folder):
    change(folder, ("import torch\n", "import torch\nimport pickle\nx = torch.load\n"),
           name="defense.py")  # fmt: skip
    assert [one[:2] for one in told(folder)] == [("defense.py", 2), ("defense.py", 3)]


def test_text_that_reads_otherwise_than_it_runs(folder):
    change(folder, ("import torch\n", "import torch  # \u202e\n"), name="defense.py")
    assert only(folder)[:2] == ("defense.py", 1)


def test_a_class_of_another_name(folder):
    change(folder, ("ChannelNoise", "Quiet"), name="defense.py")
    change(folder, ("ChannelNoise", "Quiet"))
    name, line, text = only(folder)
    assert (name, line) == ("defense.py", 5)
    assert 'write name = "channel-noise" in it' in text


def test_names_of_neighbours(folder):
    other = create("other", folder.parent, "defense", "Other", "B")
    change(other, ("name: other", "name: channel-noise"))
    name, line, text = only(folder)
    assert (name, line) == ("submission.yaml", 3)
    assert "see other/submission.yaml:3" in text


def test_a_submission_takes_the_place_of_one_by_the_same_authors(folder):
    create("earlier", folder.parent, "defense", "Earlier", "Ada L.")
    change(folder, ("# supersedes: an-earlier-submission", "supersedes: earlier"))
    assert told(folder) == []
    change(folder, ("Ada L.", "Bob"))
    _, line, text = only(folder)
    assert line == line_of(folder, "supersedes")
    assert "none of the authors of 'earlier'" in text


def test_weights(folder):
    data = save({"basis": torch.zeros(3, 2)})
    (folder / "basis.safetensors").write_bytes(data)
    assert "is not listed under weights" in only(folder)[2]
    change(folder, ("# weights:  ", "weights:  "), ("#   - {file", "  - {file"))
    found = told(folder)
    assert any("of the form" in text for _, _, text in found)
    ((_, line, text),) = [one for one in found if "its SHA-256 is" in one[2]]
    assert line == line_of(folder, "  - {file")
    change(folder, ("sha256: 0000", f"sha256: '{text.rpartition(' ')[2]}'"))
    assert told(folder) == []
    change(folder, ("basis.safetensors", "../basis.safetensors"))
    assert any("nothing outside it is read" in text for _, _, text in told(folder))


def header(values, tail=b""):
    """A file of one tensor whose header says something else than the default."""
    if isinstance(values, dict):
        one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **values}
        values = json.dumps({"a": one}).encode()
    return len(values).to_bytes(8, "little") + values + tail


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"abc", "has no header"),
        ((2**40).to_bytes(8, "little"), "does not fit"),
        (header(b"{no"), "is no JSON"),
        (header({"shape": [2]}, b"0000"), "contradicts"),
        (header({"dtype": "O"}, b"0000"), "contradicts"),
        (header({"shape": [-1]}, b"0000"), "contradicts"),
        (header({}, b"00000"), "behind its last"),
        (header({"data_offsets": [1, 5]}, b"00000"), "a gap"),
        (header(b'{"a": {}, "a": {}}'), "twice"),
    ],
)
def test_headers_of_safetensors_are_checked_without_loading(folder, data, words):
    (folder / "basis.safetensors").write_bytes(data)
    assert any(name == "basis.safetensors" and words in text for name, _, text in told(folder))


def test_a_built_in_with_other_parameters(tmp_path):
    made = create("weak-noise", tmp_path, "defense", "Weak noise", "A")
    (made / "defense.py").unlink()
    (made / "test_weak_noise.py").unlink()
    change(made, ("defense.py:WeakNoise", "noise"), ("params: {} ", "params: {snr_db: 6.0} "))
    assert told(made) == []
    change(made, ("{snr_db: 6.0}", "{snr: 6.0}"))
    _, line, text = only(made)
    assert line == line_of(made, "params")
    assert "did you mean 'snr_db'" in text


def test_targets_of_an_attack(tmp_path):
    made = create("peek", tmp_path, "attack", "Peek", "A")
    change(made, ("[none, noise]", "[none, nois, {name: noise, params: {snr: 1.0}}]"))
    found = told(made)
    assert [one[1] for one in found] == [line_of(made, "targets")] * 2
    change(made, ("targets: [", "# targets: ["))
    assert "name the built-in defenses" in only(made)[2]


def test_a_path_that_is_no_folder(tmp_path):
    (found,) = problems(tmp_path / "nothing")
    assert "is no folder of a submission" in str(found)


def test_licences_are_sorted_and_distinct():
    assert len(set(LICENCES)) == len(LICENCES)


# --- the command ---------------------------------------------------------------------------------


def run(*words):
    return CliRunner().invoke(app, ["submission", *map(str, words)])


def test_the_command_prints_a_line_each_and_exits_with_2(folder):
    assert run("validate", folder).exit_code == 0
    change(folder, ("licence: Apache-2.0", "# licence"), ("seeds: [0]", "seeds: 0"))
    done = run("validate", folder)
    assert done.exit_code == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"{folder}/submission.yaml:2: licence is missing")
    assert f"{folder}: 2 problems" in done.stdout


def test_as_json(folder):
    change(folder, ("seeds: [0]", "seeds: 0"))
    done = run("validate", folder, "--json")
    (found,) = json.loads(done.stdout)[str(folder)]
    assert done.exit_code == 2
    assert found["line"] == 14


@pytest.mark.parametrize(
    "name", ["Noise!", "noise", "linear", "suite", "../up", "-a", "a" * 41, "7wonders", "a--b"]
)
def test_names_that_cannot_be_taken(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    done = run("new", "--", name)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert not (tmp_path / "submissions").exists()


def test_nothing_is_overwritten(folder):
    done = run("new", "channel-noise", "--into", folder.parent)
    assert done.exit_code == 2
    assert "is there already" in done.stderr
