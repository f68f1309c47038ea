"""The page as a browser shows it, without a network."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, sync_playwright

from alignfast.evaluation.report import Section, write_report
from tests.evaluation.matrices import build
from tests.geometry.results import build as geometry_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WIDTHS = {"phone": 390, "desktop": 1280}
LONG = "timm:vit_base_patch16_224.augreg2_in21k_ft_in1k"

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and "CI" not in os.environ, reason="no chromium on the path; where CI is set, that is a failure"
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    section = Section("Alignment", "One.", {"lr": 1e-3}, ("epoch", "note"), [(10, "b"), (9, "a"), (100, "a")])
    matrix = build({"aligned": 0.1, LONG: 0.05}, ("pgd", "mi", "di"), ("vgg", LONG), n=80)
    write_report(
        matrix, path, geometry=geometry_of(("vanilla", "aligned", LONG), ("vgg",), images=1, n=30), extra=[section]
    )
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None, "chromium: found none on the path; install it, as .ci/run does"
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield running
        running.close()


@pytest.fixture(params=WIDTHS)
def page(request: pytest.FixtureRequest, browser: Browser, report: Path) -> Iterator[Page]:
    """The opened page; anything that it complains about or asks for fails the test."""
    context = browser.new_context(viewport={"width": WIDTHS[request.param], "height": 800}, offline=True)
    opened = context.new_page()
    complaints: list[str] = []
    asked: list[str] = []
    opened.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    # Data URIs are part of the file.
    opened.on("request", lambda call: None if call.url.startswith("data:") else asked.append(call.url))
    opened.goto(report.as_uri(), wait_until="load")
    yield opened
    assert complaints == []
    assert asked == [report.as_uri()]
    context.close()


def table(page: Page, label: str) -> Locator:
    return page.get_by_role("region", name=label, exact=True).locator("table")


def column(rows: Locator, number: int) -> list[str]:
    return rows.locator(f"tbody tr td:nth-child({number})").all_inner_texts()


def headers(rows: Locator) -> Locator:
    return rows.locator("thead th")


def styles(page: Page, selector: str, name: str) -> set[str]:
    return set(page.locator(selector).evaluate_all(f"all => all.map(one => getComputedStyle(one).{name})"))


def numbers(texts: list[str]) -> list[float]:
    return [float(re.sub(r"[^\d.+-]", "", text.replace("−", "-").split("[")[0])) for text in texts]


def test_headers_sort_numbers(page: Page) -> None:
    rows = table(page, "All combinations")
    before = column(rows, 4)
    assert headers(rows).nth(3).get_attribute("aria-sort") is None
    headers(rows).nth(3).get_by_role("button").click()
    assert headers(rows).nth(3).get_attribute("aria-sort") == "ascending"
    after = column(rows, 4)
    assert sorted(after) == sorted(before)
    assert numbers(after) == sorted(numbers(before))
    headers(rows).nth(3).get_by_role("button").click()
    assert headers(rows).nth(3).get_attribute("aria-sort") == "descending"
    assert numbers(column(rows, 4)) == sorted(numbers(before), reverse=True)
    headers(rows).nth(0).get_by_role("button").click()
    marked = [headers(rows).nth(k).get_attribute("aria-sort") for k in range(headers(rows).count())]
    assert marked == ["ascending", *[None] * 7]


def test_signed_numbers_are_numbers(page: Page) -> None:
    rows = table(page, "Paired differences of one model")
    headers(rows).nth(3).get_by_role("button").click()
    shown = [float(row.get_attribute("data-key") or "nan") for row in rows.locator("tbody tr td:nth-child(4)").all()]
    assert shown == sorted(shown)
    assert shown[0] < 0 < shown[-1]


def test_the_keyboard_sorts(page: Page) -> None:
    rows = table(page, "Alignment")
    headers(rows).nth(0).get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert column(rows, 1) == ["9", "10", "100"]
    page.keyboard.press("Space")
    assert column(rows, 1) == ["100", "10", "9"]
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    # Equal entries keep the order that they had.
    assert list(zip(column(rows, 2), column(rows, 1), strict=True)) == [("a", "100"), ("a", "9"), ("b", "10")]
    page.keyboard.press("Enter")
    assert list(zip(column(rows, 2), column(rows, 1), strict=True)) == [("b", "10"), ("a", "100"), ("a", "9")]


def test_points_are_sorted_by_their_steps(page: Page) -> None:
    rows = table(page, "Estimates of one model")
    headers(rows).nth(1).get_by_role("button").click()
    assert list(dict.fromkeys(column(rows, 2))) == ["clean", "random", "step 10", "step 20"]


def test_nothing_is_wider_than_the_window(page: Page) -> None:
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for box in page.locator(".scroll").all():
        edges = box.bounding_box()
        assert edges is not None
        assert edges["x"] >= 0
        assert edges["x"] + edges["width"] <= width


def test_every_picture_is_there(page: Page) -> None:
    width = page.viewport_size["width"]
    pictures = page.locator("img")
    assert pictures.count() > 10
    for picture in pictures.all():
        assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
        assert picture.is_visible()
        edges = picture.bounding_box()
        assert edges is not None
        assert edges["width"] > 200
        assert edges["x"] >= 0
        assert edges["x"] + edges["width"] <= width


def test_the_page_prints(page: Page) -> None:
    page.emulate_media(media="print")
    # Nothing is scrolled on paper, and headers with a box of a button would not be repeated.
    assert styles(page, ".scroll", "overflow") == {"visible"}
    assert styles(page, "th button", "display") == {"contents"}
    assert styles(page, "tr, .shot", "breakInside") == {"avoid"}
    document = page.pdf(format="A4")
    assert document.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", document)) > 1


def test_without_scripts_everything_is_there(browser: Browser, report: Path) -> None:
    context = browser.new_context(java_script_enabled=False, offline=True)
    opened = context.new_page()
    opened.goto(report.as_uri())
    assert column(table(opened, "Alignment"), 1) == ["10", "9", "100"]
    assert headers(table(opened, "All combinations")).nth(3).inner_text() == "error rate"
    assert opened.locator("th button").count() == 0
    context.close()


def test_dark_and_light_have_their_own_paper(browser: Browser, report: Path) -> None:
    shades = {}
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme, offline=True)
        opened = context.new_page()
        opened.goto(report.as_uri())
        shades[scheme] = [
            opened.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color")
        ]
        context.close()
    assert shades["light"][0] == "rgb(255, 255, 255)"
    brightness = {
        name: [sum(map(int, re.findall(r"\d+", shade)[:3])) for shade in pair] for name, pair in shades.items()
    }
    assert brightness["dark"][0] < 120 < 600 < brightness["dark"][1]
