"""Two and three processes that talk over gloo on this machine, each launched once and asked about many things."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from alignfast import cli, distributed
from alignfast.attacks import Attack, create
from alignfast.data import AdversarialWriter, ImageDataset, Manifest, load_dataset, loader, read_adversarial
from alignfast.distributed import RankError, Ranks
from alignfast.evaluation import transfer_matrix
from alignfast.models import Classifier, save_checkpoint

ROOT = Path(__file__).parent.parent
SECONDS = 240
COUNT, CLASSES, SIDE = 10, 3, 96
MODEL = "timm:test_resnet"
SPEC = {"name": "pgd", "eps": 0.05, "alpha": 0.02, "steps": 2}


def launched(scenario: str, world: int, folder: Path) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of each rank; all of them ended when this returns."""
    port, *others = free_ports()
    variables = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "tests.test_distributed", scenario, str(folder), *others]
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    return ended([started(command, variables | rank) for rank in ranks])


def launched_by_torchrun(scenario: str, world: int, folder: Path) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of all ranks together."""
    launch = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(world)]
    module = ["-m", "tests.test_distributed", scenario, str(folder), *free_ports()]
    return ended([started([sys.executable, "-m", "torch.distributed.run", *launch, *module], {})])[0]


def free_ports() -> list[str]:
    """One for each group of a scenario, as the last one's may still be closing."""
    with contextlib.ExitStack() as stack:
        # Held together, so that they differ.
        bound = [stack.enter_context(socket.socket()) for _ in range(4)]
        for each in bound:
            each.bind(("127.0.0.1", 0))
        return [str(each.getsockname()[1]) for each in bound]


def started(command: Sequence[str], variables: dict[str, str]) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)} | variables
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, start_new_session=True, **pipes)


