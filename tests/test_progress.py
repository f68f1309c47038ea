from __future__ import annotations

import pytest

from alignfast import progress as module
from alignfast.progress import progress


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
