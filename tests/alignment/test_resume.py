"""Runs that are interrupted, and go on as if they had not been."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from alignfast.alignment import AlignConfig, AlignResult, Snapshots, align
from alignfast.alignment.embeddings import EMBEDDINGS
from alignfast.alignment.logs import JsonLines
from alignfast.alignment.snapshots import MAGIC, read_snapshot
from alignfast.alignment.stream import generators
from alignfast.data import augmented, load_dataset, loader
from alignfast.models import Classifier
from tests.alignment.test_align import MEAN, SIDE, STD, Network, batches, classifier, config_of

ROOT = Path(__file__).resolve().parents[2]


class Interrupted(Exception):
    pass


class Interrupting(nn.Module):
    """A network that fails in its pass number `at`, and with dropout and draws of Python and NumPy of its own."""

    def __init__(self, at: int | None = None) -> None:
        super().__init__()
        self.network = Network(0, dropout=0.3)
        self.at, self.passes = at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += self.training
        if self.training and self.passes == self.at:
            raise Interrupted
        drawn = random.random() + np.random.rand()  # noqa: NPY002
        noise = 0.01 * drawn if self.training else 0.0
        result: Tensor = self.network(x + noise)
        return result


def source(at: int | None = None) -> Classifier:
    return Classifier(Interrupting(at), MEAN, STD, 5)


def equal(first: AlignResult, second: AlignResult) -> bool:
    pairs = zip(first.model.state_dict().items(), second.model.state_dict().values(), strict=True)
    return first.history == second.history and all(torch.equal(one, other) for (_, one), other in pairs)


def shuffled(seed: int = 0) -> DataLoader[Any]:
    """Draws its order from the global generator."""
    images, labels = (torch.cat(parts) for parts in zip(*batches(7), strict=True))
    return DataLoader(TensorDataset(images, labels), batch_size=6, shuffle=True)


def own(tmp_path: Path) -> Any:
    generator = torch.Generator().manual_seed(2)
    file = tmp_path / "data.npz"
    if not file.exists():
        images = torch.randint(0, 256, (42, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8).numpy()
        np.savez(file, images=images, labels=np.arange(42) % 5)
    views = augmented(load_dataset(file, num_classes=5), (SIDE, SIDE), seed=1)
    return loader(views, 6, shuffle=True, seed=1)


RECIPES: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adamw, warm-up, labels": {"optimizer": "adamw", "lr": 0.01, "warmup": 3, "lambda_cls": 0.3},
    "average, accumulated": {"ema": 0.9, "accumulate": 3},
    "projected embeddings": {"embeddings": (EMBEDDINGS["hint"], EMBEDDINGS["rkd"]), "clip_norm": 1.0},
    "bf16, held": {"precision": "bf16", "lambda_self": 0.5},
    "fp16": {"precision": "fp16"},
    "recalibrated, constant": {"batch_norm": "recalibrate", "schedule": "constant", "steps": 19},
    "early stop": {"check_every": 2, "patience": 9, "lr": 0.4},
}


@pytest.mark.parametrize("kind", ["own", "foreign"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_resumed_run_ends_in_the_same_bits(recipe: str, kind: str, tmp_path: Path) -> None:
    config = config_of(**({"epochs": 3} | RECIPES[recipe]))
    held = batches(22)[20:] if config.patience else None
    witness = classifier(11, width=9)

    def run(at: int | None, resume: bool, folder: str, log: str) -> AlignResult:
        data = own(tmp_path) if kind == "own" else shuffled()
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
        return align(
            source(at),
            witness,
            data,
            config,
            held_out=held,
            snapshots=Snapshots(tmp_path / folder, every=2),
            resume=resume,
            logs=[JsonLines(tmp_path / log)],
        )

    whole = run(None, False, "whole", "whole.jsonl")
    # In the middle of a pass, and just after a pass has ended.
    for at in (4, 5, 6) if config.patience else (4, 8, 9):
        with pytest.raises(Interrupted):
            run(at, True, "parts", "parts.jsonl")
    found = run(None, True, "parts", "parts.jsonl")
    assert equal(found, whole)
    assert (tmp_path / "parts.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    names = [path.name for path in sorted((tmp_path / "parts").iterdir())]
    assert len(names) == 2
    again = run(None, True, "parts", "parts.jsonl")
    assert equal(again, whole)


def quick(folder: Path, config: AlignConfig | None = None, **options: Any) -> AlignResult:
    given = {"snapshots": Snapshots(folder, every=2)} | options
    return align(classifier(0), classifier(11), batches(9), config or config_of(), **given)


def test_a_torn_snapshot_is_passed_over(tmp_path: Path) -> None:
    whole = quick(tmp_path / "whole")
    quick(tmp_path / "parts")
    newest, before = sorted((tmp_path / "parts").iterdir(), reverse=True)
    content = newest.read_bytes()
    torn = [content[: len(content) // 2], content[:10], b"", b"foreign", content[:-1] + bytes([content[-1] ^ 1])]
    for other in torn:
        newest.write_bytes(other)
        with pytest.warns(UserWarning, match=r"snapshot: .*step-000000008\.pt .*torn.*; the one before it is taken"):
            assert equal(quick(tmp_path / "parts", resume=True), whole)
    before.write_bytes(b"")
    newest.write_bytes(b"")
    with pytest.warns(UserWarning, match="torn"):
        assert equal(quick(tmp_path / "parts", resume=True), whole)


def test_a_run_goes_on_from_an_earlier_snapshot_than_its_last(tmp_path: Path) -> None:
    whole = quick(tmp_path)
    newest = max(tmp_path.iterdir())
    newest.unlink()
    assert equal(quick(tmp_path, resume=True), whole)


def test_accuracy_before_is_that_of_the_source_as_it_was(tmp_path: Path) -> None:
    options = {"config": config_of(lr=0.2), "clean": batches(12)[9:], "in_place": True}
    whole = quick(tmp_path, **options).clean
    assert whole.before != whole.after
    assert quick(tmp_path, resume=True, **options).clean == whole


def test_counting_draws_nothing() -> None:
    """Of a source that draws in every pass."""
    found = []
    for options in ({}, {"clean": batches(12)[9:]}):
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
        found.append(align(source(), classifier(11), batches(9), config_of(), **options))
    assert equal(*found)


def test_a_snapshot_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(tmp_path)
    read: list[str] = []

    def reading(path: Path) -> dict[str, Any]:
        read.append(path.name)
        return read_snapshot(path)

    monkeypatch.setattr("alignfast.alignment.snapshots.read_snapshot", reading)
    quick(tmp_path, resume=True)
    assert read == ["step-000000008.pt"]
    (tmp_path / "step-000000008.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="torn"):
        quick(tmp_path, resume=True)
    assert read[1:] == ["step-000000008.pt", "step-000000006.pt"]


def test_snapshots_of_another_run_are_refused_with_what_differs(tmp_path: Path) -> None:
    quick(tmp_path)
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for options, message in (
        ({"config": config_of(lr=0.01)}, r"is of another run \(lr: 0\.05 there, 0\.01 here\)"),
        ({"config": config_of(steps=4)}, r"steps: 9 there, 4 here"),
    ):
        with pytest.raises(ValueError, match=message):
            quick(tmp_path, resume=True, **options)
    with pytest.raises(ValueError, match=r"source: '\w+' there, '\w+' here"):
        align(classifier(3), classifier(11), batches(9), config_of(), snapshots=Snapshots(tmp_path), resume=True)
    with pytest.raises(ValueError, match=r"\(loader's batches: 9 there, 10 here\)"):
        align(
            classifier(0), classifier(11), batches(10), config_of(steps=9), snapshots=Snapshots(tmp_path), resume=True
        )
    with pytest.raises(ValueError, match="resume: got True without snapshots"):
        align(classifier(0), classifier(11), batches(9), config_of(), resume=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == kept


@pytest.mark.parametrize("name", ["images", "batch_size", "shuffle", "seed", "drop_last"])
def test_a_loader_of_other_batches_is_refused(name: str, tmp_path: Path) -> None:
    dataset = own(tmp_path).dataset
    settings: dict[str, Any] = {"batch_size": 6, "shuffle": True, "seed": 1}
    others = {"images": Subset(dataset, range(36)), "batch_size": 7, "shuffle": False, "seed": 2, "drop_last": True}

    def run(data: Any, settings: dict[str, Any]) -> AlignResult:
        snapshots = Snapshots(tmp_path / "snapshots", every=1)
        config = config_of(steps=2)
        return align(classifier(0), classifier(11), loader(data, **settings), config, snapshots=snapshots, resume=True)

    run(dataset, settings)
    other = (others[name], settings) if name == "images" else (dataset, settings | {name: others[name]})
    with pytest.raises(ValueError, match=f"is of another run .loader's {name}: "):
        run(*other)


def test_a_loss_that_is_not_finite_leaves_the_last_good_snapshot(tmp_path: Path) -> None:
    data = batches(9)
    data[6][0][0, 0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="at step 7, batch 7 of pass 1"):
        align(classifier(0), classifier(11), data, config_of(), snapshots=Snapshots(tmp_path, every=1))
    newest = max(tmp_path.iterdir())
    assert newest.name == "step-000000006.pt"
    state = read_snapshot(newest)
    assert all(tensor.isfinite().all() for tensor in state["student"].values())


class Exploding(torch.autograd.Function):
    """The identity, with a gradient that is not finite from the call number 7 on."""

    calls = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Exploding.calls += 1
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (torch.inf if Exploding.calls >= 7 else 1.0)


def test_a_gradient_that_is_not_finite_leaves_the_last_good_snapshot(tmp_path: Path) -> None:
    """Where the loss of its step is finite."""
    model = classifier(0)
    model.module[5].register_forward_hook(lambda _, __, output: Exploding.apply(output) if model.training else output)
    with pytest.raises(
        FloatingPointError, match=r"grad_norm: (inf|nan) at step 7, batch 7 of pass 1, of learning rate"
    ):
        align(model, classifier(11), batches(9), config_of(), snapshots=Snapshots(tmp_path, every=1))
    assert max(tmp_path.iterdir()).name == "step-000000006.pt"


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    leftover = tmp_path / ".step-000000004.abcd.pt"
    leftover.write_bytes(MAGIC)
    quick(tmp_path, resume=True)
    assert not leftover.exists()


def test_snapshots_by_the_clock(tmp_path: Path) -> None:
    quick(tmp_path / "never", snapshots=Snapshots(tmp_path / "never", every=None, minutes=60.0))
    assert not (tmp_path / "never").exists()
    quick(tmp_path / "often", snapshots=Snapshots(tmp_path / "often", every=None, minutes=1e-9, keep=3))
    assert len(list((tmp_path / "often").iterdir())) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every: got 0"),
        ({"every": None}, "every, minutes: got None for both"),
        ({"minutes": 0.0}, r"minutes: got 0\.0"),
        ({"keep": 0}, "keep: got 0"),
    ],
)
def test_bad_snapshots(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Snapshots("folder", **arguments)


PROGRAM = """
import sys, torch
from pathlib import Path
from alignfast.alignment import Snapshots, align
from tests.alignment.test_align import batches, classifier, config_of

