from __future__ import annotations

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from alignfast.evaluation import report
from alignfast.evaluation.findings import geometry_sentences, number_text, signed_text
from alignfast.evaluation.matrix_result import Cell, Comparison, TransferMatrix
from alignfast.evaluation.plots import heat_map, write_figure
from alignfast.evaluation.report import READING, Picture, Section, render_report, write_report
from alignfast.evaluation.statistics import paired
from alignfast.geometry.measures import MEASURES, PAIR_MEASURES
from alignfast.geometry.pictures import draw
from alignfast.geometry.result import GeometryResult
from tests.evaluation.matrices import build
from tests.geometry.results import build as geometry_of

FEW = ("clean", "step 3")
HOSTILE = "<script>alert('x')</script>&\"{{ 7*7 }}"
VOID = {"meta", "img", "wbr", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects text, attributes and tags, and fails where elements are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"[ \n]+", " ", "".join(self.words)).replace("\xa0", " ")

    def sources(self) -> list[str]:
        return [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the pictures of geometries, for tests of words."""
    monkeypatch.setattr(report, "draw", lambda *_: ())


def png() -> bytes:
    import io

    buffer = io.BytesIO()
    write_figure(heat_map(build({})), buffer, "png")
    return buffer.getvalue()


def page_of(matrix: TransferMatrix | None, folder: Path, **options: object) -> Page:
    path = folder / "report.html"
    write_report(matrix, path, **options)  # type: ignore[arg-type]
    assert [file.name for file in folder.iterdir()] == ["report.html"]
    return Page(path.read_text(encoding="utf-8"))


def test_page_holds_every_number(tmp_path: Path) -> None:
    matrix = build({"aligned": 0.1, "worse": -0.07})
    page = page_of(matrix, tmp_path, title="A run")
    for cell in matrix.cells:
        assert f"{100 * cell.rate:.1f} %" in page.text
        assert f"[{100 * cell.low:.1f}, {100 * cell.high:.1f}]" in page.text
    for word in ("A run", "91.7 %", "98.3 %", "attacks.mi.eps", "0.0156", "torch", "2.14.1", "+10.0 [", "−7.0 ["):
        assert word in page.text
    assert "This report uses the protocol “qualified”." in page.text
    rows = sum(tag == "tr" for tag, _ in page.tags)
    assert rows == 2 + len(matrix.cells) + len(matrix.comparisons) + 3


@pytest.mark.parametrize("geometry", [None, geometry_of(others=("vgg",), points=FEW, images=1, n=12)])
def test_page_stands_alone(geometry: GeometryResult | None, tmp_path: Path) -> None:
    page = page_of(build({"aligned": 0.1}), tmp_path, geometry=geometry)
    assert {tag for tag, _ in page.tags}.isdisjoint({"link", "iframe", "object", "base"})
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [{}]
    for _, attributes in page.tags:
        for name in ("src", "srcset", "action", "data"):
            assert (attributes.get(name) or "data:").startswith("data:")
    ids = [f"#{attributes['id']}" for _, attributes in page.tags if "id" in attributes]
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links == ids
    assert not any("href" in attributes for tag, attributes in page.tags if tag != "a")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(", html)
    assert len(page.sources()) == (2 if geometry is None else 2 + len(list(draw(geometry))))
    for source in page.sources():
        svg = base64.b64decode(source.removeprefix("data:image/svg+xml;base64,")).decode()
        assert svg.startswith("<?xml")
        assert not re.search(r"<script|(src|href)=\"http", svg)
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")


def test_names_and_sections_are_escaped(tmp_path: Path) -> None:
    cells = (Cell.counted(HOSTILE, HOSTILE, HOSTILE, errors=1, n=4),)
    matrix = TransferMatrix(cells, (), {HOSTILE: HOSTILE}, {HOSTILE: HOSTILE})
    section = Section(HOSTILE, HOSTILE, {HOSTILE: HOSTILE}, (HOSTILE,), [(HOSTILE,)], [Picture(png(), HOSTILE)])
    page = page_of(matrix, tmp_path, title=HOSTILE, extra=[section])
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert page.text.count(HOSTILE) >= 14
    assert "49" not in page.text.replace("{{ 7*7 }}", "")[:200]
    assert [attributes["alt"] for tag, attributes in page.tags if tag == "img"][-1] == HOSTILE


def test_sections_are_shown(tmp_path: Path) -> None:
    picture = Picture(png(), "before and after")
    section = Section(
        "Alignment", "One.\n\nTwo.", {"lr": 1e-3, "witness": {"seed": 3}}, ("epoch", "loss"), [(1, 0.25)], [picture]
    )
    page = page_of(build({}), tmp_path, extra=[section])
    for word in ("Alignment", "One.", "Two.", "0.001", "witness.seed", "epoch", "0.25", "before and after"):
        assert word in page.text
    assert picture.uri in page.sources()


def test_sections_are_checked() -> None:
    with pytest.raises(ValueError, match=r"rows\[1\]: got 1 values; allowed are 2"):
        Section("x", header=("a", "b"), rows=[(1, 2), (1,)])
    with pytest.raises(ValueError, match="png: got 3 bytes"):
        Picture(b"GIF")


def test_without_comparisons_nothing_is_compared(tmp_path: Path) -> None:
    page = page_of(build({}), tmp_path)
    assert "The error rate of the targets is 40.0 % over 4 combinations." in page.text
    assert "No two sources were compared" in page.text
    assert "Newcombe" not in page.text


def test_comparisons_of_no_images_are_left_out(tmp_path: Path) -> None:
    nothing = np.zeros(0, bool)
    matrix = build({"aligned": 0.1}, attacks=("mi",))
    cells = tuple(Cell.counted(source, "di", "vgg", errors=0, n=0) for source in ("vanilla", "aligned"))
    empty = Comparison.of("vanilla", "aligned", "di", "vgg", paired(nothing, nothing))
    matrix = TransferMatrix(matrix.cells + cells, (*matrix.comparisons, empty))
    page = page_of(matrix, tmp_path)
    assert "no images" in page.text
    assert "over 2 comparisons" in page.text
    assert "nan" not in page.text.lower()


def test_many_attacks_are_drawn_on_several_pages(tmp_path: Path) -> None:
    attacks = tuple(f"a{i}" for i in range(14))
    page = page_of(build({"aligned": 0.1}, attacks, ("vgg",), n=40), tmp_path)
    assert len(page.sources()) > 2


def test_same_matrix_gives_the_same_bytes(tmp_path: Path) -> None:
    write_report(build({"aligned": 0.1}), tmp_path / "a.html")
    write_report(build({"aligned": 0.1}), tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_an_empty_matrix_is_refused_and_the_old_page_kept(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(ValueError, match="matrix: got no cells"):
        write_report(TransferMatrix(()), path)
    assert path.read_text(encoding="utf-8") == "old"


@pytest.mark.usefixtures("undrawn")
def test_a_geometry_alone_has_every_number_and_no_word_of_transfer(tmp_path: Path) -> None:
    geometry = geometry_of(n=30)
    page = page_of(None, tmp_path, geometry=geometry, title="Surfaces")
    for entry in geometry.estimates:
        assert number_text(entry.mean) in page.text
        assert f"[{number_text(entry.low)}, {number_text(entry.high)}]" in page.text
    for difference in geometry.differences:
        assert signed_text(difference.difference) in page.text
    for word in ("Surfaces", "2 models, 2 other models, 4 points of each image", "30 images", "aligned vs vanilla"):
        assert word in page.text
    for sentence in geometry_sentences(geometry):
        assert sentence in page.text
    for word in ("Error rates at a glance", "McNemar", "All combinations"):
        assert word not in page.text
    rows = sum(tag == "tr" for tag, _ in page.tags)
    assert rows == 4 + len(geometry.estimates) + len(geometry.differences) + len(geometry.config) + 2


@pytest.mark.usefixtures("undrawn")
def test_every_measure_is_said_and_how_to_read_it(tmp_path: Path) -> None:
    assert set(READING) == set(MEASURES) | set(PAIR_MEASURES)
    page = page_of(None, tmp_path, geometry=geometry_of(points=FEW, n=12))
    for name, text in {**MEASURES, **PAIR_MEASURES}.items():
        assert f"{name} {text[0].upper()}{text[1:]}. {READING[name]}" in page.text
    alone = page_of(None, tmp_path, geometry=geometry_of(others=(), points=FEW, n=12))
    assert READING["curvature"] in alone.text
    assert READING["kl"] not in alone.text


@pytest.mark.usefixtures("undrawn")
def test_both_are_told_on_one_page(tmp_path: Path) -> None:
    matrix, geometry = build({"aligned": 0.1}), geometry_of(points=FEW, n=20)
    page = page_of(matrix, tmp_path, geometry=geometry, beside=["matrix.json", "geometry.csv"])
    first = page.text.index("aligned raises the error rate of the targets")
    assert first < page.text.index("aligned against vanilla at the clean image")
    for word in ("Settings of the transfer", "Settings of the geometry", "matrix.json, geometry.csv"):
        assert word in page.text
    alike = replace(geometry, versions=matrix.versions)
    assert "Versions of the" in page.text
    assert "Versions of the" not in page_of(matrix, tmp_path, geometry=alike).text


def test_what_was_not_measured_leaves_no_hole(tmp_path: Path) -> None:
    bare = replace(geometry_of(["vanilla"], others=(), images=0, n=12), profile=None)
    page = page_of(None, tmp_path, geometry=bare)
    assert "No losses of two models were compared" in page.text
    assert "Paired differences of one model" not in page.text
    assert "nan" not in page.text.lower().replace("nanmean", "")
    assert len(page.sources()) == 2


def test_missing_numbers_are_sorted_as_such(tmp_path: Path) -> None:
    cells = (Cell.counted("a", "mi", "x", errors=0, n=0), Cell.counted("a", "mi", "y", errors=1, n=4))
    page = page_of(TransferMatrix(cells), tmp_path)
    keys = [attributes.get("data-key") for tag, attributes in page.tags if tag == "td"][:16]
    assert keys[3:8] == ["", "", "0.0", "", ""]
    assert keys[11] == "0.25"
    assert keys[:3] == [None, None, None]


def test_nothing_to_report_is_refused() -> None:
    with pytest.raises(ValueError, match="matrix, geometry: got neither"):
        render_report(None)
    with pytest.raises(ValueError, match="geometry: got no estimates"):
        render_report(build({}), replace(geometry_of(n=4), estimates=()))
