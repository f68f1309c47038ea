"""Alignment over several processes, against one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignfast.alignment import AlignResult, Snapshots, align
from alignfast.alignment.logs import JsonLines
from alignfast.data import augmented, load_dataset, loader
from alignfast.distributed import barrier, current, gather, process_group
from alignfast.models import save_checkpoint
from tests.alignment.test_align import SIDE, classifier, config_of
from tests.test_distributed import ended, free_ports, started

COUNT = 48
# Parts of 12 images over three ranks are of equal size, of 10 over three are not.
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (12, {"batch_norm": "freeze", "epochs": 2}),
    "uneven": (10, {"batch_norm": "freeze", "lambda_cls": 0.5, "clip_norm": 0.5}),
    "accumulated": (8, {"batch_norm": "freeze", "accumulate": 3, "ema": 0.8, "lambda_self": 0.3}),
}


def data(folder: Path, batch_size: int) -> Any:
    views = augmented(load_dataset(folder / "data.npz", num_classes=5), (SIDE, SIDE), seed=1)
    return loader(views, batch_size, shuffle=True, seed=1, drop_last=True)


def held_out(folder: Path) -> Any:
    return loader(load_dataset(folder / "data.npz", num_classes=5), 7)


def aligned(folder: Path, name: str, **options: Any) -> AlignResult:
    batch_size, changes = SETTINGS[name]
    config = config_of(check_every=2, **changes)
    given: dict[str, Any] = {"held_out": held_out(folder)} | options
    return align(classifier(0), classifier(11), data(folder, batch_size), config, **given)


def work(folder: Path) -> None:
    """On every rank."""
    with process_group("cpu") as ranks:
        for name in SETTINGS:
            stem = f"{name}-{ranks.world}"
            result = aligned(folder, name, checkpoint=folder / f"{stem}.safetensors", logs=[JsonLines(folder / stem)])
            if ranks.rank == 0:
                found = {"history": result.history, "clean": vars(result.clean)}
                (folder / f"{stem}.json").write_text(json.dumps(found))
            save_checkpoint(result.model, folder / f"{stem}-of-{ranks.rank}.safetensors")
        snapshots = Snapshots(folder / f"snapshots-{ranks.world}", every=2)
        whole = aligned(folder, "plain", snapshots=snapshots)
        newest = max(Path(snapshots.folder).iterdir())
        barrier()
        if ranks.rank == 0:
            newest.unlink()
        barrier()
        resumed = aligned(folder, "plain", snapshots=snapshots, resume=True)
        assert resumed.history == whole.history
        for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(one, other)
        moved = align(classifier(0), classifier(11), data(folder, 12), config_of(), clean=held_out(folder))
        first, *others = gather(moved.model.state_dict())
        # Each has normalised by statistics of its own.
        assert all(torch.equal(tensor, other[name]) for other in others for name, tensor in first.items())
        small = loader(load_dataset(folder / "data.npz", num_classes=5), COUNT - 1)
        with pytest.raises(ValueError, match=rf"a last one of 1 for {ranks.world} ranks"):
            align(classifier(0), classifier(11), small, config_of())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what two and three processes made."""
    folder = tmp_path_factory.mktemp("ranks")
    generator = np.random.default_rng(2)
    images = generator.integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
    np.savez(folder / "data.npz", images=images, labels=np.arange(COUNT) % 5)
    for world in (2, 3):
        variables = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_ports()[0]}
        command = [sys.executable, "-m", "tests.alignment.test_ranks", str(folder)]
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
        for code, _, error in ended([started(command, variables | rank) for rank in ranks]):
            assert code == 0, error[-4000:]
    return folder


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_with_parts_of_a_batch_equal_one_process_with_all_of_it(name: str, world: int, folder: Path) -> None:
    from safetensors.torch import load_file

    whole = aligned(folder, name)
    expected = whole.model.module.state_dict()
    for rank in range(world):
        found = load_file(folder / f"{name}-{world}-of-{rank}.safetensors")
        assert max(float((found[key] - value).abs().max()) for key, value in expected.items()) < 1e-6
        # All ranks have the same bits.
        first = load_file(folder / f"{name}-{world}.safetensors")
        assert all(torch.equal(found[key], value) for key, value in first.items())
    written = json.loads((folder / f"{name}-{world}.json").read_text())
    for one, other in zip(written["history"], whole.history, strict=True):
        numbers = {key: value for key, value in other.items() if value is not None}
        assert {key: one[key] for key in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-6)
        assert one.keys() == other.keys()
    lines = (folder / f"{name}-{world}").read_text().splitlines()
    assert [json.loads(line) for line in lines] == written["history"]
    assert written["clean"] == pytest.approx(vars(whole.clean))
    assert current().world == 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(Path(sys.argv[1]))
