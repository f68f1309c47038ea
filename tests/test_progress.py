from __future__ import annotations

import re

import pytest

from alignfast import progress as module
from alignfast.progress import board, progress


def test_plain_lines_on_standard_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A line when enough time has passed, and one at the end; nothing on standard output."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with progress("align", 8, "steps") as advance:
        for seconds in (4, 4, 4, 11):
            now[0] += seconds
            advance(2, f"loss {now[0]:.0f}")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["align: 6/8 steps, 12 s loss 112", "align: 8/8 steps, 23 s loss 123"]


def test_nothing_is_printed_unless_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("align", 2, "steps", shown=False) as advance:
        advance(2, "done")
    assert capsys.readouterr() == ("", "")


def test_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Names may hold what the console would read as markup, and lines may be longer than its width."""
    label, note = "vit[b] {0}", "resnet[bold]50 " + "x" * 120
    with progress(label, 1, "batches") as advance:
        advance(1, note)
    assert capsys.readouterr().err == f"{label}: 1/1 batches, 0 s {note}\n"


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with progress("vit[b] {0}", 4, "batches") as advance:
        advance(3, "loss [b]1.5")
        advance(1, "loss [b]0.5")
    captured = capsys.readouterr()
    assert captured.out == ""
    for text in ("vit[b] {0}", "4/4", "loss [b]0.5", "\x1b["):
        assert text in captured.err


def test_an_error_passes_through(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with progress("align", 2, "steps") as advance:
            advance(1, "")
            raise KeyError("k")

    with pytest.raises(KeyError, match="k"):
        fail()
    assert "2/2" not in capsys.readouterr().err


def test_a_board_has_lines_of_the_whole_and_of_what_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with board("transfer", [("clean", 2), ("vanilla, mi", 3)], "batches") as (clean, attack):
        for advance, note in (
            (clean, ""),
            (clean, ""),
            (attack, "attacking 5 images/s"),
            (attack, "done"),
            (attack, ""),
        ):
            now[0] += 4
            advance(1, note)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "transfer: 3/5 batches, 12 s vanilla, mi attacking 5 images/s",
        "transfer: 5/5 batches, 20 s vanilla, mi",
    ]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", "140"), ("LINES", "10")):
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("terminal")
def test_a_board_on_a_terminal_says_what_waits_runs_and_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("clean", 1), ("vanilla, mi[b] {0}", 4), ("aligned, mi", 2)]
    with board("transfer", rows, "batches") as (clean, vanilla, _):
        clean(1, "3 images/s")
        vanilla(1, "measuring vgg[b] 7.5 images/s")
    last = screen(capsys.readouterr().err)
    # The last column is the time that is left.
    assert [line.split()[:-1] for line in last] == [
        ["transfer", "2/7"],
        ["clean", "1/1", "done"],
        ["vanilla,", "mi[b]", "{0}", "1/4", "measuring", "vgg[b]", "7.5", "images/s"],
        ["aligned,", "mi", "0/2", "waiting"],
    ]


@pytest.mark.usefixtures("terminal")
def test_a_long_board_shows_the_rows_around_the_one_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with board("transfer", [(f"row{number}", 1) for number in range(40)], "batches") as advances:
        for advance in advances[:20]:
            advance(1, "")
    shown = [line.split()[0] for line in screen(capsys.readouterr().err)]
    # Ten lines, of which four are left to others.
    assert shown == ["transfer", *(f"row{number}" for number in range(16, 22))]
    with board("transfer", [(f"row{number}", 1) for number in range(40)], "batches") as advances:
        for advance in advances:
            advance(1, "")
    shown = [line.split()[0] for line in screen(capsys.readouterr().err)]
    assert shown == ["transfer", *(f"row{number}" for number in range(34, 40))]


def screen(written: str) -> list[str]:
    """The lines of the last frame, without colours and bars."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written).replace("\r", "\n")
    lines = [re.sub(r"[━╸╺]+", " ", line) for line in plain.splitlines() if line.strip()]
    start = max(place for place, line in enumerate(lines) if line.startswith("transfer"))
    return lines[start:]


def test_a_board_is_silent_unless_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with board("transfer", [("a", 1)], "batches", shown=False) as (advance,):
        advance(1, "")
    assert capsys.readouterr() == ("", "")
