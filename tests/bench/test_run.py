"""The runner as a person uses it: what it prints, what it writes, and how it ends."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import harness
from bench import run as runner
from bench.registry import Case, select

Choose = Callable[[Sequence[Case]], None]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Choose:
    """Makes the runner take these cases, whatever is asked for; none of them waited for a core."""

    def choose(cases: Sequence[Case]) -> None:
        monkeypatch.setattr(runner, "select", lambda *arguments, **settings: list(cases))
        monkeypatch.setattr(harness, "waiting", lambda: 0.0)

    return choose


def small(op: str = "sign_step", match: str = "plain", **targets: float) -> Case:
    case = select([op], ["fp32"], match, smallest=True)[0]
    return replace(case, shape=(2, 3, 8, 8), targets=targets)


def wrong(case: Case) -> Case:
    def build(*arguments: object) -> object:
        work = case.build(*arguments)
        return replace(work, expected=lambda: tuple(tensor + 1 for tensor in work.ours()))

    return replace(case, variant="broken", build=build)


ARGUMENTS = ["--no-compile", "--seconds", "0"]


def test_the_table_and_the_file_hold_everything(
    chosen: Choose, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "123")
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    chosen([small(copy=1e9), small("philox_uniform", "unit")])
    path = tmp_path / "out.json"
    assert runner.run([*ARGUMENTS, "--threads", "1", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    for word in ("sign_step", "philox_uniform", "plain", "2x3x8x8", "vs eager", "of copy", "missed: copy 1e+09"):
        assert word in printed
    assert " 1 thread," in printed
    assert "MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ are not both set" in printed
    assert "compiled" not in printed
    written = json.loads(path.read_text())
    assert written["settings"] == {"device": "cpu", "threads": 1, "seconds": 0.0, "compile": False}
    assert written["versions"]["torch"] == torch.__version__.partition("+")[0]
    machine = written["machine"]
    assert machine["allocator"] == {"MALLOC_MMAP_THRESHOLD_": "123", "MALLOC_TRIM_THRESHOLD_": None}
    assert machine["backends"]["cpu"]["loaded"] is True
    assert machine["kernels"] in {"baseline", "avx2", "avx512"}
    assert machine["processor"]
    step, draws = written["cases"]
    assert step["name"] == "sign_step/plain/fp32/2x3x8x8"
    assert step["bytes"] == 4 * 2 * 3 * 8 * 8 * 4
    assert step["wrong"] is None
    assert step["rounds"] == dict.fromkeys(("measured", "quiet"), harness.LEAST_ROUNDS)
    assert step["disturbed"] is False
    assert list(step["seconds"]) == ["ours", "eager", "copy"]
    assert list(step["ratios"]) == ["eager", "copy"]
    assert set(step["seconds"]["ours"]) == {"median", "low", "high", "least"}
    assert step["ratios"]["eager"]["median"] == pytest.approx(
        step["seconds"]["eager"]["median"] / step["seconds"]["ours"]["median"]
    )
    assert step["gigabytes_per_second"] == pytest.approx(step["bytes"] / step["seconds"]["ours"]["median"] / 1e9)
    assert (step["targets"], step["missed"]) == ({"copy": 1e9}, ["copy"])
    assert (draws["targets"], draws["missed"]) == ({}, [])


def test_a_wrong_result_has_no_speed_and_fails(
    chosen: Choose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen([wrong(small(eager=1e9)), small()])
    path = tmp_path / "out.json"
    assert runner.run([*ARGUMENTS, "--json", str(path)]) == 1
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "broken" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[:4] == ["broken", "fp32", "2x3x8x8", "0.0"]
    assert cells[4:-1] == [""] * 4
    assert cells[-1].startswith("WRONG: ours: result 0 is off by")
    broken, right = json.loads(path.read_text())["cases"]
    assert broken["wrong"].startswith("ours: result 0")
    assert (broken["seconds"], broken["ratios"], broken["gigabytes_per_second"]) == ({}, {}, None)
    assert right["seconds"]


def test_only_the_gate_fails_on_a_missed_target(chosen: Choose, capsys: pytest.CaptureFixture[str]) -> None:
    chosen([small(copy=1e9)])
    assert runner.run(ARGUMENTS) == 0
    assert runner.run([*ARGUMENTS, "--gate"]) == 1
    chosen([small(copy=1e-9)])
    assert runner.run([*ARGUMENTS, "--gate"]) == 0
    assert "met" in capsys.readouterr().out


def test_the_gate_does_not_pass_what_was_disturbed(
    chosen: Choose, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen([small(copy=1e-9)])
    told = iter(range(0, 10**9, 10**6))
    monkeypatch.setattr(harness, "waiting", lambda: float(next(told)))
    assert runner.run([*ARGUMENTS, "--gate"]) == 1
    assert "DISTURBED" in capsys.readouterr().out
    assert runner.run(ARGUMENTS) == 0
    chosen([small()])
    assert runner.run([*ARGUMENTS, "--gate"]) == 0


def test_a_run_that_breaks_off_leaves_no_file(chosen: Choose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **settings: object) -> None:
        raise KeyboardInterrupt

    chosen([small()])
    monkeypatch.setattr(runner, "measure", interrupted)
    assert runner.run(["--json", str(tmp_path / "out.json")]) == runner.INTERRUPTED
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_finished_is_not_begun(
    chosen: Choose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError("no space left")

    chosen([small()])
    monkeypatch.setattr(Path, "replace", full)
    assert runner.run([*ARGUMENTS, "--json", str(tmp_path / "out.json")]) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "sign_stepp"], "op: got unknown op 'sign_stepp' (did you mean 'sign_step'?)"),
        (["--dtype", "fp8"], "dtype: got unknown dtype 'fp8'"),
        (["--match", "nothing has this"], "match: got 'nothing has this'"),
        (["--seconds", "-1"], "seconds: got -1.0"),
        (["--threads", "0"], "threads: got 0"),
        (["--device", "tpu"], "device: got 'tpu'"),
        (["--json", "/no/such/folder/out.json"], "json: cannot write to /no/such/folder"),
        (["--opp", "sign_step"], "No such option: --opp"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.run(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"bench: {message}")


def test_another_run_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    path.write_text("{}")
    assert runner.run(["--json", str(path)]) == 2
    assert path.read_text() == "{}"
    assert "exists" in capsys.readouterr().err


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.run(["--list", "--op", "smooth", "--quick"]) == 0
    assert capsys.readouterr().out.splitlines() == ["smooth/15x15/fp32/8x3x224x224", "smooth/15x15/bf16/8x3x224x224"]


def test_no_note_where_the_allocator_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in runner.ALLOCATOR:
        monkeypatch.setenv(name, "1")
    settings = runner.Settings("cpu", 1, 1.0, False)
    assert len(runner.notes(runner.machine(), settings)) == 1
    monkeypatch.delenv(runner.ALLOCATOR[0])
    assert len(runner.notes(runner.machine(), settings)) == 2
    assert os.environ.get(runner.ALLOCATOR[1]) == "1"