def ended(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    deadline = time.monotonic() + SECONDS
    try:
        said = [process.communicate(timeout=max(0.1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            # The session's leader may be gone and its children not.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn((CLASSES, 3, 5, 5), generator=generator))

    def forward(self, images: Tensor) -> Tensor:
        return torch.conv2d(images, self.weight).tanh().mean((2, 3))


def net(seed: int) -> Classifier:
    return Classifier(Net(seed), num_classes=CLASSES)


def matrix(data: Any, spec: Any = SPEC, **options: Any) -> dict[str, Any]:
    sources, targets = {"a": net(0), "b": net(1)}, {"c": net(2), "a": net(0)}
    return transfer_matrix(sources, targets, {"pgd": spec}, data, **options).to_dict()


def outcomes(document: dict[str, Any]) -> list[Any]:
    return [document["cells"], document["comparisons"]]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos, checkpoints of two networks, and a matrix file."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "photos" / "images").mkdir(parents=True)
    generator = np.random.default_rng(0)
    rows = ["filename,label"]
    for index in range(COUNT):
        pixels = generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / "images" / f"{index}.png")
        rows.append(f"{index}.png,{index % CLASSES}")
    (folder / "photos" / "labels.csv").write_text("\n".join(rows) + "\n")
    for name, seed in (("a", 0), ("b", 1)):
        torch.manual_seed(seed)
        save_checkpoint(timm.create_model("test_resnet", num_classes=CLASSES), folder / f"{name}.safetensors")
    models = [
        {
            "model": MODEL,
            "checkpoint": str(folder / f"{name}.safetensors"),
            "num_classes": CLASSES,
            "input_size": [3, SIDE, SIDE],
        }
        for name in ("a", "b")
    ]
    content = {
        "data": str(folder / "photos"),
        "sources": {"a": models[0], "b": models[1]},
        "targets": {"b": models[1]},
        "attacks": {"di": {"name": "difgsm", "eps": "8/255", "alpha": "4/255", "steps": 2}},
        "batch_size": 3,
        "qualified": True,
    }
    (folder / "matrix.yaml").write_text(yaml.safe_dump(content))
    return folder


def attack_arguments(work: Path, out: str) -> list[str]:
    model = ["--model", MODEL, "--checkpoint", str(work / "a.safetensors"), "--num-classes", str(CLASSES)]
    numbers = ["--eps", "8/255", "--alpha", "4/255", "--steps", "2", "--batch-size", "3"]
    data = ["--data", str(work / "photos"), "--out", str(work / out)]
    return ["attack", "--attack", "difgsm", *model, *numbers, *data]


def transfer_arguments(work: Path, out: str) -> list[str]:
    return ["transfer", "--config", str(work / "matrix.yaml"), "--out", str(work / out)]


def test_two_ranks_under_torchrun(work: Path) -> None:
    data = loader(photos(work), 3)
    before = matrix(data, parts=work / "parts of one")
    code, out, err = launched_by_torchrun("two", 2, work)
    assert code == 0, err
    # Rank 1 says nothing. Rank 0 has the first and the third of four batches.
    assert out.count(f"10 images in {work / 'images of two'}, ") == out.count("written:") == out.count("written") == 1
    shown = [line.split(",")[0] for line in err.splitlines() if "/" in line.split(",")[0]]
    assert shown == ["difgsm: 6/6 images", "transfer: 12/12 batches", "transfer: 22/22 batches"], err
    assert json.loads((work / "by two.json").read_text()) == json.loads(json.dumps(before))
    assert outcomes(matrix(data, refusing, parts=work / "parts of two")) == outcomes(before)
    assert cli.run(attack_arguments(work, "images of one")) == 0
    one, two = contents(work / "images of one"), contents(work / "images of two")
    assert one == two
    assert len(one) == COUNT + 3
    assert cli.run(transfer_arguments(work, "matrix of one")) == 0
    one, two = contents(work / "matrix of one"), contents(work / "matrix of two")
    assert one.keys() == two.keys()
    # Three attacks on ten images, five cells, and clean images of three models.
    assert len([name for name in one if name.startswith("adversarial")]) == 3 * (COUNT + 2)
    assert len([name for name in one if name.startswith("parts")]) == 5 + 3
    for name in one:
        if name.startswith(("adversarial", "parts", "matrix.json", "config.json")):
            assert one[name] == two[name], name


def two(work: Path, group: Callable[..., Any]) -> None:
    data, lists = loader(photos(work), 3), list(loader(photos(work), 3))
    expected = matrix(data)
    assert cli.run(attack_arguments(work, "images of two")) == 0
    with group() as ranks:
        rank = ranks.rank
        assert ranks == distributed.current() == Ranks(rank, 2, rank)
        assert distributed.main() is (rank == 0)
        assert distributed.gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
        assert (distributed.any_rank(rank == 1), distributed.any_rank(False)) == (True, False)
        assert distributed.on_main(lambda: rank + 7) == 7
        with pytest.raises(FileNotFoundError, match="only 0 looked"):
            distributed.on_main(lambda: failing(FileNotFoundError(f"only {rank} looked")))
        with pytest.raises(RuntimeError, match="Unportable: rank 0"):
            distributed.on_main(lambda: failing(Unportable(rank, None)))
        with distributed.process_group("cpu") as inner:
            assert inner == ranks
        distributed.barrier()
        shown = matrix(data, parts=work / "parts of two", progress=True)
        assert shown == expected
        assert matrix(lists) == expected
        # What one process has kept is taken up by two.
        assert outcomes(matrix(data, refusing, parts=work / "parts of one")) == outcomes(expected)
        with pytest.raises(ValueError, match="is that of rank 0 of 2"):
            matrix(data.deal(0, 2))
        with pytest.raises(ValueError, match="data: differ between ranks"):
            matrix(lists[rank:])
        if rank == 0:
            (work / "by two.json").write_text(json.dumps(shown))
    assert distributed.current() == Ranks(0, 1, 0)
    group()
    assert cli.run(transfer_arguments(work, "matrix of two")) == 0
    assert distributed.current() == Ranks(0, 1, 0)


def test_three_ranks(work: Path) -> None:
    for code, out, err in launched("three", 3, work):
        assert code == 0, err
        assert out == ""
    assert len(read_adversarial(work / "single")[0]) == 1


def three(work: Path, group: Callable[..., Any]) -> None:
    dataset = photos(work)
    data, few = loader(dataset, 2), loader(load_dataset(work / "photos"), 2)
    few.dataset = [dataset[0]]
    expected, expected_of_few = matrix(data), matrix(few)
    with group() as ranks:
        rank = ranks.rank
        seen: list[int] = []
        assert outcomes(matrix(data, recording(seen))) == outcomes(expected)
        # Two sources; ten images in five batches, of which the last rank has one.
        assert len(seen) == 2 * (2 if rank == 2 else 4)
        assert sorted(chain(*distributed.gather(seen))) == sorted(2 * list(range(COUNT)))
        assert matrix(few) == expected_of_few
        writer = AdversarialWriter(work / "single", manifest(), dataset.filenames)
        if rank == 1:
            writer.add(dataset.originals([4]), dataset.labels[[4]], torch.tensor([4]))
        assert writer.finish().indices == (4,)
        with pytest.raises(ValueError, match="holds a finished set of images"):
            AdversarialWriter(work / "single", manifest(), dataset.filenames)
        writer = AdversarialWriter(work / "single", manifest(), dataset.filenames, resume=True)
        assert writer.pending(torch.tensor([3, 4])).tolist() == [True, False]
        with pytest.raises(ValueError, match="data: holds no image"):
            matrix([])
        training = loader(dataset, 4, shuffle=True)
        parts = distributed.gather([batch.indices.tolist() for batch in training.shard(rank, 3)])
        assert [list(chain(*each)) for each in zip(*parts, strict=True)] == [b.indices.tolist() for b in training]
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError if rank == 2 else RankError), group():
        last_rank_fails(rank)
    assert distributed.current() == Ranks(0, 1, 0)
    assert time.monotonic() - began < SECONDS / 2
    with pytest.raises(RankError, match="did not answer in time"), group(timeout=timedelta(seconds=1)):
        last_rank_is_late(rank)
    assert time.monotonic() - began < SECONDS / 2


def last_rank_fails(rank: int) -> None:
    distributed.barrier()
    if rank == 2:
        raise ZeroDivisionError
    distributed.gather(rank)


def last_rank_is_late(rank: int) -> None:
    if rank == 2:
        time.sleep(3)
    distributed.barrier()


def test_alone_there_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in distributed.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with distributed.process_group("cpu") as ranks:
        assert ranks == distributed.current() == Ranks(0, 1, 0)
        assert not torch.distributed.is_initialized()
    assert distributed.main()
    assert distributed.gather("x") == ["x"]
    assert distributed.any_rank(True)
    assert not distributed.any_rank(False)
    assert distributed.on_main(lambda: 5) == 5
    distributed.barrier()


@pytest.mark.parametrize(
    ("changes", "device", "message"),
    [
        ({"MASTER_PORT": None, "LOCAL_RANK": None}, "cpu", "environment: lacks LOCAL_RANK, MASTER_PORT"),
        ({"RANK": None}, "cpu", "environment: lacks RANK"),
        ({"WORLD_SIZE": "two"}, "cpu", "environment: RANK, WORLD_SIZE and LOCAL_RANK are whole numbers"),
        ({}, "cuda:0", "device: got cuda:0; allowed with several processes is cuda"),
        ({"LOCAL_RANK": "99"}, "cuda", "device: no CUDA device for local rank 99"),
    ],
)
def test_bad_environments_are_refused(
    changes: dict[str, str | None], device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(distributed.VARIABLES, ("0", "1", "0", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    for name, other in changes.items():
        monkeypatch.delenv(name) if other is None else monkeypatch.setenv(name, other)
    with pytest.raises(ValueError, match=message), distributed.process_group(device):
        pass
    assert not torch.distributed.is_initialized()


def photos(work: Path) -> ImageDataset:
    return load_dataset(work / "photos", image_size=(32, 32), num_classes=CLASSES)


def manifest() -> Manifest:
    return Manifest(attack="none", parameters={}, model="m", seed=0, eps=0.0, norm="linf", data="d")


class Unportable(Exception):
    """Cannot be made anew from its message."""

    def __init__(self, rank: int, more: Any) -> None:
        super().__init__(f"rank {rank}")


def failing(error: Exception) -> None:
    raise error


def recording(seen: list[int]) -> Callable[[nn.Module], Attack]:
    """The attack of SPEC, which keeps the indices of the images that it is given."""

    def build(model: nn.Module) -> Attack:
        attack = create(source=model, **SPEC)

        class Recorded(Attack):
            def __call__(self, images: Tensor, labels: Tensor, *, indices: Tensor | None = None) -> Tensor:
                assert indices is not None
                seen.extend(indices.tolist())
                return attack(images, labels, indices=indices)

        return Recorded(model, attack.eps, attack.alpha, attack.steps, random_start=True)

    return build


def refusing(model: nn.Module) -> Attack:
    """The attack of SPEC, to the eye; it must not be run."""

    class Refused(Attack):
        def __call__(self, images: Tensor, labels: Tensor, *, indices: Tensor | None = None) -> Tensor:
            raise AssertionError("the outcome is already there")

    return Refused(**{"source": model} | vars_of(create(source=model, **SPEC)))


def vars_of(attack: Attack) -> dict[str, Any]:
    return {name: getattr(attack, name) for name in attack.parameters()}


def as_rank(scenario: str, folder: str, *ports: str) -> None:
    remaining = list(ports)

    def group(**options: Any) -> Any:
        os.environ |= {"MASTER_PORT": remaining.pop(0), "TORCHELASTIC_USE_AGENT_STORE": "False"}
        return distributed.process_group("cpu", **options)

    {"two": two, "three": three}[scenario](Path(folder), group)


if __name__ == "__main__":
    as_rank(*sys.argv[1:])
