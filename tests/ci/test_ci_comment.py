"""The comment on a pull request: whatever the report holds, it is shown and has no effect."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

SCRIPT = Path(__file__).parents[2] / ".ci" / "comment.py"
MODULE = runpy.run_path(str(SCRIPT))
comment, LIMIT = MODULE["comment"], MODULE["LIMIT"]

LINK = "https://example.org/runs/1"


def tokens(text):
    """What a Markdown reader sees, with HTML and tables as on GitHub."""
    return MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)


EVIL = [
    "```\n# out of the block\n@everyone",
    "~~~\n<img src=x>\n~~~",
    "````\n" * 3,
    "<script>alert(1)</script>",
    "</code></pre><h1>approved</h1>",
    "![](https://example.org/pixel.png) @maintainer fixes #1",
    "| a |\n|---|\n| [x](javascript:alert(1)) |",
    "    indented\n\n\n\n</details>",
    "a\u202eb\u2066c\x1b[31md\x00e\u200bf",
    "",
]


@pytest.mark.parametrize("report", EVIL)
def test_a_report_cannot_leave_its_block(report):
    alone(report)


@given(st.text(alphabet=st.sampled_from("`~\n <>&|[]()!@#*_-=\t\r\\x"), max_size=60))
def test_no_mix_of_signs_leaves_the_block(report):
    alone(report)


def alone(report):
    found = tokens(comment(report, LINK))
    kinds = [token.type for token in found]
    paragraph = ["paragraph_open", "inline", "paragraph_close"]
    assert kinds == [*paragraph, "fence", *paragraph]
    told = "".join(found[3].content.split())
    # Nothing is left out but what cannot be seen.
    assert [c for c in report if c.isprintable() and not c.isspace()] == [
        c for c in told if c != "\N{REPLACEMENT CHARACTER}"
    ]
    links = [child.attrs.get("href") for child in found[5].children if child.type == "link_open"]
    assert links == [LINK]


def test_what_hides_text_or_turns_its_direction_is_replaced():
    shown = comment("a\u202eb\u2066c\x1b[31md\x00e\u200bf\ufeffg")
    assert not any(ord(c) in {0x202E, 0x2066, 0x1B, 0, 0x200B, 0xFEFF} for c in shown)


def test_other_languages_are_kept():
    text = "Müller, 王小明, Ελένη, עברית, −0.5 ± 0.1 → ok 🙂"
    assert text in comment(text)


def test_the_length_is_limited():
    shown = comment("x" * 10 * LIMIT)
    assert LIMIT < len(shown) < LIMIT + 1000
    assert "cut after" in shown
    assert "cut after" not in comment("x" * LIMIT)


def called(*words):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, words)],
        capture_output=True,
        encoding="utf-8",
        check=False,
        env={"PYTHONIOENCODING": "utf-8"},
    )


def test_bytes_that_are_no_text_are_shown_as_such(tmp_path):
    (tmp_path / "report.md").write_bytes(b"fine \xff\xfe rest")
    result = called(tmp_path / "report.md", LINK)
    assert result.returncode == 0
    assert "fine \N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER} rest" in result.stdout
    assert LINK in result.stdout


def test_links_and_missing_files_are_refused(tmp_path):
    (tmp_path / "secret").write_text("token")
    (tmp_path / "report.md").symlink_to(tmp_path / "secret")
    for name in ("report.md", "missing.md", "."):
        result = called(tmp_path / name)
        assert result.returncode == 1
        assert "token" not in result.stdout
        assert result.stderr.startswith("error: ")
