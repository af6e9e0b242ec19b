"""The pages in a browser: they sort, filter and tell, and nothing leaves the machine.

The browser is that of ``MIBENCH_CHROMIUM``, else ``chromium`` on the path, else Playwright's own.
"""

import io
import os
import shutil
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
from board_pages import ADVISORY, edited, small_board, with_gallery
from PIL import Image

from mibench.board import page

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
PHONE = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def browser():
    path = os.environ.get("MIBENCH_CHROMIUM") or shutil.which("chromium")
    with sync_api.sync_playwright() as playwright:
        try:
            made = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        except sync_api.Error as error:
            if os.environ.get("MIBENCH_CHROMIUM"):
                raise  # who names a browser wants these tests
            first = str(error).strip().splitlines()[0]
            pytest.skip(f"no browser: set MIBENCH_CHROMIUM to a chromium ({first})")
        yield made
        made.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A written board with a picture, an advisory and a reason for a dash."""
    root, board = small_board(tmp_path_factory.mktemp("browser"))
    first, last = board.sections[0].rows[0], len(board.sections[0].rows) - 1
    board = with_gallery(board, 0, [5, 0, 1, 2, 3])
    board = with_gallery(board, 1, [5, 0, 1, 2, 3])
    board = edited(board, last, advisories=(ADVISORY,))
    pixels = np.random.default_rng(0).integers(0, 256, (5 * 32, 3 * 32, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="WEBP", lossless=True)
    for row in board.sections[0].rows[:2]:
        (root / "records" / row.headline[0].id / "gallery.webp").write_bytes(buffer.getvalue())
    for name, data in page.render(board, root).items():
        path = root / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root / "site", board, first


@contextmanager
def opened(browser, address, **options):
    """A page that fails the test on any error, and on any request beyond this disk."""
    context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}} | options)
    context.set_default_timeout(150_000)  # milliseconds; a machine may be busy with other tests
    wrong = []
    context.on("request", lambda r: r.url.startswith(("file:", "data:")) or wrong.append(r.url))
    context.on("requestfailed", lambda r: wrong.append(f"failed: {r.url}"))
    view = context.new_page()
    view.on("console", lambda message: wrong.append(f"console: {message.text}"))
    view.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    try:
        view.goto(address)
        yield view
        assert wrong == []
    finally:
        context.close()


@pytest.fixture
def index(browser, site):
    with opened(browser, (site[0] / "index.html").as_uri()) as view:
        yield view


def labels(view, body="tbody"):
    """Names of the rows that are in sight, from the top."""
    return view.locator(f"{body} tr[data-text]:visible .c-defense a").all_inner_texts()


def address(view):
    """Where the page says it is; `view.url` is told of a changed address a moment later."""
    return view.evaluate("location.href")


def head(view, key):
    return view.locator(f"thead [data-key={key}]")


def numbers(view, body, key):
    rows = view.locator(f"{body} tr[data-text]:visible .c-{key}").all()
    return [float(row.get_attribute("data-value")) for row in rows]


# --- sorting and filtering -----------------------------------------------------------------------


def test_a_click_sorts_and_another_turns_it_round(index):
    for key, descending in (("ssim", False), ("accuracy", True)):
        head(index, key).get_by_role("button").click()
        once = numbers(index, "tbody.ranked", key)
        assert once == sorted(once, reverse=descending)
        assert head(index, key).get_attribute("aria-sort") == (
            "descending" if descending else "ascending"
        )
        head(index, key).get_by_role("button").click()
        twice = numbers(index, "tbody.ranked", key)
        assert twice == sorted(once, reverse=not descending)
        assert twice[0] != twice[-1]
        assert index.locator("thead [aria-sort]").count() == 1


def test_what_has_no_value_stands_last_either_way(index):
    button = head(index, "gain-ssim").get_by_role("button")
    for _ in range(2):
        button.click()
        values = [
            row.get_attribute("data-value")
            for row in index.locator("tbody.ranked tr[data-text] .c-gain-ssim").all()
        ]
        assert "" in values
        assert any(values)
        assert values == sorted(values, key=lambda value: value == "")


def test_remarks_stay_below_their_row(index):
    def pairs():
        return index.evaluate(
            "[...document.querySelectorAll('tr.remarks')].map(one => "
            "[one.previousElementSibling.dataset.row, one.innerText])"
        )

    before = dict(pairs())
    head(index, "defense").get_by_role("button").click()
    head(index, "defense").get_by_role("button").click()
    assert dict(pairs()) == before
    assert before


def test_sorting_never_mixes_ranked_and_unranked_rows(index):
    ranked = set(labels(index, "tbody.ranked"))
    head(index, "ssim").get_by_role("button").click()
    assert set(labels(index, "tbody.ranked")) == ranked
    assert labels(index)[: len(ranked)] == labels(index, "tbody.ranked")


def test_filters_hide_rows_with_their_remarks_and_count(index):
    everything = labels(index)
    index.locator("[name=attack]").select_option("decoder")
    assert labels(index) == ["vib"]
    assert index.locator("tr.remarks:visible").count() == 1
    assert index.locator("#count").inner_text() == f"1 of {len(everything)} rows"
    index.locator("button[type=reset]").click()
    assert labels(index) == everything
    index.locator("[name=q]").fill("NOISE 6")
    assert labels(index) == [name for name in everything if "noise" in name]
    index.locator("[name=q]").fill("given")  # the name of a submission
    assert labels(index) == ["given"]
    index.locator("[name=q]").fill("nothing like it")
    assert labels(index) == []
    assert index.locator("#none").is_visible()
    assert not index.locator("section.protocol").is_visible()
    index.locator("[name=q]").fill("")
    index.locator("[name=ranked]").check()
    assert labels(index) == labels(index, "tbody.ranked")
    assert 0 < len(labels(index)) < len(everything)


@pytest.mark.parametrize("key", ["dataset", "backbone", "protocol", "adversary", "badge"])
def test_every_filter_has_its_choices(index, key):
    everything, choices = labels(index), index.locator(f"[name={key}] option").all_inner_texts()
    assert choices[0] == "all"
    assert len(choices) > 1
    shown = []
    for choice in choices[1:]:
        index.locator(f"[name={key}]").select_option(choice)
        shown += labels(index)
    assert sorted(shown) == sorted(everything)


def test_the_address_keeps_the_view(browser, site, index):
    index.locator("[name=q]").fill("noise")
    head(index, "psnr").get_by_role("button").click()
    head(index, "psnr").get_by_role("button").click()
    assert "q=noise" in address(index)
    assert "sort=psnr.down" in address(index)
    with opened(browser, address(index)) as again:
        assert again.locator("[name=q]").input_value() == "noise"
        assert labels(again) == labels(index)
        assert head(again, "psnr").get_attribute("aria-sort") == "descending"


def test_an_address_that_means_nothing_does_no_harm(browser, site):
    for tail in ("#sort=nothing.up&attack=%3Cb%3E", "#nowhere", "#a=%", "#sort=rank"):
        with opened(browser, (site[0] / "index.html").as_uri() + tail) as view:
            assert len(labels(view)) == 6


def test_an_anchor_is_no_filter(browser, site):
    with opened(browser, (site[0] / "index.html").as_uri() + "#reading") as view:
        assert len(labels(view)) == 6
        assert address(view).endswith("#reading")
        assert view.locator("#reading").is_visible()


# --- the plot and the tooltips -------------------------------------------------------------------


def test_hovering_a_mark_tells_its_numbers(index, site):
    _, _, row = site
    mark = index.locator(f'.mark[data-row="{row.slug}"]').first
    assert not index.locator("#tip").is_visible()
    mark.hover()
    tip = index.locator("#tip").inner_text()
    assert row.label in tip
    assert "accuracy" in tip
    assert "leakage (SSIM)" in tip
    assert "FLOPs" in tip
    index.mouse.move(1, 1)
    assert not index.locator("#tip").is_visible()


def test_a_mark_leads_to_its_row(index, site):
    _, _, row = site
    index.locator(f'.mark[data-row="{row.slug}"]').first.click()
    index.wait_for_url(f"**/rows/{row.slug}.html")
    assert index.locator("h1").inner_text() == row.label


def test_a_filter_fades_the_other_marks(index):
    index.locator("[name=attack]").select_option("decoder")
    faded = index.locator("svg.plot .mark.faded")
    assert 0 < faded.count() < index.locator("svg.plot .mark").count()


def test_headings_and_dashes_explain_themselves(index):
    head(index, "ssim").hover()
    assert "similarity" in index.locator("#tip").inner_text()
    index.locator(".c-lpips .why").first.hover()
    assert "weights" in index.locator("#tip").inner_text()
    box = index.locator("#tip").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 1440


# --- keyboard, phone, dark, print, no scripts ----------------------------------------------------


def test_what_is_told_on_focus_is_tied_to_its_element(index):
    dash = index.locator(".why").first
    text = dash.get_attribute("data-tip")
    dash.focus()
    tied = dash.get_attribute("aria-describedby")
    assert index.locator(f"#{tied}").inner_text() == text
    index.locator("h1 a, nav a").first.focus()
    assert dash.get_attribute("aria-describedby") is None


def test_the_filter_hides_no_heading_that_one_jumps_to(index):
    index.evaluate("document.body.style.paddingBottom = '200vh'")  # room to scroll so far
    for link in index.locator("nav a").all():
        link.click()
        target = index.locator(f"{link.get_attribute('href')} > h2")
        index.wait_for_function("scrollY > 0")
        bar = index.locator("form.filters").bounding_box()
        assert target.bounding_box()["y"] >= bar["y"] + bar["height"]
        index.evaluate("scrollTo(0, 0)")


def test_the_keyboard_is_enough(index):
    index.keyboard.press("Tab")
    assert index.evaluate("document.activeElement.className") == "skip"
    head(index, "psnr").get_by_role("button").focus()
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    index.keyboard.press("Shift+Tab")
    index.keyboard.press("Tab")
    assert index.evaluate(outline) != "none"
    index.keyboard.press("Enter")
    assert head(index, "psnr").get_attribute("aria-sort") == "ascending"
    assert index.evaluate("document.activeElement.tagName") == "BUTTON"
    index.locator("svg.plot a.mark").first.focus()
    assert index.locator("#tip").is_visible()
    index.keyboard.press("Escape")
    assert not index.locator("#tip").is_visible()
    index.locator("tbody .c-defense a").first.focus()
    index.keyboard.press("Enter")
    index.wait_for_url("**/rows/*.html")


@pytest.mark.parametrize("name", ["index.html", "row"])
def test_a_phone_scrolls_down_only(browser, site, name):
    folder, _, row = site
    path = folder / (name if name != "row" else f"rows/{row.slug}.html")
    with opened(browser, path.as_uri(), viewport=PHONE, has_touch=True) as view:
        wide = "document.documentElement.scrollWidth"
        assert view.evaluate(wide) <= PHONE["width"]
        for one in view.locator("details").all():
            one.locator("summary").first.click()
        assert view.evaluate(wide) <= PHONE["width"]
        boxes = view.locator(".scroll")
        assert boxes.count() > 0
        for box in boxes.all():
            assert box.get_attribute("tabindex") == "0"  # the keyboard can scroll it


def test_dark_is_dark_and_light_is_light(browser, site):
    shades = {}
    for scheme in ("light", "dark"):
        with opened(browser, (site[0] / "index.html").as_uri(), color_scheme=scheme) as view:
            shades[scheme] = [
                view.evaluate(f"getComputedStyle(document.querySelector({place!r})).{what}")
                for place, what in (("body", "backgroundColor"), ("body", "color"))
            ]

    def light(colour):
        return sum(map(int, colour[4:-1].split(",")))

    assert light(shades["light"][0]) > light(shades["light"][1]) + 400
    assert light(shades["dark"][1]) > light(shades["dark"][0]) + 400


CONTRAST = """
() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const lum = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (one) => {
    for (let at = one; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const low = [];
  for (const one of document.querySelectorAll("body *")) {
    const own = [...one.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || one.closest("svg, script, style") || !one.checkVisibility()) continue;
    const both = [lum(parse(getComputedStyle(one).color)), lum(behind(one))];
    const contrast = (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
    if (contrast < 4.5) low.push(one.outerHTML.slice(0, 120));
  }
  return low;
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["index.html", "row"])
def test_text_stands_out_from_its_ground(browser, site, scheme, name):
    folder, _, row = site
    path = folder / (name if name != "row" else f"rows/{row.slug}.html")
    with opened(browser, path.as_uri(), color_scheme=scheme) as view:
        assert view.evaluate(CONTRAST) == []


def test_without_scripts_everything_can_be_read(browser, site, index):
    with opened(browser, (site[0] / "index.html").as_uri(), java_script_enabled=False) as view:
        names = view.locator("tbody tr[data-text] .c-defense a").all_inner_texts()
        assert names == labels(index)
        assert not view.locator("form.filters").is_visible()
        assert view.locator("#reading").is_visible()
        assert view.locator("tr.remarks").first.is_visible()
        assert view.locator("thead [data-key=ssim]").get_attribute("title")
        assert view.locator("svg.plot .mark > title").count() > 0


def test_on_paper_nothing_is_cut(index):
    index.emulate_media(media="print")
    assert not index.locator("form.filters").is_visible()
    assert index.evaluate("getComputedStyle(document.querySelector('.scroll')).overflowX") == (
        "visible"
    )
    assert len(labels(index)) == 6


# --- a row's page --------------------------------------------------------------------------------


def test_a_rows_page_has_its_pictures_from_this_disk(browser, site):
    folder, _, row = site
    with opened(browser, (folder / "rows" / f"{row.slug}.html").as_uri()) as view:
        assert view.locator("svg.crop").count() == 15
        # a cell shows its part of the picture: pixels of two cells differ, and none is empty
        cells = [view.locator("svg.crop").nth(n).screenshot() for n in (0, 1)]
        found = [np.asarray(Image.open(io.BytesIO(one)).convert("RGB")).std() for one in cells]
        assert min(found) > 20
        assert cells[0] != cells[1]
        assert view.evaluate(
            "getComputedStyle(document.querySelector('#sheet')).imageRendering"
        ) == ("pixelated")


def test_a_rows_page_has_its_headings_in_order(browser, site):
    folder, _, row = site
    with opened(browser, (folder / "rows" / f"{row.slug}.html").as_uri()) as view:
        levels = view.evaluate(
            "[...document.querySelectorAll('h1,h2,h3,h4')].map(one => Number(one.tagName[1]))"
        )
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(b - a <= 1 for a, b in pairwise(levels))
        for table in view.locator("table").all():
            assert table.locator("caption").count() == 1
            assert table.locator("thead th").evaluate_all("all => all.every(one => one.scope)")
        view.locator(".crumbs a").first.click()
        view.wait_for_url("**/index.html")


def test_every_page_opens_without_an_error(browser, site):
    folder = site[0]
    for path in sorted(folder.rglob("*.html")):
        with opened(browser, path.as_uri()) as view:
            assert view.locator("h1").count() == 1
