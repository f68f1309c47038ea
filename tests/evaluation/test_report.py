from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from alignfast.evaluation.matrix_result import Cell, Comparison, TransferMatrix
from alignfast.evaluation.plots import heat_map, write_figure
from alignfast.evaluation.report import Picture, Section, summarise, summary_sentences, write_report
from alignfast.evaluation.statistics import paired

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
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"[ \n]+", " ", "".join(self.words)).replace("\xa0", " ")

    def sources(self) -> list[str]:
        return [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]


def build(
    shifts: dict[str, float],
    attacks: tuple[str, ...] = ("pgd", "mi"),
    targets: tuple[str, ...] = ("vgg", "vit"),
    n: int = 400,
) -> TransferMatrix:
    """Rates of 40 % for "vanilla", and `shifts` more from the others on nested sets of images."""
    cells, comparisons = [], []
    order = np.arange(n)
    for attack in attacks:
        for target in targets:
            base = order < round(0.4 * n)
            for source, shift in {"vanilla": 0.0, **shifts}.items():
                flags = order < round((0.4 + shift) * n)
                numbers = {"clean_accuracy": 0.917, "white_box": 0.983}
                cells.append(Cell.counted(source, attack, target, errors=int(flags.sum()), n=n, **numbers))
                if source != "vanilla":
                    comparisons.append(Comparison.of("vanilla", source, attack, target, paired(base, flags)))
    config = {"protocol": "qualified", "attacks": {"mi": {"eps": 0.0156}}}
    return TransferMatrix(tuple(cells), tuple(comparisons), config, {"torch": "2.14.1"})


def png() -> bytes:
    import io

    buffer = io.BytesIO()
    write_figure(heat_map(build({})), buffer, "png")
    return buffer.getvalue()


def page_of(matrix: TransferMatrix, folder: Path, **options: object) -> Page:
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


def test_page_stands_alone(tmp_path: Path) -> None:
    page = page_of(build({"aligned": 0.1}), tmp_path)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "base"})
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            assert (attributes.get(name) or "data:").startswith("data:")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(", html)
    assert len(page.sources()) == 2
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
    assert "script" not in {tag for tag, _ in page.tags}
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


@pytest.mark.parametrize(
    ("shift", "verdict", "raised", "lowered"),
    [(0.1, "raises", 4, 0), (-0.1, "lowers", 0, 4), (0.0, "no clear change", 0, 0), (0.005, "no clear change", 0, 0)],
)
def test_summary_follows_the_numbers(shift: float, verdict: str, raised: int, lowered: int) -> None:
    matrix = build({"aligned": shift})
    (summary,) = summarise(matrix)
    assert summary.verdict == verdict
    assert (summary.raised, summary.lowered, summary.comparisons) == (raised, lowered, 4)
    assert summary.difference == pytest.approx(shift)
    sentence = summary_sentences(matrix)[0]
    opening = {"no clear change": "makes no clear change to"}.get(verdict, verdict)
    assert sentence.startswith(f"aligned {opening} the error rate of the targets")
    assert "over 4 comparisons (2 attacks and 2 targets)" in sentence


def test_opposite_changes_are_not_averaged_away() -> None:
    up, down = build({"aligned": 0.1}, attacks=("up",)), build({"aligned": -0.1}, attacks=("down",))
    matrix = TransferMatrix(up.cells + down.cells, up.comparisons + down.comparisons)
    first, second = summary_sentences(matrix)
    assert "no clear change" in first
    assert "2 of the 4 show a higher error rate, 2 a lower one and 0 no clear change" in second


def test_holm_covers_all_comparisons() -> None:
    # Six of six discordant images: p = 0.031 alone, 0.125 among four.
    alone, among = build({"aligned": 0.03}, ("mi",), ("vgg",), n=200), build({"aligned": 0.03}, n=200)
    assert summarise(alone)[0].verdict == "raises"
    assert summarise(among)[0].raised == 0


def test_a_single_comparison_needs_its_test_to_agree() -> None:
    # The published table whose interval leaves out 0 and whose exact p-value is 0.052.
    first = np.repeat([True, True, False, False], [59, 6, 16, 80])
    second = np.repeat([True, False, True, False], [59, 6, 16, 80])
    comparison = Comparison.of("a", "b", "mi", "vgg", paired(first, second))
    assert comparison.low > 0
    (summary,) = summarise(TransferMatrix((), (comparison,)))
    assert summary.verdict == "no clear change"


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
    assert summarise(matrix)[0].comparisons == 2
    page = page_of(matrix, tmp_path)
    assert "no images" in page.text
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
