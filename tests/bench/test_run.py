"""The runner as a person uses it: what it prints, what it writes, and how it ends."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from alignfast import cli
from alignfast.bench import harness, machine, passes, registry
from alignfast.bench import run as runner
from alignfast.bench.history import read_report, seconds_of
from alignfast.bench.limits import Limits
from alignfast.bench.peak_memory import Peaks
from alignfast.bench.peers import PEERS
from alignfast.bench.registry import Case, select
from alignfast.bench.roofline import A100
from alignfast.memory import memory_state

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
        monkeypatch.setattr(runner, "measure_limits", lambda device: Limits({"fp32": 1e11}, 1e10))

    return choose


def small(op: str = "sign_step", match: str = "plain", **targets: float) -> Case:
    case = select(["ops"], [op], ["fp32"], match, smallest=True)[0]
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
    kept = replace(memory_state(), kept=False, reason="of a reason")
    monkeypatch.setattr(machine, "memory_state", lambda: kept)
    chosen([small(copy=1e9), small("philox_uniform", "unit")])
    path = tmp_path / "out.json"
    assert cli.run(["bench", *ARGUMENTS, "--threads", "1", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    for word in ("sign_step", "philox_uniform", "plain", "2x3x8x8", "vs eager", "of copy", "missed: copy 1e+09"):
        assert word in printed
    assert " 1 thread," in printed
    assert "Note: freed memory goes back to the kernel (of a reason)" in printed
    assert "Products of matrices (GEMM) in GFLOP/s: fp32 100; copies: 10 GB/s." in printed
    assert "compiled" not in printed
    written = json.loads(path.read_text())
    assert written["settings"] == {"device": "cpu", "threads": 1, "seconds": 0.0, "compile": False}
    assert written["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert set(PEERS) <= set(written["versions"])
    assert written["limits"] == {"gemm": {"fp32": 1e11}, "copy": 1e10}
    facts = written["machine"]
    assert facts["allocator"] == {"MALLOC_MMAP_THRESHOLD_": "123", "MALLOC_TRIM_THRESHOLD_": None}
    assert facts["memory"]["reason"] == "of a reason"
    assert facts["backends"]["cpu"]["loaded"] is True
    assert facts["kernels"] in {"baseline", "avx2", "avx512"}
    assert facts["processor"]
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
    assert cli.run(["bench", *ARGUMENTS, "--json", str(path)]) == 1
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
    assert cli.run(["bench", *ARGUMENTS]) == 0
    assert cli.run(["bench", *ARGUMENTS, "--gate"]) == 1
    chosen([small(copy=1e-9)])
    assert cli.run(["bench", *ARGUMENTS, "--gate"]) == 0
    assert "met" in capsys.readouterr().out


def test_the_gate_does_not_pass_what_was_disturbed(
    chosen: Choose, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen([small(copy=1e-9)])
    told = iter(range(0, 10**9, 10**6))
    monkeypatch.setattr(harness, "waiting", lambda: float(next(told)))
    assert cli.run(["bench", *ARGUMENTS, "--gate"]) == 1
    assert "DISTURBED" in capsys.readouterr().out
    assert cli.run(["bench", *ARGUMENTS]) == 0
    chosen([small()])
    assert cli.run(["bench", *ARGUMENTS, "--gate"]) == 0


def test_a_run_that_breaks_off_leaves_no_file(chosen: Choose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **settings: object) -> None:
        raise KeyboardInterrupt

    chosen([small()])
    monkeypatch.setattr(runner, "measure", interrupted)
    assert cli.run(["bench", "--json", str(tmp_path / "out.json")]) == cli.INTERRUPTED
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_finished_is_not_begun(
    chosen: Choose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError("no space left")

    chosen([small()])
    monkeypatch.setattr(Path, "replace", full)
    assert cli.run(["bench", *ARGUMENTS, "--json", str(tmp_path / "out.json")]) == 1
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
        (["--device", "cpu:x"], "device: got 'cpu:x'"),
        (["--group", "op"], "group: got unknown group 'op' (did you mean 'ops'?)"),
        (["--group", "attacks", "--op", "smooth"], "match: got ''"),
        (["--compare", "/no/such/file.json"], "compare: cannot use /no/such/file.json"),
        (["--json", "/no/such/folder/out.json"], "json: cannot write to /no/such/folder"),
        (["--markdown", __file__], f"markdown: {__file__} exists; give a new file"),
        (["--plot", "/tmp/no-such-plot.gif"], "plot: got 'no-such-plot.gif'; allowed is a name that ends in .png"),
        (["--memory", "--plot", "/tmp/no-such-plot.png"], "plot: got a file beside --memory"),
        (["--memory", "--group", "ops"], "match: got ''"),
        (["--read", "/no/such/file.json"], "read: cannot use /no/such/file.json"),
        (["--history", __file__], f"history: cannot make {__file__} (File exists)"),
        (["--opp", "sign_step"], "No such option: --opp"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"alignfast: {message}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "--device", "cuda", "--quick"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("alignfast: device: got 'cuda'; allowed here is cpu (no CUDA device found)")


def test_another_run_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    path.write_text("{}")
    assert cli.run(["bench", "--json", str(path)]) == 2
    assert path.read_text() == "{}"
    assert "exists" in capsys.readouterr().err


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "--list", "--op", "smooth", "--quick"]) == 0
    assert capsys.readouterr().out.splitlines() == ["smooth/15x15/fp32/8x3x224x224", "smooth/15x15/bf16/8x3x224x224"]


def test_no_note_where_the_allocator_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = runner.Settings("cpu", 1, 1.0, False)
    for kept, lines in ((True, 1), (False, 2)):
        state = replace(memory_state(), kept=kept)
        monkeypatch.setattr(machine, "memory_state", lambda state=state: state)
        assert len(runner.notes(machine.machine(torch.device("cpu")), settings, {})) == lines


def test_expectations_need_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    assert cli.run(["bench", "--expect", "--op", "sign_step", "--match", "plain/fp32/128", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("A100 memory ms", "H100 memory ms", "128x3x224x224", "0.1512"))
    (times,) = json.loads(path.read_text())["expected"].values()
    assert times["moved"] == 4 * 128 * 3 * 224 * 224 * 4
    assert times["A100"] == {"memory": pytest.approx(times["moved"] / 2039e9)}
    assert times["H100"] == {"memory": pytest.approx(times["moved"] / 3352e9)}
    assert cli.run(["bench", "--expect", "--group", "alignment", "--match", "bf16/32x"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("align", "A100 tf32 ms", "H100 bf16 ms", "resnet50 to resnet18"))


def test_an_earlier_run_is_compared_with(chosen: Choose, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen([small(), small("philox_uniform", "unit")])
    path = tmp_path / "before.json"
    assert cli.run(["bench", *ARGUMENTS, "--json", str(path)]) == 0
    assert "vs before" not in capsys.readouterr().out
    held = json.loads(path.read_text())
    step, draws = held["cases"]
    medians = {case["name"]: case["seconds"]["ours"]["median"] for case in (step, draws)}
    assert seconds_of(read_report(path, "compare")) == medians
    step["seconds"]["ours"]["median"] = 1e6
    draws["seconds"] = {}
    path.write_text(json.dumps(held))
    assert cli.run(["bench", *ARGUMENTS, "--compare", str(path)]) == 0
    rows = [line.split("│")[-3].strip() for line in capsys.readouterr().out.splitlines() if "2x3x8x8" in line]
    assert float(rows[0]) > 1e6
    assert rows[1] == ""


def test_a_folder_keeps_every_run_and_compares_with_the_one_before(
    chosen: Choose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen([small()])
    folder = tmp_path / "runs"
    for number, compared in enumerate((False, True, True), 1):
        assert cli.run(["bench", *ARGUMENTS, "--history", str(folder)]) == 0
        assert ("vs before" in capsys.readouterr().out) is compared
        assert len(list(folder.iterdir())) == number


def test_a_run_is_shown_again_as_table_and_markdown_and_plot(
    chosen: Choose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen([small(copy=1e9), wrong(small())])
    path, page, plot = (tmp_path / name for name in ("out.json", "page.md", "plot.png"))
    assert cli.run(["bench", *ARGUMENTS, "--json", str(path)]) == 1
    first = capsys.readouterr().out
    table = first[first.index("sign_step") :]
    again = ["bench", "--read", str(path), "--markdown", str(page), "--plot", str(plot), "--compare", str(path)]
    assert cli.run(again) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == "Products of matrices (GEMM) in GFLOP/s: fp32 100; copies: 10 GB/s."
    assert cli.run(["bench", "--read", str(path)]) == 0
    assert capsys.readouterr().out.endswith(table)
    assert plot.read_bytes().startswith(b"\x89PNG")
    lines = page.read_text().splitlines()
    assert "### sign_step" in lines
    heads, marks, right, broken = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[-4:])
    assert heads[:4] == ["variant", "dtype", "shape", "MB moved"]
    assert heads[-2:] == ["vs before", "target"]
    assert marks[0] == "---"
    assert marks[4] == "---:"
    assert right[-2:] == ["1", "missed: copy 1e+09"]
    assert broken[-1].startswith("WRONG: ours: result 0")
    assert len(heads) == len(right) == len(broken)


def test_what_cannot_be_measured_here_is_named(
    chosen: Choose, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "has_bf16", lambda device: False)
    bare = replace(select(["preparation"], dtypes=["bf16"])[0], shape=(1, 3, 8, 8))
    chosen([bare, small()])
    path = tmp_path / "out.json"
    assert cli.run(["bench", *ARGUMENTS, "--json", str(path)]) == 0
    assert f"Skipped, this hardware has no bfloat16: {bare.name}." in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written["skipped"] == {bare.name: "this hardware has no bfloat16"}
    assert [case["subject"] for case in written["cases"]] == ["sign_step"]


def test_passes_of_models_stand_beside_products_of_matrices(
    chosen: Choose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = select(["preparation"], dtypes=["fp32"])[0]
    build = partial(passes.preparation, network="test_resnet")
    chosen([replace(bare, shape=(2, 3, 32, 32), build=build, targets={"gemm": 1e9})])
    path = tmp_path / "out.json"
    assert cli.run(["bench", *ARGUMENTS, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    for word in ("vs as loaded", "of GEMM", "missed: gemm 1e+09"):
        assert word in printed
    (told,) = json.loads(path.read_text())["cases"]
    assert told["of_gemm"] == pytest.approx(told["flops"] / told["seconds"]["ours"]["median"] / 1e11)


def test_memory_is_measured_instead_of_times(
    chosen: Choose, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = select(["attacks"], match="mifgsm/resnet50", dtypes=["fp32"])[0]
    peaks = {"ours": 70_000_000, "torchattacks": 100_000_000}
    monkeypatch.setattr(runner, "measure_memory", lambda case, device, threads: Peaks(case, peaks))
    chosen([attack, small()])
    path, page = tmp_path / "out.json", tmp_path / "page.md"
    command = ["bench", "--memory", "--json", str(path), "--markdown", str(page)]
    assert cli.run(command) == 0
    printed = capsys.readouterr().out
    for word in ("peak memory of a call", "ours MB", "torchattacks MB", "0.70", "missed: 0.6"):
        assert word in printed
    assert "sign_step" not in printed
    written = json.loads(path.read_text())
    assert written["cases"] == []
    (told,) = written["memory"]
    assert (told["peak_bytes"], told["of_torchattacks"], told["missed"]) == (peaks, 0.7, True)
    assert "| 70 | 100 | 0.70 | missed: 0.6 |" in page.read_text()
    assert cli.run(["bench", "--memory", "--gate"]) == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"cases": [{"name": "a", "seconds": {"ours": 1}}]}'])
def test_what_no_run_wrote_is_not_compared_with(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "before.json"
    path.write_text(text)
    assert cli.run(["bench", "--compare", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"alignfast: compare: cannot use {path}")


def test_runs_of_a_gpu_show_peaks_and_expectations(
    chosen: Choose, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU stands in for a GPU that is as torch would describe it."""
    gpu = replace(A100, name="NVIDIA A100-SXM4-80GB")
    facts = {"name": gpu.name, "smi": {"driver_version": "580.1"}}
    monkeypatch.setattr(harness, "gpu_of", lambda device: gpu)
    monkeypatch.setattr(runner, "machine", lambda device: machine.machine(device) | {"gpu": facts, "chosen": "cuda"})
    chosen([small()])
    path = tmp_path / "out.json"
    assert cli.run(["bench", *ARGUMENTS, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    for word in (
        "NVIDIA A100-SXM4-80GB, driver 580.1, backend of the ops: cuda",
        "A100 ms",
        "(memory)",
        "(L2)",
    ):
        assert word in printed
    written = json.loads(path.read_text())
    assert written["machine"]["chosen"] == "cuda"
    (step,) = written["cases"]
    assert step["fits_l2"] is True
    assert step["expected"]["H100"]["memory"] == pytest.approx(step["bytes"] / 3352e9)
    assert step["of_peak"] == pytest.approx(step["bytes"] / 2039e9 / step["seconds"]["ours"]["median"])


def test_commands_of_the_page_are_understood() -> None:
    page = (Path(__file__).parents[2] / "bench" / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^(?:ALIGNFAST_BACKEND=\w+ +)?alignfast (bench .*)$", page, re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        assert cli.run([*command.split(), "--list"]) == 0