def slow():
    for number in range(3000):
        print(number, flush=True)
        yield batches(1)[0]

align(classifier(0), classifier(11), slow(), config_of(steps=3000), snapshots=Snapshots(sys.argv[1], every=10**6))
"""


def test_sigterm_writes_a_snapshot_and_ends_with_0(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 20:
            process.send_signal(signal.SIGTERM)
            break
    process.stdout.read()
    assert process.wait(timeout=60) == 0
    (path,) = tmp_path.iterdir()
    assert 15 <= read_snapshot(path)["step"] < 3000


def test_the_handler_of_sigterm_is_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    quick(tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_global_generators_are_left_as_they_were(tmp_path: Path) -> None:
    quick(tmp_path)
    (tmp_path / "step-000000008.pt").unlink()
    random.seed(1)
    torch.manual_seed(1)
    before = generators()
    quick(tmp_path, resume=True)
    after = generators()
    assert torch.equal(before["torch"], after["torch"])
    assert before["python"] == after["python"]
    assert torch.equal(before["numpy"][1], after["numpy"][1])
    assert before["numpy"][2:] == after["numpy"][2:]


def test_nothing_is_warned_of_in_a_plain_run(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quick(tmp_path)


@pytest.mark.slow
def test_runs_that_are_killed_at_random_moments_end_in_the_same_bits() -> None:
    script = [sys.executable, "examples/interrupted_runs.py", "--kills", "20"]
    run = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
